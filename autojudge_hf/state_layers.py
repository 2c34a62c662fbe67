# SPDX-License-Identifier: Apache-2.0
"""Layers with a state in place of keys and values, as hybrid models have (Qwen3.5, LFM2, Granite 4)."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicCache, LinearAttentionLayer


class StateLayer(LinearAttentionLayer):
    """A layer that can be taken back, but only to where its states were last copied.

    Args:
        layer (`LinearAttentionLayer`): whose states it goes on with.
        length (`int`): how many tokens these have seen, all of them there to stay.

    Attributes:
        kept_length (`int`, *optional*): how many tokens the copies have seen; `None` while they are made.
    """

    kept_length: int | None

    def __init__(self, layer: LinearAttentionLayer, length: int):
        vars(self).update(vars(layer))
        # Stock assisted generation leaves what it needed to take tokens back from convolutions.
        self.record_past = False
        for i, states in self.conv_states.items():
            if states is not None:
                self.conv_states[i] = states[..., -self.conv_kernel_size[i] :]
        self._copies: dict[tuple[str, int], torch.Tensor] = {}
        self.keep(length)

    @torch.inference_mode()
    def keep(self, length: int) -> None:
        """Copies the states: `length` tokens are there to stay."""
        self.kept_length = None  # or a call that is broken off here would leave some of either
        for name, states in self._states().items():
            if name in self._copies:
                self._copies[name].copy_(states)
            else:
                self._copies[name] = states.clone()
        self.kept_length = length

    def forget(self) -> None:
        """Nothing is there to stay."""
        self.kept_length = 0

    @torch.inference_mode()
    def go_back(self) -> None:
        """To the copies, of which there are none where a first forward was broken off."""
        states = self._states()
        for name, copied in self._copies.items():
            states[name].copy_(copied)

    def plain(self) -> LinearAttentionLayer:
        """The layer as others know it, with tensors outside of inference mode; empty if nothing was there to stay."""
        layer = LinearAttentionLayer(self.number_of_states)
        if self.kept_length:
            vars(layer).update({name: value for name, value in vars(self).items() if name in vars(layer)})
            for (name, i), states in self._states().items():
                getattr(layer, name)[i] = states.clone()
        return layer

    def activate_past_recording(self) -> None:
        """For rows of convolutions alone; copies serve all."""

    def _states(self) -> dict[tuple[str, int], torch.Tensor]:
        both = {"conv_states": self.conv_states, "recurrent_states": self.recurrent_states}
        return {(name, i): x for name, states in both.items() for i, x in states.items() if x is not None}


def state_layers(cache: DynamicCache) -> list[StateLayer]:
    return [layer for layer in cache.layers if isinstance(layer, StateLayer)]
