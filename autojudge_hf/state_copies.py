# SPDX-License-Identifier: Apache-2.0
"""Copies of the states that hybrid models have in place of keys and values, or beside them (Qwen3.5, Falcon H1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers.cache_utils import DynamicCache, LinearAttentionLayer


class StateCopies:
    """How much of a cache is there to stay, and its states as they were then: these can go back no further.

    Args:
        cache (`DynamicCache`): all of what it holds is there to stay.

    Attributes:
        layers (`list[LinearAttentionLayer]`): those with a state; most models have none.
        length (`int`, *optional*): how many tokens are there to stay; `None` while the states are copied.
        are_equal (`bool`): whether all layers of the cache have read as many tokens.
    """

    length: int | None

    def __init__(self, cache: DynamicCache):
        # And not the cache, which holds this object, and would be freed late.
        self.layers = layers_with_states(cache)
        for layer in self.layers:
            # Stock assisted generation leaves what it needed to take tokens back from convolutions, or too little.
            layer.record_past = False
            for i, states in layer.conv_states.items():
                if states is not None:
                    size = layer.conv_kernel_size[i]
                    states = torch.nn.functional.pad(states, (max(0, size - states.shape[-1]), 0))
                    layer.conv_states[i] = states[..., -size:]
        self.are_equal = True
        self._copies: dict[tuple[int, str, int], torch.Tensor] = {}
        self.keep(cache.get_seq_length() if cache.layers else 0)

    @torch.inference_mode()
    def keep(self, length: int) -> None:
        """Copies the states: `length` tokens are there to stay."""
        self.length = None  # or a call that is broken off here would leave some of either
        for name, states in self._states():
            if name in self._copies:
                self._copies[name].copy_(states)
            else:
                self._copies[name] = states.clone()
        self.length = length

    @torch.inference_mode()
    def go_back(self) -> None:
        """To the copies, or to layers that have seen nothing where nothing was there to stay."""
        if not self.length:
            for layer in self.layers:
                vars(layer).update(vars(type(layer)(layer.number_of_states)))
        for name, states in self._states():
            states.copy_(self._copies[name])

    def leave(self) -> None:
        """Leaves the states for others to go on with, outside of inference mode."""
        for (n, name, i), states in self._states():
            getattr(self.layers[n], name)[i] = states.clone()

    def _states(self) -> Iterator[tuple[tuple[int, str, int], torch.Tensor]]:
        for n, layer in enumerate(self.layers):
            for name in ("conv_states", "recurrent_states"):
                states = getattr(layer, name)
                yield from (((n, name, i), x) for i, x in states.items() if x is not None)


def layers_with_states(cache: DynamicCache) -> list[LinearAttentionLayer]:
    return [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
