# SPDX-License-Identifier: Apache-2.0
"""Several texts cached side by side, so that of each only what changed runs through the model again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from .caches import rewindable_cache
from .forward import Pass, cached_forward
from .head_inputs import HeadInputs
from .model_properties import input_device, vocab_size
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
    def run(self, texts: Mapping[int, list[int]], num_last: int, output_states: bool = False) -> Pass:
        """One pass after which all of `texts` is cached; outputs cover at least their last `num_last` tokens."""
        input_ids, mask, cache = self.batch(texts, num_last)
        # Where the target has more tokens than the assistant, any other token will do, as when drafting.
        new = input_ids[:, cache.get_seq_length() :].clamp(max=vocab_size(self.model) - 1)
        with HeadInputs(self.model) as head:
            outputs = cached_forward(self.model, new, cache, mask, num_last, head if output_states else None)
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


def _padded(states: torch.Tensor, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(states, (0, 0, columns - states.shape[2], 0))
