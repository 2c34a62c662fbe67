# SPDX-License-Identifier: Apache-2.0
"""Drafting by a model without keys and values of its own, which reads those of the target (Gemma 4's assistants)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .candidate_generator import JudgeCandidateGenerator
from .forward import Pass, positions_of
from .model_properties import input_device


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


class SharedCacheCandidateGenerator(JudgeCandidateGenerator):
    """Drafts from the target's cache, its embeddings, and its last hidden state of the committed text.

    All candidates are drafted from the newest token's position, over the same keys and values; what one candidate
    hands to the next is the assistant's hidden state. The assistant is trained for that, and needs no prefill.

    Args:
        assistant_model, target_model, kwargs: of [`JudgeCandidateGenerator`].
        cache (`Cache`): the target's, from which the loop takes tokens back.
    """

    reads_target_states = True

    def __init__(
        self,
        assistant_model: PreTrainedModel,
        target_model: PreTrainedModel,
        *,
        cache: Cache,
        **kwargs: Any,
    ):
        super().__init__(assistant_model, target_model, cache=cache, **kwargs)
        config = target_model.config.get_text_config(decoder=True)
        own = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
        # The last layer of each kind that has keys and values of its own.
        self._layers = {kind: i for i, kind in enumerate(own)}
        self._embed, self._embedded_on = target_model.get_input_embeddings(), input_device(target_model)
        #: The target's state before the newest token, then the assistant's of each candidate: shape `(b, 1, h)`.
        self._state: torch.Tensor | None = None

    def rewind(
        self,
        num_committed: Sequence[int],
        target_states: torch.Tensor,
        target_layers: Sequence[torch.Tensor] | None,
    ) -> None:
        """Begins the next draft behind what was committed; the loop has taken the cache back."""
        newest = torch.tensor(num_committed, device=target_states.device) - 1
        self._state = target_states[torch.arange(len(newest), device=newest.device), newest][:, None]

    def shrink(self, rows: Sequence[int], unneeded: int) -> None:
        self._state = self._state[list(rows)]

    @torch.inference_mode()
    def _forward(self, tokens: torch.LongTensor, mask: torch.Tensor | None) -> Pass:
        # Embeddings, keys and values it moves to its own device, and its answers back; not mask and positions.
        embeddings = self._embed(tokens.to(self._embedded_on))
        if mask is None:
            positions = torch.full_like(tokens, self._length - 1)
        else:
            # The newest token has no keys yet.
            positions, mask = positions_of(mask)[:, -1:], mask[:, :-1].to(self._device)
        layers = {kind: self.cache.layers[i] for kind, i in self._layers.items()}
        outputs = self.assistant_model(
            inputs_embeds=torch.cat([embeddings, self._state.to(embeddings)], dim=-1),
            attention_mask=mask,
            position_ids=positions.to(self._device),
            shared_kv_states={kind: (layer.keys, layer.values) for kind, layer in layers.items()},
        )
        self._state = outputs.last_hidden_state
        return Pass(outputs.logits, None, None)
