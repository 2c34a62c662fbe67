# SPDX-License-Identifier: Apache-2.0
"""Drafting by the target's own heads for tokens further on (multi-token prediction; DeepSeek-V3, GLM-4.5)."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import transformers
from transformers.cache_utils import MtpCache

from .caches import num_cached, rewind
from .drafter import Drafter, choices
from .model_properties import unwrapped


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_layers import MtpModel


#: A target leaves its heads in its checkpoint; they are read at the first call.
_heads: WeakKeyDictionary[PreTrainedModel, MtpModel] = WeakKeyDictionary()
_loading = threading.Lock()


class MTPCandidateGenerator(Drafter):
    """Drafts a token by each head, which is a layer over the states of the one before, the first over the target's.

    A head's layer reads, beside a token's state, which tokens came behind it, candidates among them, so that the last
    positions are computed again once these are committed or not (arXiv 2412.19437, section 2.2). A longer draft goes
    on with the last head, over its own states. Heads have no notion of padding, and rows run one by one.

    Args:
        target_model (`PreTrainedModel`): whose heads, embeddings and states it drafts with.
        do_sample (`bool`): whether to draw the candidates rather than take the best.
        output_logits (`bool`): whether to return the logits of a greedy draft, too.
    """

    def __init__(self, target_model: PreTrainedModel, *, do_sample: bool, output_logits: bool):
        self.heads = heads_of(unwrapped(target_model))
        self.do_sample, self.output_logits = do_sample, output_logits or do_sample
        self.target_layers = [target_model.config.get_text_config(decoder=True).num_hidden_layers]
        #: For each row, the target's states before the newest token: those of positions that the heads' cache lacks,
        #: and of those that they will read again. Shape `(n, h)`.
        self._states: list[torch.Tensor] | None = None
        self._caches: list[MtpCache] = []
        self._num_drafted = 0

    @torch.inference_mode()
    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        max_candidates: Sequence[int],
        process: Callable[[torch.LongTensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """As [`Drafter.get_candidates`]."""
        self._num_drafted = max(max_candidates)
        if self._num_drafted == 0:
            return input_ids, None
        num_heads = len(self.heads.layers)
        is_text = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
        lengths, tokens, states = is_text.sum(dim=1).tolist(), [], []
        for j, cache in enumerate(self._caches):
            if num_cached(cache) == 0:  # these are of the prefill, padding included
                known = is_text[j, :-1].to(self._states[j].device)
                self._states[j] = self._states[j][-len(known) :][known]
            rewind(cache, [min(num_heads - 1, num_cached(cache))])
            tokens.append(input_ids[j, is_text[j]][None, num_cached(cache) + 1 :])
            states.append(self._states[j][None])
            self._states[j] = self._states[j][max(0, len(self._states[j]) - num_heads + 1) :]
        candidate_ids, logits = input_ids[:, :0], []
        # Heads beyond the draft run too: they share their cache's length.
        for i in range(max(num_heads, self._num_drafted)):
            if i == num_heads:
                states = [of_row[:, -1:] for of_row in states]
                tokens = [of_row[:, -1:] for of_row in tokens]
            head, next_logits = min(i, num_heads - 1), []
            for j, cache in enumerate(self._caches):
                last = lengths[j] + i
                positions = torch.arange(last - tokens[j].shape[1], last, device=states[j].device)[None]
                states[j] = self.heads.forward_layer(head, states[j], positions, cache, input_ids=tokens[j])
                next_logits.append(self.heads._project_to_logits(states[j][:, -1:]))
            of_head = torch.cat(next_logits).to(input_ids.device, torch.float32)
            if process is not None and i < self._num_drafted:
                of_head = process(candidate_ids, of_head)
            chosen = choices(of_head, self.do_sample)
            tokens = [torch.cat([row[:, 1:], chosen[j : j + 1]], dim=1) for j, row in enumerate(tokens)]
            if i < self._num_drafted:
                candidate_ids = torch.cat([candidate_ids, chosen], dim=1)
                logits.append(of_head)
        for cache in self._caches if self._num_drafted > num_heads else ():
            cache.layers[-1].crop(num_heads - self._num_drafted)
        sequence = torch.cat([input_ids, candidate_ids], dim=1)
        return sequence, torch.cat(logits, dim=1) if self.output_logits else None

    def rewind(
        self,
        num_committed: Sequence[int],
        target_states: torch.Tensor | None,
        target_layers: Sequence[torch.Tensor],
    ) -> None:
        """Keeps the states of what was committed: row i went on by `num_committed[i]` tokens."""
        states = target_layers[self.target_layers[0]]
        # The target has read what was the newest token and all candidates.
        ends = [states.shape[1] - (self._num_drafted + 1 - n) for n in num_committed]
        device = self.heads.layers[0].eh_proj.weight.device
        new = [row[:end].to(device) for row, end in zip(states, ends)]
        if self._states is None:
            self._states, self._caches = new, [MtpCache() for _ in new]
        else:
            self._states = [torch.cat(pair) for pair in zip(self._states, new)]
        self._num_drafted = 0

    def shrink(self, rows: Sequence[int], unneeded: int) -> None:
        self._states, self._caches = ([of_rows[j] for j in rows] for of_rows in (self._states, self._caches))


def heads_of(model: PreTrainedModel) -> MtpModel:
    """Of its checkpoint, where the model's last layer is, and in its dtype."""
    from transformers.modeling_layers import MtpModel  # takes longer than all of this library

    if not hasattr(MtpModel, "forward_layer"):
        raise ValueError(
            f"`use_mtp` takes transformers 5.20 or newer, got {transformers.__version__}: this one can't run a head "
            "on its own."
        )
    if not model.config.name_or_path:
        raise ValueError(
            f"`use_mtp` reads a target's heads from its checkpoint, and this {type(model).__name__} has none: load it "
            "with `from_pretrained`."
        )
    like = next(model.get_decoder().layers[-1].parameters())
    device = torch.device("cpu") if like.is_meta else like.device  # of one that is offloaded
    with _loading:  # loading sets the default dtype of the process for a while
        if model not in _heads:
            _heads[model] = MtpModel.from_pretrained(model, device_map={"": device})
    heads = _heads[model]
    # The model may have changed since, and its embeddings and head, which are theirs, may be others.
    heads.tie_with_main_model(model)
    # But not a buffer that grows with the text (dynamic NTK): heads look farther ahead than the target does.
    heads.rotary_emb = copy.deepcopy(heads.rotary_emb)
    own = [heads.layers, heads.shared_post_norm] if heads.use_shared_post_norm else [heads.layers]
    has_changed = heads.layers[0].eh_proj.weight.dtype != model.dtype
    for module in own:
        module.to(device, model.dtype if has_changed else None).eval()
    return heads
