# SPDX-License-Identifier: Apache-2.0
"""Taking tokens and rows back from a cache, be it a growing one or one of a fixed shape."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from .fixed_cache import FixedCache, LayerOfAnother
from .model_properties import goes_on_from_states
from .state_layers import StateLayer, state_layers


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def num_cached(cache: Cache) -> int:
    return cache.length if isinstance(cache, FixedCache) else cache.get_seq_length()


def rewindable_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache from which any number of tokens can be taken back.

    Layers that would forget what leaves a sliding window keep everything; the model's own mask applies the window.

    Raises:
        ValueError: for a model with layers that can't take tokens back.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x for x in cache.layers]
    if other := other_layers(cache, model):
        raise ValueError(
            f"{type(model).__name__} can't take tokens back: expected layers of attention or with a state, its cache "
            f"has {other}."
        )
    make_rewindable(cache)
    return cache


def make_rewindable(cache: DynamicCache) -> None:
    """What it holds is there to stay; what comes can be taken back from all of its layers."""
    length = cache.get_seq_length() if cache.layers else 0
    cache.layers = [StateLayer(x, length) if type(x) is LinearAttentionLayer else x for x in cache.layers]
    cache.activate_past_recording()


def other_layers(cache: Cache, model: PreTrainedModel) -> list[str]:
    """Kinds of the cache's layers from which tokens can't be taken back, or behind which `model` couldn't go on."""
    known = [DynamicLayer, DynamicSlidingWindowLayer, LayerOfAnother]
    known += [LinearAttentionLayer] if goes_on_from_states(model) else []
    return sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in known})


def filled_layers(cache: Cache) -> list[DynamicLayer | StaticLayer]:
    """Those that hold keys and values; some models have fewer than their config says (BART)."""
    layers = (layer for layer in cache.layers if not isinstance(layer, LinearAttentionLayer))
    return [layer for layer in layers if layer.keys is not None]


def rewind(cache: Cache, removed: Sequence[int]) -> None:
    """Takes the last `removed[i]` tokens of row i back; the rows stay aligned at their ends.

    A row that loses more than another moves right, and what wraps round to its front is for the mask to hide. Layers
    with a state go back farther, and with them the others: to where nothing was taken back for the last time.
    """
    least = min(removed)
    if states := state_layers(cache):
        if least > 0:
            _go_back(cache, states)
        else:
            keep(cache)
        return
    if max(removed) > least:

        @functools.cache  # mostly one for all layers
        def sources(heads: int, columns: int, n: int, device: torch.device) -> torch.Tensor:
            shifts = torch.tensor(removed, device=device) - least
            positions = (torch.arange(n, device=device) - shifts[:, None]) % n
            first = columns * torch.arange(len(removed) * heads, device=device).view(-1, heads, 1)
            return (first + positions[:, None]).flatten()

        def moved(x: torch.Tensor, n: int) -> torch.Tensor:
            # Whole vectors are copied, which on a CPU is eight times as fast as `take_along_dim`.
            _, heads, columns, d = x.shape
            vectors = x.reshape(-1, d).index_select(0, sources(heads, columns, n, x.device))
            return vectors.view(len(removed), heads, n, d)

        for layer in filled_layers(cache):
            if isinstance(cache, FixedCache):
                for x in (layer.keys, layer.values):
                    x[: len(removed), :, : cache.length] = moved(x, cache.length)
            else:
                n = layer.keys.shape[2]
                layer.keys, layer.values = moved(layer.keys, n), moved(layer.values, n)
    if isinstance(cache, FixedCache):
        cache.length -= least
        return
    for layer in filled_layers(cache):
        layer.crop(-least)


def keep(cache: Cache) -> None:
    """All that it holds is there to stay."""
    for layer in state_layers(cache):
        layer.keep(num_cached(cache))


def _go_back(cache: DynamicCache, states: list[StateLayer]) -> None:
    for layer in filled_layers(cache):
        layer.crop(states[0].kept_length - layer.get_seq_length())
    for layer in states:
        layer.go_back()


def leave_behind(cache: Cache, length: int) -> None:
    """Leaves a cache of one row for others to go on with: `length` tokens at most, outside of inference mode.

    It holds more where a call was broken off, in some of its layers if that was in a forward.
    """
    if states := state_layers(cache):
        kept = {layer.kept_length for layer in states}
        if len(kept) > 1 or None in kept or max(kept) > length:  # broken off where copies were made, or right behind
            for layer in states:
                layer.forget()
        _go_back(cache, states)
        cache.layers = [x.plain() if isinstance(x, StateLayer) else x for x in cache.layers]
    for layer in filled_layers(cache):
        if (excess := layer.get_seq_length() - length) > 0:
            layer.crop(-excess)
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = False  # or it would forget nothing from now on


def use_up(cache: DynamicCache) -> None:
    """Empties a batch's cache, whose rows took different numbers of tokens back and left one after the other."""
    for layer in cache.layers:
        layer.is_initialized = False  # or tensors would be filled with zeros, and stay
        layer.reset()
        layer.keys = layer.values = None
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = False


def shrink(cache: Cache, rows: Sequence[int], num_columns: int) -> None:
    """Keeps some rows of the batch, and of their positions the last `num_columns`, or none where that is negative."""
    num_columns = max(0, num_columns)
    if isinstance(cache, FixedCache):
        _shrink_fixed(cache, rows, num_columns)
        return
    for layer in filled_layers(cache):
        if len(rows) < layer.keys.shape[0]:
            layer.batch_select_indices(torch.tensor(rows, device=layer.keys.device))
        first = max(0, layer.keys.shape[2] - num_columns)
        layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = num_columns


def _shrink_fixed(cache: FixedCache, rows: Sequence[int], num_columns: int) -> None:
    """What is kept moves to the front."""
    first = max(0, cache.length - num_columns)
    if first == 0 and len(rows) == cache.rows:
        return
    kept = torch.tensor(rows, device=cache.start.device)
    for layer in filled_layers(cache) if cache.length else ():
        for x in (layer.keys, layer.values):
            x[: len(rows), :, : cache.length - first] = x[:, :, first : cache.length].index_select(0, kept)
    cache.rows, cache.length = len(rows), cache.length - first
