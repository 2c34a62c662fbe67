# SPDX-License-Identifier: Apache-2.0
"""Taking tokens and rows back from a cache, be it a growing one or one of a fixed shape."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
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
from .state_copies import StateCopies


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
    cache._state_copies = StateCopies(cache)


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
    least, copies = min(removed), _copies(cache)
    if copies is not None and copies.layers:
        if least > 0:
            go_back(cache)
        else:
            keep(cache)
            _cut_off(cache, copies.length)
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
    keep(cache)


def keep(cache: Cache) -> None:
    """All that it holds is there to stay."""
    if (copies := _copies(cache)) is not None:
        copies.keep(num_cached(cache))


@contextlib.contextmanager
def reading(cache: Cache) -> Iterator[None]:
    """Around a forward: if it is broken off, some layers have read what others haven't."""
    if (copies := _copies(cache)) is None:
        yield
        return
    copies.are_equal = False
    yield
    copies.are_equal = True


def go_back(cache: DynamicCache) -> None:
    """Takes back what came since all was there to stay for the last time."""
    copies = _copies(cache)
    copies.go_back()
    _cut_off(cache, copies.length)


def _copies(cache: Cache) -> StateCopies | None:
    return getattr(cache, "_state_copies", None)


def _cut_off(cache: DynamicCache, length: int) -> None:
    """Leaves the first `length` keys and values. If all are left, sliding layers still forget what they may."""
    for layer in filled_layers(cache):
        excess = layer.get_seq_length() - length
        if isinstance(layer, LinearAttentionLayer):
            DynamicLayer.crop(layer, -excess)  # its own would take states back, too
        else:
            layer.crop(-excess)


def leave_behind(cache: DynamicCache, length: int) -> None:
    """Leaves a cache of one row for others to go on with: `length` tokens at most, outside of inference mode.

    It holds more where a call was broken off, in some of its layers if that was in a forward.
    """
    copies = _copies(cache)
    kept = copies.length or 0  # or broken off while states were copied
    is_ahead = kept > length  # broken off between taking tokens back and committing them
    if copies.layers:
        copies.length = 0 if is_ahead else kept
        go_back(cache)
        copies.leave()
    elif is_ahead and any(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers):
        _cut_off(cache, 0)  # these have forgotten what is needed to go back
    else:
        _cut_off(cache, min(length, num_cached(cache) if copies.are_equal else kept))
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = False  # or it would forget nothing from now on
    for layer in filled_layers(cache):
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    del cache._state_copies


def use_up(cache: DynamicCache) -> None:
    """Empties a batch's cache, whose rows took different numbers of tokens back and left one after the other."""
    for layer in cache.layers:
        layer.is_initialized = False  # or tensors would be filled with zeros, and stay
        layer.reset()
        layer.keys = layer.values = None
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = False
    del cache._state_copies


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
