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
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from .fixed_cache import FixedCache, LayerOfAnother
from .model_properties import goes_on_from_states
from .state_copies import StateCopies, layers_with_states


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
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.activate_past_recording()
    if layers_with_states(cache):
        cache.state_copies = StateCopies(cache, cache.get_seq_length())


def other_layers(cache: Cache, model: PreTrainedModel) -> list[str]:
    """Kinds of the cache's layers from which tokens can't be taken back, or behind which `model` couldn't go on."""
    known = [DynamicLayer, DynamicSlidingWindowLayer, LayerOfAnother]
    if goes_on_from_states(model):
        known += [LinearAttentionLayer, LinearAttentionAndFullAttentionLayer]
    return sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in known})


def filled_layers(cache: Cache) -> list[DynamicLayer | StaticLayer]:
    """Those that hold keys and values; some models have fewer than their config says (BART)."""
    layers = (layer for layer in cache.layers if isinstance(layer, (DynamicLayer, StaticLayer)))
    return [layer for layer in layers if layer.keys is not None]


def rewind(cache: Cache, removed: Sequence[int]) -> None:
    """Takes the last `removed[i]` tokens of row i back; the rows stay aligned at their ends.

    A row that loses more than another moves right, and what wraps round to its front is for the mask to hide. Layers
    with a state go back farther, and with them the others: to where nothing was taken back for the last time.
    """
    least = min(removed)
    if (copies := _copies(cache)) is not None:
        if least > 0:
            copies.go_back()
        else:
            keep(cache)
        _cut_off(cache, copies.length)  # if only by nothing: sliding layers forget what they may from one to the next
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
    if (copies := _copies(cache)) is not None:
        copies.keep(num_cached(cache))


def _copies(cache: Cache) -> StateCopies | None:
    return getattr(cache, "state_copies", None)


def _cut_off(cache: DynamicCache, length: int) -> None:
    """Takes keys and values behind the first `length` back, in layers that hold more."""
    for layer in filled_layers(cache):
        if (excess := layer.get_seq_length() - length) >= 0:
            # A layer with a state as well would take that back in its own way.
            (DynamicLayer if isinstance(layer, LinearAttentionLayer) else type(layer)).crop(layer, -excess)


def leave_behind(cache: Cache, length: int) -> None:
    """Leaves a cache of one row for others to go on with: `length` tokens at most, outside of inference mode.

    It holds more where a call was broken off, in some of its layers if that was in a forward.
    """
    if (copies := _copies(cache)) is not None:
        if copies.length is None or copies.length > length:  # broken off where copies were made, or right behind
            copies.length = 0
        length = copies.length
        copies.go_back()
        copies.leave()
        del cache.state_copies
    _cut_off(cache, length)
    for layer in filled_layers(cache):
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
