# SPDX-License-Identifier: Apache-2.0
"""Drafting a block of tokens in one forward, from the states of some of the target's layers (DFlash)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DFlashCache

from .caches import num_cached, rewind, shrink
from .drafter import Drafter, choices
from .forward import positions_of
from .model_properties import CACHE_NAME, behind_head, input_device


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DFlashCandidateGenerator(Drafter):
    """Fills in the tokens behind the newest one, all at once, and one less than a block (arXiv 2602.06036).

    What the assistant knows of the text are keys and values that it makes of the target's states, and it has neither
    embeddings nor a head of its own: these are the target's.

    Args:
        assistant_model (`PreTrainedModel`): the drafter.
        target_model (`PreTrainedModel`): whose embeddings and head it uses.
        do_sample (`bool`): whether to draw the candidates rather than take the best.
        output_logits (`bool`): whether to return the logits of a greedy draft, too.
    """

    drafts_at_once = True

    def __init__(
        self,
        assistant_model: PreTrainedModel,
        target_model: PreTrainedModel,
        *,
        do_sample: bool,
        output_logits: bool,
    ):
        config = assistant_model.config
        self.assistant_model, self.target_model = assistant_model, target_model
        self.block_size, self.mask_token_id = config.block_size, config.mask_token_id
        self.do_sample, self.output_logits = do_sample, output_logits or do_sample
        self.target_layers = [i + 1 for i in config.target_layer_ids]
        self.cache = DFlashCache()  # without a config, its layers forget nothing
        #: The target's states before the newest token, of all layers that are read: those that the cache lacks, and as
        #: many before as may have to be read again. Shape `(b, n, layers * h)`.
        self._context: torch.Tensor | None = None
        self._num_drafted = 0
        self._device = input_device(assistant_model)

    @torch.inference_mode()
    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        max_candidates: Sequence[int],
        process: Callable[[torch.LongTensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """As [`Drafter.get_candidates`]."""
        self._num_drafted = min(max(max_candidates), self.block_size - 1)
        if self._num_drafted == 0:
            return input_ids, None
        logits = self._logits(input_ids, attention_mask).to(input_ids.device, torch.float32)
        if process is None:
            candidate_ids = choices(logits, self.do_sample)
        else:
            candidate_ids = input_ids[:, :0]
            for i in range(self._num_drafted):
                logits[:, i : i + 1] = process(candidate_ids, logits[:, i : i + 1])
                candidate_ids = torch.cat([candidate_ids, choices(logits[:, i : i + 1], self.do_sample)], dim=1)
        return torch.cat([input_ids, candidate_ids], dim=1), logits if self.output_logits else None

    def rewind(
        self,
        num_committed: Sequence[int],
        target_states: torch.Tensor | None,
        target_layers: Sequence[torch.Tensor],
    ) -> None:
        """Keeps the states of what was committed: row i went on by `num_committed[i]` tokens.

        Rows stay aligned at their ends: one that went on by less than another will have some of its states, and so
        keys and values, made anew.
        """
        dtype = self.assistant_model.dtype
        # Layers may be on different devices.
        new = torch.cat([target_layers[i].to(self._device, dtype) for i in self.target_layers], dim=-1)
        context = new if self._context is None else torch.cat([self._context, new], dim=1)
        # The target has read what was the newest token and all candidates; those that weren't committed are the last.
        dropped = [self._num_drafted + 1 - n for n in num_committed]
        context = context[:, : context.shape[1] - min(dropped)]
        if max(dropped) > min(dropped):
            context = torch.stack([row.roll(n - min(dropped), dims=0) for row, n in zip(context, dropped)])
        self._context = context
        rewind(self.cache, [max(num_committed) - n for n in num_committed])

    def shrink(self, rows: Sequence[int], unneeded: int) -> None:
        self._context = self._context[list(rows)]
        shrink(self.cache, rows, num_cached(self.cache) - unneeded)

    def _logits(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Of the tokens behind the newest, shape `(b, k, v)`."""
        cached = num_cached(self.cache)
        noise_ids = input_ids.new_full((len(input_ids), self.block_size), self.mask_token_id)
        noise_ids[:, 0] = input_ids[:, -1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.nn.functional.pad(mask, (0, self.block_size - 1), value=1).to(self._device)
        num_new = input_ids.shape[1] - 1 - cached
        self.cache.set_previous_accepted_tokens(num_new)
        outputs = self.assistant_model(
            noise_embeds=self._embedded(noise_ids).to(self._device, self.assistant_model.dtype),
            context_hidden_states=self._context[:, -num_new:],
            position_ids=positions_of(mask)[:, cached:],
            attention_mask=None if attention_mask is None else mask,
            **{CACHE_NAME: self.cache},
        )
        rewind(self.cache, [self.block_size] * len(input_ids))
        # A row may have to have so many made anew, if another's whole draft is accepted and nothing of its own.
        self._context = self._context[:, -self.block_size :].clone()
        states = outputs.last_hidden_state[:, 1 : self._num_drafted + 1]
        head = self.target_model.get_output_embeddings()
        # Of one that is offloaded, hooks bring the weights.
        device = states.device if head.weight.is_meta else head.weight.device
        return behind_head(self.target_model, head(states.to(device, self.target_model.dtype)))

    def _embedded(self, tokens: torch.LongTensor) -> torch.Tensor:
        """As the assistant was trained to read them: without the norm that Muse Glimmer has behind its embeddings."""
        embeddings, tokens = self.target_model.get_input_embeddings(), tokens.to(input_device(self.target_model))
        if hasattr(embeddings, "embed_norm"):
            return torch.nn.functional.embedding(tokens, embeddings.weight)
        return embeddings(tokens)
