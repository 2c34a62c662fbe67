# SPDX-License-Identifier: Apache-2.0
"""Drafting: the assistant's candidates, and its hidden states for judges that read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessorList
from transformers.generation import CandidateGenerator

from .forward import cached_forward, max_positions, rewindable_cache, vocab_size


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class JudgeCandidateGenerator(CandidateGenerator):
    """Drafts candidates with a smaller model, on its own cache.

    Unlike the stock generator it doesn't call `generate` for every draft, and it obeys `num_assistant_tokens`
    exactly; of the assistant's generation config it reads nothing else. A draft ends early at an EOS token, at the
    remaining budget and where either model runs out of positions.

    Args:
        assistant_model (`PreTrainedModel`): the drafter.
        target_model (`PreTrainedModel`): whose vocabulary and position limit the candidates keep to.
        logits_processor (`LogitsProcessorList`): the target's; the draft follows the same rules.
        num_assistant_tokens (`int`): candidates per cycle.
        max_length (`int`): of prompt and response together, in tokens.
        eos_token_ids (`set[int]`): the target's.
        do_sample (`bool`): whether to draw the candidates rather than take the best.
        attention_mask (`torch.LongTensor` of shape `(b, prompt_length)`, *optional*): 0 at padding.
        output_states (`bool`, *optional*, defaults to `False`): whether to keep the assistant's hidden states; the
            state of the last candidate costs one more pass per cycle.
    """

    def __init__(
        self,
        assistant_model: PreTrainedModel,
        target_model: PreTrainedModel,
        logits_processor: LogitsProcessorList,
        num_assistant_tokens: int,
        *,
        max_length: int,
        eos_token_ids: set[int],
        do_sample: bool,
        attention_mask: torch.Tensor | None = None,
        output_states: bool = False,
    ):
        self.assistant_model = assistant_model
        self.logits_processor = logits_processor
        self.num_assistant_tokens = num_assistant_tokens
        self.attention_mask = attention_mask
        self.output_states = output_states
        self.do_sample = do_sample
        self.eos_token_ids = eos_token_ids
        self.target_vocab_size = vocab_size(target_model)
        # A cycle commits one token more than it has candidates, and the last committed token needs no position yet.
        limits = [max_length - 1]
        limits += [limit for limit in (max_positions(target_model), max_positions(assistant_model)) if limit]
        self.max_sequence_length = min(limits)
        self.cache = rewindable_cache(assistant_model)
        #: The assistant's last hidden states of the last draft, from the last committed token to the last candidate:
        #: shape `(b, k + 1, h_a)`.
        self.states: torch.Tensor | None = None

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """Drafts after `input_ids`.

        Args:
            input_ids (`torch.LongTensor` of shape `(b, n)`): the committed tokens. What was drafted before and isn't
                among them is forgotten.

        Returns:
            `(candidate_input_ids, logits)`: the tokens followed by `k` candidates, shape `(b, n + k)`; and the
            processed logits that they were drawn from, shape `(b, k, v)`, `None` for a greedy draft.
        """
        device = input_ids.device
        length = input_ids.shape[1]
        self.cache.crop(-max(0, self.cache.get_seq_length() - (length - 1)))
        sequence, logits, states = input_ids, [], []
        for _ in range(min(self.num_assistant_tokens, self.max_sequence_length - length)):
            outputs = self._forward(sequence)
            next_logits = self._padded(outputs.logits[:, -1, : self.target_vocab_size].to(device, torch.float32))
            if self.logits_processor:
                next_logits = self.logits_processor(sequence, next_logits)
            if self.do_sample:
                next_token = torch.multinomial(next_logits.softmax(dim=-1), num_samples=1)
                logits.append(next_logits)
            else:
                next_token = next_logits.argmax(dim=-1, keepdim=True)
            if self.output_states:
                states.append(outputs.hidden_states[-1][:, -1:])
            sequence = torch.cat([sequence, next_token], dim=1)
            if self.eos_token_ids and next_token.item() in self.eos_token_ids:
                break
        if states:
            states.append(self._forward(sequence).hidden_states[-1][:, -1:])
            self.states = torch.cat(states, dim=1)
        return sequence, torch.stack(logits, dim=1) if logits else None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """The draft length is fixed."""

    def _forward(self, sequence: torch.Tensor):
        mask = self.attention_mask
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, sequence.shape[1] - mask.shape[1]), value=1)
        # Where the target has more tokens than the assistant, any other token will do: only the draft gets worse.
        tokens = sequence[:, self.cache.get_seq_length() :].clamp(max=vocab_size(self.assistant_model) - 1)
        return cached_forward(self.assistant_model, tokens, self.cache, mask, output_hidden_states=self.output_states)

    def _padded(self, logits: torch.Tensor) -> torch.Tensor:
        """Pairs may pad one vocabulary to different sizes: tokens that the assistant lacks are never drawn."""
        missing = self.target_vocab_size - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits
