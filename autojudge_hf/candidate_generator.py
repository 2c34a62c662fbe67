# SPDX-License-Identifier: Apache-2.0
"""Drafting: candidates of an assistant, with its hidden states for judges that read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from .caches import keep, num_cached, rewind, rewindable_cache, shrink
from .drafter import Drafter, choices
from .fixed_cache import FixedCache
from .forward import cached_forward, fixed_draft
from .head_inputs import HeadInputs
from .model_properties import input_device, of_vocabulary, vocab_size


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


class JudgeCandidateGenerator(Drafter):
    """Drafts candidates with a smaller model, on its own cache.

    Unlike the stock generator it doesn't call `generate` for every draft, it drafts as many as it is told,
    and it drafts for several rows at once; of the assistant's generation config it reads nothing else.

    Args:
        assistant_model (`PreTrainedModel`): the drafter.
        target_model (`PreTrainedModel`): whose vocabulary the candidates keep to.
        do_sample (`bool`): whether to draw the candidates rather than take the best.
        eos_token_ids (`set[int]`): the target's. A draft ends when every row has one, unless the cache is a
            [`FixedCache`]: there the host doesn't wait to see.
        head ([`HeadInputs`], *optional*): of the assistant, to keep its hidden states; the state of the last candidate
            costs one more pass per cycle.
        output_logits (`bool`, *optional*, defaults to `False`): whether to return the logits of a greedy draft, too.
        cache (`Cache`, *optional*): the assistant's keys and values of a prefix of the first `input_ids`.
    """

    def __init__(
        self,
        assistant_model: PreTrainedModel,
        target_model: PreTrainedModel,
        *,
        do_sample: bool,
        eos_token_ids: set[int],
        head: HeadInputs | None = None,
        output_logits: bool = False,
        cache: Cache | None = None,
    ):
        self.assistant_model = assistant_model
        self.do_sample = do_sample
        self.eos_token_ids = eos_token_ids
        self.head = head
        self.output_logits = output_logits or do_sample
        self.vocab_size, self.target_vocab_size = vocab_size(assistant_model), vocab_size(target_model)
        self.cache = rewindable_cache(assistant_model) if cache is None else cache
        self._length = num_cached(self.cache)
        self._device = input_device(assistant_model)

    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        max_candidates: Sequence[int],
        process: Callable[[torch.LongTensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """As [`Drafter.get_candidates`]."""
        self._length, length = input_ids.shape[1], max(max_candidates)
        drafted, logits, states = [input_ids[:, :0]], [], []
        tokens = input_ids[:, num_cached(self.cache) :]
        is_plain = process is None and not self.output_logits and self.head is None
        if isinstance(self.cache, FixedCache) and is_plain and length > 0:
            size = min(self.vocab_size, self.target_vocab_size)
            candidate_ids = fixed_draft(
                self.assistant_model, self._known(tokens), self.cache, attention_mask, length, size
            )
            return torch.cat([input_ids, candidate_ids.to(input_ids.device)], dim=1), None
        unfinished = set(range(len(input_ids)))
        for i in range(length):
            outputs = self._forward(tokens, attention_mask)
            if i == 0:
                keep(self.cache)
            next_logits = of_vocabulary(outputs.logits[:, -1:], self.target_vocab_size)
            next_logits = next_logits.to(input_ids.device, torch.float32)
            if process is not None:
                next_logits = process(torch.cat(drafted, dim=1), next_logits)
            tokens = choices(next_logits, self.do_sample)
            if self.output_logits:
                logits.append(next_logits)
            if self.head is not None:
                states.append(outputs.states[:, -1:])
            drafted.append(tokens)
            if isinstance(self.cache, FixedCache):
                continue
            unfinished -= {j for j, (token,) in enumerate(tokens.tolist()) if token in self.eos_token_ids}
            if not unfinished:
                break
        if states:
            states.append(self._forward(tokens, attention_mask).states[:, -1:])
            self.states = torch.cat(states, dim=1)
        sequence = torch.cat([input_ids, *drafted], dim=1)
        return sequence, torch.cat(logits, dim=1) if logits else None

    def rewind(
        self,
        num_committed: Sequence[int],
        target_states: torch.Tensor | None,
        target_layers: Sequence[torch.Tensor] | None,
    ) -> None:
        cached = num_cached(self.cache)
        if cached:
            # All rows leave the same number of committed tokens to the next draft: the newest, and one more where a
            # row's last candidate, which never ran through the assistant, was accepted.
            ahead = max(1, self._length + max(num_committed) - cached)
            rewind(self.cache, [cached - (self._length + n - ahead) for n in num_committed])

    def shrink(self, rows: Sequence[int], unneeded: int) -> None:
        shrink(self.cache, rows, num_cached(self.cache) - unneeded)

    def _known(self, tokens: torch.LongTensor) -> torch.LongTensor:
        """The assistant may lack some of the target's tokens; any other will do: only the draft gets worse."""
        return tokens.clamp(max=self.vocab_size - 1) if self.vocab_size < self.target_vocab_size else tokens

    def _forward(self, tokens: torch.LongTensor, mask: torch.Tensor | None):
        if mask is not None:
            new = num_cached(self.cache) + tokens.shape[1] - mask.shape[1]
            mask = torch.nn.functional.pad(mask, (0, new), value=1).to(self._device)
        tokens = self._known(tokens).to(self._device)
        return cached_forward(self.assistant_model, tokens, self.cache, mask, head=self.head)
