# SPDX-License-Identifier: Apache-2.0
"""One pass of a model over tokens that follow a cached prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .caches import reading, rewind
from .fixed_cache import FixedCache
from .model_properties import CACHE_NAME, CHOOSES_HIDDEN_STATES, forward_parameters


if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from .head_inputs import HeadInputs


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


def cached_forward(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    cache: Cache,
    attention_mask: torch.Tensor | None = None,
    num_logits: int = 1,
    head: HeadInputs | None = None,
    output_hidden_states: bool | Sequence[int] = False,
) -> Pass:
    """Runs `tokens` through `model` behind what `cache` holds, which then holds them too.

    Args:
        tokens (`torch.LongTensor` of shape `(b, n)`): the new tokens, where the model is, as is the mask.
        cache (`Cache`): keys and values of the prefix; extended in place.
        attention_mask (`torch.LongTensor` of shape `(b, prefix + n)`, *optional*): 0 at padding. `None`: no padding.
        num_logits (`int`): how many last positions get logits and states; not every model can skip the others.
        head ([`HeadInputs`], *optional*): of `model`, to return the last hidden states.
        output_hidden_states (`bool` or `Sequence[int]`): whether to return those of all layers, or of which.

    Returns:
        [`Pass`]; behind a [`FixedCache`] of tensors of its own, else of inference tensors (on small models that is a
        tenth faster than `no_grad`; what a hook keeps of such a forward can't be trained on).
    """
    if isinstance(cache, FixedCache):
        return _fixed_forward(model, tokens, cache, attention_mask, num_logits, head is not None, output_hidden_states)
    captures = True if head is not None and head.are_captured else output_hidden_states
    if not CHOOSES_HIDDEN_STATES:
        captures = bool(captures)
    if head is not None and not head.are_captured:
        head.listen()
    with torch.inference_mode(), reading(cache):
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


def last_chunk(
    model: PreTrainedModel, tokens: torch.Tensor, cache: Cache, attention_mask: torch.Tensor | None, chunk_size: int
) -> torch.Tensor:
    """Runs what stands before the last `chunk_size` tokens, so many at a time, and returns the rest, one at least."""
    while tokens.shape[1] > chunk_size:
        mask = None if attention_mask is None else attention_mask[:, : chunk_size - tokens.shape[1]]
        cached_forward(model, tokens[:, :chunk_size], cache, mask)
        rewind(cache, [0] * len(tokens))  # by nothing: sliding layers forget what they may from one to the next
        tokens = tokens[:, chunk_size:]
    return tokens


@torch.no_grad()
def _fixed_forward(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    cache: FixedCache,
    attention_mask: torch.Tensor | None,
    num_logits: int,
    output_states: bool,
    output_hidden_states: bool | Sequence[int],
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
    # Hooks would be compiled in. The last of these states is what the head reads: see `head_reads_last_states`. That
    # asking, or the prefill, has installed what collects them, which can't be compiled.
    layers = bool(output_states or output_hidden_states)
    outputs = (model if is_prefill else cache.forward)(**inputs, output_hidden_states=layers, return_dict=True)
    cache.length += n

    def own(x: torch.Tensor) -> torch.Tensor:
        # The next replay of a captured graph overwrites what this one returns.
        return x[..., :rows, : x.shape[-2] - (width - n), :].clone()

    states = own(outputs.hidden_states[-1]) if output_states else None
    hidden_states = None
    if output_hidden_states:
        wanted = range(len(outputs.hidden_states)) if output_hidden_states is True else output_hidden_states
        hidden_states = tuple(own(x) if i in wanted else None for i, x in enumerate(outputs.hidden_states))
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
