# SPDX-License-Identifier: Apache-2.0
"""One pass of a model over tokens that follow a cached prefix, and what decoding has to know of a model."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What `generate` calls a cache: `past_key_values` until transformers 5.23.
CACHE_NAME = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"


@functools.lru_cache
def _forward_parameters(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def rewindable_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache from which any number of tokens can be taken back.

    Layers that would forget what leaves a sliding window keep everything; the model's own mask applies the window.

    Raises:
        ValueError: for a model with layers that can't take tokens back (convolutions, recurrences).
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    cache.layers = [DynamicLayer() if type(x) is DynamicSlidingWindowLayer else x for x in cache.layers]
    if other := other_layers(cache):
        raise ValueError(
            f"{type(model).__name__} can't take tokens back: expected attention layers only, its cache has {other}."
        )
    return cache


def other_layers(cache: Cache) -> list[str]:
    """Kinds of the cache's layers that aren't attention's, whose rows can't take different numbers of tokens back."""
    attention = (DynamicLayer, DynamicSlidingWindowLayer)
    return sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in attention})


def rewind(cache: Cache, removed: Sequence[int]) -> None:
    """Takes the last `removed[i]` tokens of row i back; the rows stay aligned at their ends.

    A row that loses more than another moves right, and what wraps round to its front is for the mask to hide.
    """
    least = min(removed)
    if max(removed) > least:

        @functools.cache  # mostly one for all layers
        def sources(heads: int, n: int, device: torch.device) -> torch.Tensor:
            shifts = torch.tensor(removed, device=device) - least
            positions = (torch.arange(n, device=device) - shifts[:, None]) % n
            first = n * torch.arange(len(removed) * heads, device=device).view(-1, heads, 1)
            return (first + positions[:, None]).flatten()

        def moved(x: torch.Tensor) -> torch.Tensor:
            # Whole vectors are copied, which on a CPU is eight times as fast as `take_along_dim`.
            _, heads, n, d = x.shape
            return x.reshape(-1, d).index_select(0, sources(heads, n, x.device)).view_as(x)

        for layer in cache.layers:
            layer.keys, layer.values = moved(layer.keys), moved(layer.values)
    cache.crop(-least)


def as_normal_tensors(cache: Cache) -> None:
    """Makes what was computed in inference mode usable anywhere: others may go on with the cache."""
    for layer in cache.layers:
        if layer.get_seq_length() > 0:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def shrink(cache: Cache, rows: Sequence[int], num_columns: int) -> None:
    """Keeps some rows of the batch, and of their positions the last `num_columns`, or none where that is negative."""
    num_columns = max(0, num_columns)
    for layer in cache.layers:
        if layer.get_seq_length() > 0:
            if len(rows) < layer.keys.shape[0]:
                layer.batch_select_indices(torch.tensor(rows, device=layer.keys.device))
            first = max(0, layer.keys.shape[2] - num_columns)
            layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = num_columns


class Pass(NamedTuple):
    """What one forward gives; `logits` and `states` may cover more positions than asked for: index from the end.

    Attributes:
        logits (`torch.FloatTensor` of shape `(b, n, v)`).
        states (`torch.FloatTensor` of shape `(b, n, h)`, *optional*): the last hidden states, which the head reads.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*): those of every layer, for every token.
    """

    logits: torch.Tensor
    states: torch.Tensor | None
    hidden_states: tuple[torch.Tensor, ...] | None


@contextlib.contextmanager
def _head_inputs(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects what the output embeddings read: the last states, without the cost of capturing every layer's."""
    thread, seen = threading.get_ident(), []

    def see(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            seen.append(inputs[0])

    hook = model.get_output_embeddings().register_forward_pre_hook(see)
    try:
        yield seen
    finally:
        hook.remove()


@torch.inference_mode()
def cached_forward(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    cache: Cache,
    attention_mask: torch.Tensor | None = None,
    num_logits: int = 1,
    output_states: bool = False,
    output_hidden_states: bool = False,
) -> Pass:
    """Runs `tokens` through `model` behind what `cache` holds, which then holds them too.

    Args:
        tokens (`torch.LongTensor` of shape `(b, n)`): the new tokens.
        cache (`Cache`): keys and values of the prefix; extended in place.
        attention_mask (`torch.LongTensor` of shape `(b, prefix + n)`, *optional*): 0 at padding. `None`: no padding.
        num_logits (`int`): how many last positions get logits and states; not every model can skip the others.
        output_states (`bool`): whether to return the last hidden states.
        output_hidden_states (`bool`): whether to return those of all layers.

    Returns:
        [`Pass`] of inference tensors (on small models that is a tenth faster than `no_grad`).
    """
    accepted = _forward_parameters(type(model))
    # A model whose code comes from the Hub may go by the old name for longer.
    cache_name = "past_key_values" if "past_key_values" in accepted else CACHE_NAME
    inputs: dict[str, Any] = {"input_ids": tokens.to(model.device), cache_name: cache, "use_cache": True}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask.to(model.device)
        if "position_ids" in accepted:
            positions = (inputs["attention_mask"].long().cumsum(dim=-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -tokens.shape[1] :]
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = num_logits
    with _head_inputs(model) if output_states else contextlib.nullcontext([None]) as seen:
        outputs = model(**inputs, output_hidden_states=output_hidden_states, return_dict=True)
    return Pass(outputs.logits, seen[0], outputs.hidden_states)


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A model of the first `num_layers` layers of `model` and its head, of the same tensors; `model` stays as it is.

    Raises:
        ValueError: for other than 1 to all but one of the layers, or a model whose layers aren't one list.
    """
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    # Modules of its own, since hooks on shared ones would fire for both; the tensors stay the same ones.
    early = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    children = early.base_model._modules
    lists = [name for name, x in children.items() if isinstance(x, torch.nn.ModuleList) and len(x) == total]
    if len(lists) != 1 or not isinstance(num_layers, int) or not 1 <= num_layers < total:
        raise ValueError(
            f"`assistant_early_exit` must be a number of layers from 1 to {total - 1} of a model with one list of "
            f"layers, got {num_layers!r} for a {type(model).__name__} with {len(lists)}."
        )
    children[lists[0]] = children[lists[0]][:num_layers]
    early.config.get_text_config(decoder=True).num_hidden_layers = num_layers
    return early


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence the model has positions for, or `None` where its config doesn't say."""
    config = model.config.get_text_config(decoder=True)
    # MPT's has another name.
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def vocab_size(model: PreTrainedModel) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def of_vocabulary(logits: torch.Tensor, size: int) -> torch.Tensor:
    """Logits for `size` tokens. Pairs may pad one vocabulary to different sizes; a token that lacks has no chance."""
    missing = size - logits.shape[-1]
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing > 0 else logits[..., :size]


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the last hidden state: what the output embeddings read."""
    return model.config.get_text_config(decoder=True).hidden_size


def eos_token_ids(model: PreTrainedModel) -> set[int]:
    """The tokens that end a response, as the model's generation config lists them."""
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
