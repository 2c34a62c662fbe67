# SPDX-License-Identifier: Apache-2.0
"""Caches of a fixed shape, for forwards that are compiled once; they outlive the call."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers import cache_utils
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer
from transformers.generation import CompileConfig

from .model_properties import CACHE_NAME


if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


#: Holds nothing: its layer reads the keys and values of one before (Gemma 3n and 4). Younger than the oldest
#: transformers this runs on, where such layers have no place in a cache.
LayerOfAnother: type | None = getattr(cache_utils, "DummyLayer", None)
#: How models are compiled, unless the caller says: captured as graphs, since on a GPU launches take the most time.
#: A single token's products do nothing but read weights, and kernels that are tuned for that do it faster.
COMPILE_CONFIG = CompileConfig(dynamic=False)
ONE_TOKEN_CONFIG = CompileConfig(
    dynamic=False, mode=None, options={"triton.cudagraphs": True, "coordinate_descent_tuning": True}
)


class FixedLayer(StaticLayer):
    """Writes where its cache says; a static layer counts for itself, so that every layer would have to be set back.

    Args:
        max_length (`int`): positions there is room for.
        start (`torch.LongTensor` of shape `()`): position of the next token, shared by all layers of a cache.
    """

    def __init__(self, max_length: int, start: torch.Tensor):
        super().__init__(max_cache_len=max_length)
        self.start = start

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        positions = torch.arange(key_states.shape[2], device=self.device) + self.start
        self.keys.index_copy_(2, positions, key_states)
        self.values.index_copy_(2, positions, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> torch.Tensor:
        return self.start


class FixedCache(StaticCache):
    """Keys and values in tensors that neither grow nor move, for forwards that are compiled once for their shape.

    Layers with a sliding window keep everything; the model's own mask applies the window.

    Args:
        model (`PreTrainedModel`): whose cache it is.
        num_rows (`int`): rows of every forward. The first `rows` of them count.
        max_length (`int`): positions there is room for.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int, max_length: int):
        super().__init__(config=model.config.get_text_config(decoder=True), max_cache_len=max_length)
        #: On the device, so that a captured graph finds them: where the next tokens go, which positions aren't
        #: padding, and, for a draft, the tokens.
        self.start = torch.zeros((), dtype=torch.long, device=model.device)
        self.mask = torch.zeros(num_rows, max_length, dtype=torch.long, device=model.device)
        self.tokens = torch.zeros_like(self.mask)
        for tensor in (self.start, self.mask, self.tokens):
            torch._dynamo.mark_static_address(tensor)
        self.layers = [FixedLayer(max_length, self.start) for _ in self.layers]
        self.num_rows, self.max_length = num_rows, max_length
        self.made_for, self.is_inference = _made_for(model), torch.is_inference_mode_enabled()
        #: Tokens cached, on the host, and in how many rows.
        self.length, self.rows = 0, num_rows
        #: How many tokens a forward may have; any other number is padded, or a prefill.
        self.widths: Sequence[int] = ()
        #: The model, compiled or not, while a call has the cache.
        self.forward: Callable[..., Any] | None = None
        #: How it is compiled; `None` where it isn't.
        self.compile_config: CompileConfig | None = None
        self._compiled: dict[tuple[Callable[..., Any], int], Callable[..., Any]] = {}
        self.is_taken = False

    def begin(self, rows: int, n: int, attention_mask: torch.Tensor | None) -> None:
        """Before forwards of `n` tokens: says where these go, and which positions up to there aren't padding.

        What `attention_mask` is too short for is none.
        """
        self.rows, end = rows, self.length + n
        self.start.fill_(self.length)
        self.mask.zero_()
        self.mask[:, :end] = 1
        if attention_mask is not None:
            self.mask[:rows, : attention_mask.shape[1]] = attention_mask.to(self.mask.device)

    def compile_with(self, compile_config: CompileConfig | None) -> None:
        """Says how the model is compiled, in this call and in those that follow."""
        if self.compile_config != compile_config:
            self.compile_config, self._compiled = compile_config, {}

    def compiled(self, function: Callable[..., Any], n: int) -> Callable[..., Any]:
        """What runs the model on `n` tokens of each row, compiled if the model is."""
        if self.compile_config is None:
            return function
        key = function, n
        if key not in self._compiled:
            is_ours_for_one = self.compile_config == COMPILE_CONFIG and self.num_rows * n == 1
            config = ONE_TOKEN_CONFIG if is_ours_for_one else self.compile_config
            self._compiled[key] = torch.compile(function, **config.to_dict())
        return self._compiled[key]

    def is_prefill(self, n: int) -> bool:
        """Whether a forward of `n` tokens has a shape of its own."""
        return self.length == 0 or n > max(self.widths)

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_taken:
            raise ValueError("A static cache of judge decoding is the next call's, and can't be continued from.")
        return super().update(*args, **kwargs)

    def clear(self) -> None:
        """Holds nothing: not even what isn't finite, which a mask doesn't hide."""
        self.length = 0
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys.zero_()
                layer.values.zero_()


