# SPDX-License-Identifier: Apache-2.0
"""Copies of the states that hybrid models have in place of keys and values, or beside them (Qwen3.5, Falcon H1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers.cache_utils import DynamicCache, LinearAttentionLayer


class StateCopies:
    """The states of a cache as they were where all that it held was there to stay: they can go back no further.

    Args:
        cache (`DynamicCache`): of one row, with a state in some of its layers.
        length (`int`): how many tokens it holds, all of them there to stay.

    Attributes:
        length (`int`, *optional*): how many tokens the copies have seen; `None` while they are made.
    """

    length: int | None

    def __init__(self, cache: DynamicCache, length: int):
        self.cache = cache
        for layer in layers_with_states(cache):
            # Stock assisted generation leaves what it needed to take tokens back from convolutions.
            layer.record_past = False
            for i, states in layer.conv_states.items():
                if states is not None:
                    layer.conv_states[i] = states[..., -layer.conv_kernel_size[i] :]
        self._copies: dict[tuple[int, str, int], torch.Tensor] = {}
        self.keep(length)

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
            self.cache.layers = [
                type(x)(x.number_of_states) if isinstance(x, LinearAttentionLayer) else x for x in self.cache.layers
            ]
        for name, states in self._states():
            states.copy_(self._copies[name])

    def leave(self) -> None:
        """Leaves the states for others to go on with, outside of inference mode."""
        for (n, name, i), states in self._states():
            getattr(self.cache.layers[n], name)[i] = states.clone()

    def _states(self) -> Iterator[tuple[tuple[int, str, int], torch.Tensor]]:
        for n, layer in enumerate(self.cache.layers):
            if isinstance(layer, LinearAttentionLayer):
                for name in ("conv_states", "recurrent_states"):
                    states = getattr(layer, name)
                    yield from (((n, name, i), x) for i, x in states.items() if x is not None)


def layers_with_states(cache: DynamicCache) -> list[LinearAttentionLayer]:
    return [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
