# SPDX-License-Identifier: Apache-2.0
"""One pass of a model over tokens that follow a cached prefix, and what decoding has to know of a model."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from .caches import CACHE_NAME, FixedCache


if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache


# These reckon positions from the mask, or from distances alone.
ALIBI = ("bloom", "mpt")


@functools.lru_cache
def _parameters(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def forward_parameters(model: PreTrainedModel) -> frozenset[str]:
    """What a model's forward takes by name; `torch.compile` and PEFT wrap it in one that doesn't say."""
    accepted = _parameters(type(model))
    if "position_ids" in accepted:  # nearly always, and looked up twice a forward
        return accepted
    return _parameters(type(unwrapped(model)))


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """What `torch.compile` and PEFT wrap."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether somebody compiled the model's forward, in one of the three ways that torch has for it."""
    return any(
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or (
            hasattr(module.forward, "_torchdynamo_orig_callable")
            and not getattr(module.forward, "_torchdynamo_disable", False)
        )
        for module in (model, unwrapped(model))
    )


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


class HeadInputs(contextlib.AbstractContextManager):
    """What a model's output embeddings read: the last states, without the cost of capturing every layer's.

    One serves all forwards of a call, since to find the module and hook it for each takes longer than to read it.

    Attributes:
        are_captured (`bool`): whether every layer's have to be captured after all, since a forward that the caller
            compiled may run a graph from before there was a hook.
        newest (`torch.FloatTensor` of shape `(b, n, h)`): what the newest of this thread's forwards read.

    Raises:
        ValueError: for a compiled model whose head reads something else than the last of all layers' states.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self._hook = model, None
        self.are_captured = is_compiled(model)
        if self.are_captured and not head_reads_last_states(model):
            raise ValueError(
                f"The states that a judge reads can't be had from a compiled {type(unwrapped(model)).__name__}. Pass "
                "it as it was before `torch.compile`."
            )

    def listen(self) -> None:
        """Hooks the module, unless that was done; forwards that are compiled never ask for it."""
        if self._hook is None:
            self._hook = _tell_what_the_head_reads(self.model, self._keep)

    def _keep(self, states: torch.Tensor) -> None:
        self.newest = states

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()


def _tell_what_the_head_reads(model: PreTrainedModel, tell: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """A hook for the forwards of this thread; to be removed."""
    thread = threading.get_ident()

    def see(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            tell(inputs[0])

    return model.get_output_embeddings().register_forward_pre_hook(see)


def cached_forward(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    cache: Cache,
    attention_mask: torch.Tensor | None = None,
    num_logits: int = 1,
    head: HeadInputs | None = None,
    output_hidden_states: bool = False,
) -> Pass:
    """Runs `tokens` through `model` behind what `cache` holds, which then holds them too.

    Args:
        tokens (`torch.LongTensor` of shape `(b, n)`): the new tokens, where the model is, as is the mask.
        cache (`Cache`): keys and values of the prefix; extended in place.
        attention_mask (`torch.LongTensor` of shape `(b, prefix + n)`, *optional*): 0 at padding. `None`: no padding.
        num_logits (`int`): how many last positions get logits and states; not every model can skip the others.
        head ([`HeadInputs`], *optional*): of `model`, to return the last hidden states.
        output_hidden_states (`bool`): whether to return those of all layers.

    Returns:
        [`Pass`]; behind a [`FixedCache`] of tensors of its own, else of inference tensors (on small models that is a
        tenth faster than `no_grad`; what a hook keeps of such a forward can't be trained on).
    """
    if isinstance(cache, FixedCache):
        return _fixed_forward(model, tokens, cache, attention_mask, num_logits, head is not None, output_hidden_states)
    captures = output_hidden_states or (head is not None and head.are_captured)
    if head is not None and not head.are_captured:
        head.listen()
    with torch.inference_mode():
        inputs = _model_inputs(model, tokens, cache, num_logits)
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
            inputs |= _position_ids(model, attention_mask, slice(-tokens.shape[1], None))
        elif "position_ids" in forward_parameters(model):
            # Not every model would count them as `generate` does (RoBERTa).
            first = cache.get_seq_length()
            inputs["position_ids"] = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
        outputs = model(**inputs, output_hidden_states=captures, return_dict=True)
    states = head and (outputs.hidden_states[-1] if head.are_captured else head.newest)
    return Pass(outputs.logits, states, outputs.hidden_states)


@torch.no_grad()
def _fixed_forward(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    cache: FixedCache,
    attention_mask: torch.Tensor | None,
    num_logits: int,
    output_states: bool,
    output_hidden_states: bool,
) -> Pass:
    """`cached_forward` in one of the shapes that the cache knows, padded behind rows and tokens.

    A prefill has the shape that it has, and is never compiled. Padding is masked, and what it leaves
    in the cache is overwritten: the next pass begins right behind the tokens.
    """
    rows, n = tokens.shape
    is_prefill = cache.is_prefill(n)
    width = n if is_prefill else min(width for width in cache.widths if width >= n)
    cache.begin(rows, n, attention_mask)
    padded = cache.mask.new_zeros(cache.num_rows, width)
    padded[:rows, :n] = tokens
    inputs = _model_inputs(model, padded, cache, num_logits if is_prefill else width)
    # Copies, since views are told apart by their strides and offsets, and compiled anew.
    positions = _position_ids(model, cache.mask, slice(cache.length, cache.length + width))
    inputs |= {"attention_mask": cache.mask, **{name: ids.clone() for name, ids in positions.items()}}
    # Hooks would be compiled in. The last of these states is what the head reads: see `head_reads_last_states`.
    layers = output_states or output_hidden_states
    outputs = (model if is_prefill else cache.forward)(**inputs, output_hidden_states=layers, return_dict=True)
    cache.length += n

    def own(x: torch.Tensor) -> torch.Tensor:
        # The next replay of a captured graph overwrites what this one returns.
        return x[..., :rows, : x.shape[-2] - (width - n), :].clone()

    states = own(outputs.hidden_states[-1]) if output_states else None
    hidden_states = tuple(map(own, outputs.hidden_states)) if output_hidden_states else None
    return Pass(own(outputs.logits), states, hidden_states)


@torch.no_grad()
def fixed_draft(
    model: PreTrainedModel,
    tokens: torch.LongTensor,
    cache: FixedCache,
    attention_mask: torch.Tensor | None,
    num_candidates: int,
    vocab_size: int,
) -> torch.LongTensor:
    """Drafts greedily, by steps that take nothing from the host and give nothing back to it.

    Args:
        tokens (`torch.LongTensor` of shape `(b, n)`): what `cache` lacks of the committed tokens.
        attention_mask (`torch.LongTensor` of shape `(b, committed)`, *optional*): 0 at padding.
        num_candidates (`int`): the draft's length, at least 1.
        vocab_size (`int`): candidates are among the first so many tokens.

    Returns:
        `torch.LongTensor` of shape `(b, num_candidates)`.
    """
    rows, n = tokens.shape
    first = cache.length + n
    end = first + num_candidates - 1  # the last candidate isn't run through the model
    is_prefill = cache.is_prefill(n)
    if is_prefill:
        logits = _fixed_forward(model, tokens, cache, attention_mask, 1, False, False).logits
        cache.tokens[:rows, first] = logits[:, -1, :vocab_size].argmax(dim=-1)
    else:
        cache.tokens[:rows, cache.length : first] = tokens
    cache.begin(rows, end - cache.length, attention_mask)
    inputs = _model_inputs(model, None, cache, 1)
    has_positions = "position_ids" in forward_parameters(model)
    for i in range(is_prefill, num_candidates):
        num_tokens = n if i == 0 else 1
        step = cache.compiled(_greedy_step, num_tokens)
        step(model, cache, inputs, has_positions, num_tokens, vocab_size)
    cache.length = end
    return cache.tokens[:rows, first : end + 1].clone()


def _greedy_step(
    model: PreTrainedModel, cache: FixedCache, inputs: dict[str, Any], has_positions: bool, n: int, vocab_size: int
) -> None:
    """Reads the `n` newest of the cache's tokens, and writes the one that the model puts behind them."""
    at = torch.arange(n, device=cache.start.device) + cache.start
    inputs = {**inputs, "input_ids": cache.tokens.index_select(1, at), "attention_mask": cache.mask}
    if has_positions:
        inputs["position_ids"] = positions_of(cache.mask).index_select(1, at)
    choices = model(**inputs, return_dict=True).logits[:, -1:, :vocab_size].argmax(dim=-1)
    cache.tokens.index_copy_(1, at[-1:] + 1, choices)
    cache.start.add_(n)


def _model_inputs(
    model: PreTrainedModel, tokens: torch.Tensor | None, cache: Cache, num_logits: int
) -> dict[str, Any]:
    accepted = forward_parameters(model)
    # A model whose code comes from the Hub may go by the old name for longer.
    cache_name = "past_key_values" if "past_key_values" in accepted else CACHE_NAME
    inputs = {"input_ids": tokens, cache_name: cache, "use_cache": True}
    return inputs | ({"logits_to_keep": num_logits} if "logits_to_keep" in accepted else {})


def _position_ids(model: PreTrainedModel, mask: torch.Tensor, columns: slice) -> dict[str, torch.Tensor]:
    """Padding doesn't count."""
    if "position_ids" not in forward_parameters(model):
        return {}
    return {"position_ids": positions_of(mask)[:, columns]}


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Position of each token, padding not counted: shape `(b, n)` to the same."""
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)


#: Of models that were asked already.
_reads_last_states: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
# How compiled forwards run is said for the whole process, and of two threads that say so the last would leave it so.
_asking = threading.Lock()


@torch.no_grad()
def head_reads_last_states(model: PreTrainedModel) -> bool:
    """Whether a model's head reads the last of its hidden states as they are; some scale or mix them first."""
    with _asking:
        if model not in _reads_last_states:
            _reads_last_states[model] = _ask_whether_head_reads_last_states(model)
        return _reads_last_states[model]


def _ask_whether_head_reads_last_states(model: PreTrainedModel) -> bool:
    token, seen = torch.zeros(1, 1, dtype=torch.long, device=input_device(model)), []
    hook = _tell_what_the_head_reads(model, seen.append)
    # Where graphs have no hooks. (To ask for that takes seconds in a process that compiles nothing.)
    uncompiled = torch.compiler.set_stance("force_eager") if is_compiled(model) else contextlib.nullcontext()
    try:
        with uncompiled:
            states = model(input_ids=token, output_hidden_states=True, return_dict=True).hidden_states
    finally:
        hook.remove()
    return states is not None and torch.equal(states[-1], seen[-1])


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether tokens have the positions that a forward is told, or none at all: a model may count for itself."""
    return "position_ids" in forward_parameters(model) or model.config.model_type in ALIBI


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A model of the first `num_layers` layers of `model` and its head, of the same tensors; `model` stays as it is.

    Raises:
        ValueError: for other than 1 to all but one of the layers, or a model whose layers aren't one list.
    """
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    # Modules of its own, since hooks that decoding sets on shared ones would fire for both. Tensors stay the same
    # ones, and so do the caller's hooks, which see every forward, as in stock `generate`.
    shared = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        shared += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    early = copy.deepcopy(model, {id(x): x for x in shared})
    children = early.base_model._modules
    lists = [name for name, x in children.items() if isinstance(x, torch.nn.ModuleList) and len(x) == total]
    # Gemma 3n's embeddings have a part for each layer.
    has_parts = bool(getattr(early.config.get_text_config(decoder=True), "hidden_size_per_layer_input", None))
    if has_parts or len(lists) != 1 or not isinstance(num_layers, int) or not 1 <= num_layers < total:
        raise ValueError(
            f"`assistant_early_exit` must be a number of layers from 1 to {total - 1} of a model with one list of "
            f"layers, and no embeddings of their own, got {num_layers!r} for a {type(model).__name__}."
        )
    children[lists[0]] = children[lists[0]][:num_layers]
    early.config.get_text_config(decoder=True).num_hidden_layers = num_layers
    return early


def input_device(model: PreTrainedModel) -> torch.device:
    """Where to put a model's tokens. Offloaded ones have no device of their own, and take them from anywhere."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


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
    if missing == 0:
        return logits
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing > 0 else logits[..., :size]


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the last hidden state: what the output embeddings read, which may be narrower than the layers (OPT)."""
    width = model.config.get_text_config(decoder=True).hidden_size
    return getattr(model.get_output_embeddings(), "in_features", width)


def eos_token_ids(model: PreTrainedModel) -> set[int]:
    """The tokens that end a response, as the model's generation config lists them."""
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