#: What outlives the call, newest last: the addresses are in the captured graphs, which for other ones are made anew.
kept_caches: WeakKeyDictionary[PreTrainedModel, list[FixedCache]] = WeakKeyDictionary()
# A model may be its own assistant, and calls may take turns in two batch sizes.
_NUM_KEPT = 2
_keeping = threading.Lock()
_GRANULARITY = 256
# Shapes times rows times models; behind the limit of 8, dynamo runs what it doesn't know eagerly from then on.
_RECOMPILE_LIMIT = 64


def take_fixed_cache(
    num_rows: int,
    generation_config: GenerationConfig,
    model: PreTrainedModel,
    length: int,
    widths: Sequence[int],
) -> FixedCache:
    """An empty cache with room for `length` tokens and a forward of any of the widths behind them.

    The smallest that is large enough of those that the model's last calls gave back, if one is for as many rows. Until
    it's given back it belongs to this call. For models of fixed shapes only: see [`why_not_fixed`].
    """
    length += max(widths)
    is_inference = torch.is_inference_mode_enabled()
    with _keeping:
        kept = [cache for cache in kept_caches.get(model, []) if cache.made_for == _made_for(model)]
        alike = [cache for cache in kept if (cache.num_rows, cache.is_inference) == (num_rows, is_inference)]
        fitting = [cache for cache in reversed(alike) if cache.max_length >= length]
        cache = min(fitting, key=lambda cache: cache.max_length, default=None)
        # Room for the one that this call gives back.
        kept_caches[model] = [other for other in kept if other is not cache][1 - _NUM_KEPT :]
    if cache is None:
        # Another size is compiled anew.
        length = max([length, *(2 * smaller.max_length for smaller in alike)])
        cache = FixedCache(model, num_rows, -(-length // _GRANULARITY) * _GRANULARITY)
    cache.clear()
    cache.widths, cache.forward, cache.is_taken = widths, model, True
    if generation_config.compile_config is not None:
        # Who passes one wants it, on a CPU too, where stock `generate` would not.
        generation_config = copy.copy(generation_config)
        generation_config.compile_config = copy.copy(generation_config.compile_config)
        generation_config.compile_config._compile_all_devices = True
    compile_config = None
    # Before torch 2.13 CUDA graphs belong to one thread, and another's replays would overwrite what it reads.
    is_safe = model.device.type != "cuda" or threading.current_thread() is threading.main_thread()
    if is_safe and model._valid_auto_compile_criteria({CACHE_NAME: cache}, generation_config):
        compile_config = generation_config.compile_config or COMPILE_CONFIG
        cache.forward = model.get_compiled_call(compile_config)
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, _RECOMPILE_LIMIT)
    cache.compile_with(compile_config)
    return cache


def give_fixed_cache_back(model: PreTrainedModel, cache: FixedCache) -> None:
    cache.forward, cache.is_taken = None, False  # or it would keep the model alive
    with _keeping:
        kept_caches[model] = [*kept_caches.get(model, []), cache][-_NUM_KEPT:]


def _made_for(model: PreTrainedModel) -> tuple:
    """What a model's keys and values depend on: once it has changed, caches made before are of no use."""
    return model.config.get_text_config(decoder=True).num_hidden_layers, model.device, model.dtype


def why_not_fixed(model: PreTrainedModel) -> str | None:
    """Why a model's forward can't have a shape that doesn't grow with the text; `None` where it can."""
    if model.device.type == "meta":
        return "is offloaded"
    if len(set(getattr(model, "hf_device_map", {"": 0}).values())) > 1:
        return 'is spread over several devices (load it on one, `device_map={"": 0}`, if it fits)'
    if torch.is_autocast_enabled(model.device.type):  # keys and values may differ in dtype
        return "runs under autocast"
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):  # which takes the mask to end with the newest token
        return f'has {attention!r} kernels (load it with `attn_implementation="sdpa"`)'
    layers = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=1).layers
    is_attention = all(type(x) in (StaticLayer, StaticSlidingWindowLayer, LayerOfAnother) for x in layers)
    if not model._can_compile_fullgraph or not is_attention:
        return "has a forward that doesn't compile as a whole, or layers other than attention's"
    return None
