# SPDX-License-Identifier: Apache-2.0
"""Several texts cached side by side, so that of each only what changed runs through the model again."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicCache

from .caches import go_back, keep, num_cached, rewindable_cache
from .forward import Pass, cached_forward
from .head_inputs import HeadInputs
from .model_properties import input_device, keeps_states, vocab_size
from .rows import left_padded


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Prefixes:
    """A model's keys and values of several texts, so that of each only what changed is computed again."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        #: By name of the text: its tokens, and of layers that hold any the keys and values, `(1, heads, length, d)`.
        self._cached: dict[int, tuple[list[int], dict[int, tuple[torch.Tensor, torch.Tensor]]]] = {}

    def forget(self, name: int) -> None:
        self._cached.pop(name, None)

    def share(self, name: int, other: int) -> None:
        """Has `other` start with what is cached of the text `name`."""
        self._cached[other] = self._cached[name]

    def batch(
        self, texts: Mapping[int, list[int]], num_last: int
    ) -> tuple[torch.LongTensor, torch.LongTensor | None, Cache]:
        """The texts, padded on the left, their mask (`None` for one), and a new cache.

        The cache holds all columns but the last `num_last`, or more where a text has changed before these.
        """
        input_ids, mask = left_padded(list(texts.values()))
        columns = input_ids.shape[1]
        num_new = max(len(tokens) - self._num_shared(i, tokens, num_last) for i, tokens in texts.items())
        cache = rewindable_cache(self.model)
        if columns > num_new:
            kept = [(self._cached[i][1], max(0, len(tokens) - num_new)) for i, tokens in texts.items()]
            for layer in kept[0][0]:
                keys, values = (
                    torch.cat([_padded(states[layer][kind][:, :, :n], columns - num_new) for states, n in kept])
                    for kind in (0, 1)
                )
                cache.update(keys, values, layer)
        device = input_device(self.model)
        return input_ids.to(device), mask.to(device) if len(texts) > 1 else None, cache

    @torch.inference_mode()
    def run(
        self,
        texts: Mapping[int, list[int]],
        num_last: int,
        output_states: bool = False,
        output_layers: Sequence[int] = (),
    ) -> Pass:
        """One pass after which all of `texts` is cached; outputs cover at least their last `num_last` tokens.

        `output_layers`: of which layers hidden states are wanted, too.
        """
        input_ids, mask, cache = self.batch(texts, num_last)
        new = self._known(input_ids[:, cache.get_seq_length() :])
        with HeadInputs(self.model) as head:
            head = head if output_states else None
            outputs = cached_forward(self.model, new, cache, mask, num_last, head, output_layers or False)
        for row, (name, tokens) in enumerate(texts.items()):
            here = slice(row, row + 1), slice(None), slice(input_ids.shape[1] - len(tokens), None)
            layers = {i: layer for i, layer in enumerate(cache.layers) if layer.keys is not None}
            self._cached[name] = list(tokens), {i: (x.keys[here], x.values[here]) for i, x in layers.items()}
        return outputs

    def _num_shared(self, name: int, tokens: list[int], num_last: int) -> int:
        """Of the text without its last `num_last` tokens, how many are cached."""
        cached = self._cached[name][0] if name in self._cached else []
        limit = min(len(cached), len(tokens) - num_last)
        return next((n for n in range(limit) if cached[n] != tokens[n]), max(0, limit))

    def _known(self, tokens: torch.LongTensor) -> torch.LongTensor:
        """Where the target has more tokens than the assistant, any other token will do, as when drafting."""
        return tokens.clamp(max=vocab_size(self.model) - 1)


class HybridPrefixes(Prefixes):
    """The same for a model that keeps states: one text after the other, each with a cache of its own.

    A state goes back no further than to its copy, which is made before the last tokens of a run: these may change.
    """

    _cached: dict[int, tuple[list[int], DynamicCache]]

    def batch(self, texts: Mapping[int, list[int]], num_last: int) -> tuple[torch.LongTensor, None, Cache]:
        """As [`Prefixes.batch`], for one text; the cache may hold less."""
        ((name, tokens),) = texts.items()
        return torch.tensor([tokens], device=input_device(self.model)), None, self._cache(name, tokens, num_last)

    @torch.inference_mode()
    def run(
        self,
        texts: Mapping[int, list[int]],
        num_last: int,
        output_states: bool = False,
        output_layers: Sequence[int] = (),
    ) -> Pass:
        """As [`Prefixes.run`]; in a row of fewer tokens than `num_last`, zeros stand before them."""
        passes = []
        with HeadInputs(self.model) as head:
            head = head if output_states else None
            for name, tokens in texts.items():
                input_ids, _, cache = self.batch({name: tokens}, num_last)
                new = self._known(input_ids[:, num_cached(cache) :])
                if new.shape[1] > num_last:
                    cached_forward(self.model, new[:, :-num_last], cache)
                keep(cache)
                last = new[:, -num_last:]
                passes.append(cached_forward(self.model, last, cache, None, num_last, head, output_layers or False))
                self._cached[name] = list(tokens), cache

        def joined(of_rows: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
            if of_rows[0] is None:
                return None
            return torch.cat([_padded(x[:, -num_last:], num_last) for x in of_rows])

        layers = zip(*(row.hidden_states or () for row in passes))
        states = joined([row.states for row in passes])
        return Pass(joined([row.logits for row in passes]), states, tuple(map(joined, layers)) or None)

    def _cache(self, name: int, tokens: list[int], num_last: int) -> DynamicCache:
        """A copy of what is cached of a text that became `tokens`, without the last `num_last` of these, or less."""
        if name not in self._cached:
            return rewindable_cache(self.model)
        cache, num_shared = copy.deepcopy(self._cached[name][1]), self._num_shared(name, tokens, num_last)
        if num_cached(cache) > num_shared:
            go_back(cache)
        return cache if num_cached(cache) <= num_shared else rewindable_cache(self.model)


def prefixes_of(model: PreTrainedModel) -> Prefixes:
    return (HybridPrefixes if keeps_states(model) else Prefixes)(model)


def _padded(states: torch.Tensor, columns: int) -> torch.Tensor:
    """Of shape `(..., n, d)` to `(..., columns, d)`, with zeros in front."""
    return torch.nn.functional.pad(states, (0, 0, columns - states.shape[-2], 0))
