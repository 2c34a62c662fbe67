# SPDX-License-Identifier: Apache-2.0
"""What judge decoding refuses, before any forward: models, and ways to call them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from .caches import other_layers
from .checks import warn_once
from .forward import positions_of
from .model_properties import (
    CACHE_NAME,
    drafts_from_target,
    goes_on_from_states,
    hidden_size,
    keeps_states,
    num_mtp_layers,
    reads_targets_cache,
    reads_targets_layers,
    takes_positions,
    unwrapped,
    vocab_size,
)
from .state_copies import layers_with_states


if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer


# Pairs with one tokenizer pad its vocabulary to different sizes, Qwen2.5's by 128. Tokenizers differ by more.
LARGEST_PADDING = 1024
#: Settings of a `GenerationConfig` that name a drafter.
DRAFTERS = ("use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit")
#: Settings of a `GenerationConfig` that ask for another way of decoding: what turns each off besides `None`, and what
#: it is called. Some are younger than the oldest transformers this runs on.
REFUSED_SETTINGS = {
    "num_beams": (1, "beam search"),
    "num_return_sequences": (1, "`num_return_sequences` above 1"),
    "penalty_alpha": (0, "contrastive search (`penalty_alpha`)"),
    "dola_layers": (None, "`dola_layers`"),
    "constraints": (None, "`constraints`"),
    "force_words_ids": (None, "`force_words_ids`"),
    "guidance_scale": (1, "`guidance_scale`"),
    "watermarking_config": (None, "watermarks"),
    "output_attentions": (False, "`output_attentions`"),
    "assistant_ensemble_weight": (None, "`assistant_ensemble_weight`"),
}
# XLM and CPM-Ant add tokens that nobody passes, GIT those of an image where there is a mask; Moshi forgets what leaves
# its window, and its mask doesn't say so; ProphetNet reads one new token at a time; Dory adds layers to its cache.
UNLIKE_THEIR_TEXT = ("xlm", "flaubert", "cpmant", "git", "moshi", "prophetnet", "dory")
WITHOUT_CACHES = ("openai-gpt", "reformer", "xlnet")
# Whose keys and values an assistant may read.
SHARING_THEIR_CACHE = ("gemma4", "gemma3n")
# These say that they aren't decoders, and are.
DECODERS_ANYWAY = ("gpt_neox", "gpt_neox_japanese")


def check_supported(
    model: PreTrainedModel,
    assistant_model: PreTrainedModel | None,
    has_other_tokenizer: bool,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> None:
    """Raises one `ValueError` that lists everything about the call that judge decoding can't do."""
    models = [model] if assistant_model is None else [model, assistant_model]
    cache = model_kwargs.get(CACHE_NAME)
    mask = model_kwargs.get("attention_mask")
    with_states = [m for m in models if keeps_states(m)]
    # A single prompt may have gaps: `generate` masks whatever looks like padding in it.
    is_padded_behind = mask is not None and not mask[:, -1].all()
    is_padded_behind |= mask is not None and len(mask) > 1 and bool((mask[:, 1:] < mask[:, :-1]).any())
    is_of_earlier_call = type(cache) is DynamicCache and cache.get_seq_length() > 0
    lacks_text = is_of_earlier_call and _lacks_text(input_ids, mask, cache)
    layers = other_layers(cache, model) if type(cache) is DynamicCache else []
    # `generate` has made an empty one of its own, in whose place comes ours.
    is_static = generation_config.cache_implementation == "static" and type(cache) is StaticCache
    known = {CACHE_NAME, "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
    known |= {"output_hidden_states", "output_attentions"}  # also in the config, which is what counts
    other = sorted(k for k, v in model_kwargs.items() if k not in known and not _says_nothing(k, v, model))
    config = generation_config
    told = _told_by_peft(model)
    shares_cache = assistant_model is not None and reads_targets_cache(assistant_model)
    reads_layers = assistant_model is not None and reads_targets_layers(assistant_model)
    reads_prompt = bool(config.output_hidden_states or reads_layers or config.use_mtp)
    chunk_size = config.prefill_chunk_size
    reasons = {
        **_reasons_of_models(models),
        "prompts padded on the right or within (set `padding_side='left'`)": is_padded_behind,
        "a cache with the new tokens alone (pass the whole text, what is cached included)": lacks_text,
        "`position_ids` of your own": not lacks_text
        and _has_own_positions(input_ids, mask, model_kwargs.get("position_ids")),
        "texts that grow past the length at which RoPE changes (LongRoPE, dynamic NTK)": _outgrows_rope(
            model, input_ids, mask, config
        ),
        "batches of models whose `forward` takes no `position_ids`": len(input_ids) > 1
        and not all(map(takes_positions, models)),
        "`adapter_names` for several prompts, which would stay where they are when a row ends (pass one prompt at a "
        "time; and as PEFT leaves its hooks in a model where a call fails, load it again)": len(input_ids) > 1
        and "adapter_names" in told,
        "activated LoRA (aLoRA), which goes by the number of tokens of a forward": "alora_offsets" in told,
        "several prompts, or padding, for a model that keeps a state": bool(with_states)
        and (len(input_ids) > 1 or (mask is not None and not mask.all())),
        "an `assistant_tokenizer` for an assistant that keeps a state": has_other_tokenizer
        and assistant_model in with_states,
        "streamers with several prompts": len(input_ids) > 1 and streamer is not None,
        "`use_cache=False`, or a model that has no cache": cache is None,
        f"the cache {type(cache).__name__}": not is_static and cache is not None and type(cache) is not DynamicCache,
        f"the cache's {', '.join(layers)}": bool(layers),
        "a cache without the states that the model keeps (make it with `DynamicCache(config=model.config)`)": (
            model in with_states and type(cache) is DynamicCache and not layers_with_states(cache)
        ),
        "offloaded caches": bool(getattr(cache, "offloading", False)),
        "`cache_implementation='static'` with `assistant_early_exit`": is_static and bool(config.assistant_early_exit),
        "`cache_implementation='static'` with an assistant that reads the target's cache": is_static and shares_cache,
        "an `assistant_tokenizer` without an `assistant_model`": has_other_tokenizer and assistant_model is None,
        "an assistant that reads the target's cache or states, and another `assistant_tokenizer`": has_other_tokenizer
        and (shares_cache or reads_layers),
        "a cache of an earlier call with a drafter that reads the target's states (DFlash, `use_mtp`)": (
            reads_layers or bool(config.use_mtp)
        )
        and is_of_earlier_call,
        f"`prefill_chunk_size={chunk_size!r}`, which must be an int of at least 1": chunk_size is not None
        and not (type(chunk_size) is int and chunk_size >= 1),
        "`prefill_chunk_size` where a prompt's states are kept or read (`output_hidden_states`, DFlash, `use_mtp`)": (
            chunk_size is not None and reads_prompt
        ),
        f"`speculation_type={config.speculation_type!r}` with this assistant": config.speculation_type is not None
        and not (config.speculation_type == "dflash" and reads_layers),
        f"the model inputs {other}": bool(other),
        **_reasons_of_drafters(model, assistant_model, config),
    }
    for name, (off, reason) in REFUSED_SETTINGS.items():
        reasons[reason] = getattr(config, name, None) not in (None, off)
    _refuse(reasons)
    if shares_cache:
        _check_shares_cache(model, assistant_model)
    if reads_layers:
        check_reads_layers(model, assistant_model)
    if assistant_model is not None and not has_other_tokenizer and not reads_layers:
        check_one_vocabulary(model, assistant_model)
    if config.compile_config is not None and not is_static:
        warn_once("Only fixed shapes are compiled: `compile_config` needs `cache_implementation='static'`.")
    owner = _who_prepares_inputs(model)
    if owner.__module__.split(".")[0] != "transformers":
        warn_once(
            f"{owner.__name__} has a `prepare_inputs_for_generation` of its own, which judge decoding doesn't call. "
            "See whether `judge_threshold=0.0` gives what greedy decoding gives."
        )


def _check_shares_cache(model: PreTrainedModel, assistant_model: PreTrainedModel) -> None:
    wanted, actual = assistant_model.config.backbone_hidden_size, hidden_size(model)
    if not model.config.model_type.startswith(SHARING_THEIR_CACHE) or wanted != actual:
        raise ValueError(
            f"{type(assistant_model).__name__} reads the cache and the states of the model it was made for: expected "
            f"a target of the Gemma 4 family with states of size {wanted}, got {type(model).__name__} with {actual}. "
            "Use the assistant that was published for this target."
        )


def check_models(*models: PreTrainedModel) -> None:
    """Raises one `ValueError` for models that judge decoding can't do, whatever the call."""
    _refuse(_reasons_of_models(models))


def check_is_model(assistant_model: Any) -> None:
    if not isinstance(assistant_model, torch.nn.Module):
        raise ValueError(
            f"`assistant_model` must be a model, got {type(assistant_model).__name__}. Load one with "
            "`AutoModelForCausalLM.from_pretrained(...)`."
        )


def check_one_vocabulary(model: PreTrainedModel, assistant_model: PreTrainedModel) -> None:
    """Raises a `ValueError` for models whose tokens can't be the same ones."""
    if abs(vocab_size(model) - vocab_size(assistant_model)) > LARGEST_PADDING:
        raise ValueError(
            f"The models have different vocabularies: {vocab_size(model)} tokens in the target's, "
            f"{vocab_size(assistant_model)} in the assistant's. Expected one tokenizer (the padding of its embeddings "
            "may differ). Mining needs an assistant of the target's own family; `generate` takes others too, with "
            "both `tokenizer` and `assistant_tokenizer`."
        )


def check_reads_layers(model: PreTrainedModel, assistant_model: PreTrainedModel) -> None:
    """Raises a `ValueError` for an assistant that reads layers (DFlash) which aren't those of this target."""
    its, config = assistant_model.config, model.config.get_text_config(decoder=True)
    if not its.target_layer_ids or min(its.target_layer_ids) < 0 or its.mask_token_id < 0 or its.block_size < 2:
        raise ValueError(
            f"The config of {type(assistant_model).__name__} must have `target_layer_ids` and a `mask_token_id` of at "
            f"least 0 and a `block_size` of at least 2, got {its.target_layer_ids}, {its.mask_token_id} and "
            f"{its.block_size}."
        )
    embeddings, deepest = model.get_input_embeddings(), max(its.target_layer_ids)
    sizes = {config.hidden_size, hidden_size(model), embeddings.embedding_dim}
    if sizes != {its.hidden_size} or deepest >= config.num_hidden_layers or its.mask_token_id >= vocab_size(model):
        raise ValueError(
            f"{type(assistant_model).__name__} reads the states of the model it was made for: expected a target with "
            f"states of size {its.hidden_size}, more than {deepest} layers and a token {its.mask_token_id}, got "
            f"{type(model).__name__} with {' and '.join(map(str, sorted(sizes)))}, {config.num_hidden_layers} layers "
            f"and {vocab_size(model)} tokens. Use the assistant that was published for this target."
        )
    has_streams = getattr(config, "altup_num_inputs", 1) > 1
    _refuse(
        {
            "this assistant for a target whose states have several streams (Gemma 3n)": has_streams,
            "this assistant for an offloaded target with a norm behind its embeddings": embeddings.weight.is_meta
            and hasattr(embeddings, "embed_norm"),
        }
    )


def check_drafters(
    model: PreTrainedModel, assistant_model: PreTrainedModel | None, generation_config: GenerationConfig
) -> None:
    """Raises a `ValueError` for several drafters at once, and for a target that can't be its own."""
    _refuse(_reasons_of_drafters(model, assistant_model, generation_config))


def check_reads_text(assistant_model: PreTrainedModel | None) -> None:
    """Raises a `ValueError` for an assistant that has no features of its own."""
    if assistant_model is None or drafts_from_target(assistant_model):
        raise ValueError(
            f"Features of the assistant need one that reads the text, got {type(assistant_model).__name__}. Pass such "
            "an `assistant_model`, or leave `assistant_states` and `assistant_logit_features` out."
        )


def _reasons_of_drafters(
    model: PreTrainedModel, assistant_model: PreTrainedModel | None, config: GenerationConfig
) -> dict[str, bool]:
    drafters = {name: getattr(config, name) for name in DRAFTERS}
    drafters |= {"assistant_model": assistant_model, "use_mtp": config.use_mtp or None}
    given = sorted(name for name, value in drafters.items() if value is not None)
    return {
        f"two drafters at once ({', '.join(given)})": len(given) > 1,
        "`assistant_early_exit` for a model that keeps a state": config.assistant_early_exit is not None
        and keeps_states(model),
        f"`use_mtp` for {type(model).__name__}, whose config has no `num_mtp_layers`": bool(config.use_mtp)
        and not num_mtp_layers(model),
    }


def _reasons_of_models(models: Sequence[PreTrainedModel]) -> dict[str, bool]:
    return {
        "encoder-decoder models": any(m.config.is_encoder_decoder for m in models),
        "stateful models, which can't take tokens back": any(
            m._is_stateful and not goes_on_from_states(m) for m in models
        ),
        "models sharded by FSDP or ZeRO-3: ranks differ in their number of forwards": _is_sharded(models),
        "encoders, which see what follows (for a decoder, set `is_decoder=True` in its config)": any(
            # Any config may have been given one; whose class says so goes by it.
            not getattr(type(m.config), "is_decoder", True)
            and not m.config.is_decoder
            and m.config.model_type not in DECODERS_ANYWAY
            for m in models
        ),
        "prompt learning (PEFT), whose prompts it would leave out": _learned_its_prompt(models[0]),
        "models whose forward isn't of the text alone": any(m.config.model_type in UNLIKE_THEIR_TEXT for m in models),
        "assistants without a cache of their own as targets": reads_targets_cache(models[0]),
        "models that cache no keys and values": any(m.config.model_type in WITHOUT_CACHES for m in models),
    }


def _refuse(reasons: dict[str, bool]) -> None:
    if refused := [reason for reason, applies in reasons.items() if applies]:
        raise ValueError("Judge decoding doesn't support: " + "; ".join(refused) + ".")


def _told_by_peft(model: PreTrainedModel) -> set[str]:
    """What PEFT tells its layers of this call, by hooks: each row's adapter, or where an activated LoRA begins."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return {name for hook in hooks if isinstance(hook, functools.partial) for name in hook.keywords}


def _learned_its_prompt(model: PreTrainedModel) -> bool:
    """Whether PEFT puts learned tokens in front; while it generates, by a method it lends the model inside."""
    lent = vars(model).get("prepare_inputs_for_generation")
    is_wrapper = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    return is_wrapper or getattr(lent, "__self__", model) is not model


def _who_prepares_inputs(model: PreTrainedModel) -> type:
    return next(c for c in type(unwrapped(model)).__mro__ if "prepare_inputs_for_generation" in vars(c))


def _says_nothing(name: str, value: Any, model: PreTrainedModel) -> bool:
    """Models of images get an empty dict of them with a text, and types of tokens that are all a text's."""
    is_of_types = name == "mm_token_type_ids" or (name == "token_type_ids" and model.config.model_type == "gemma3")
    if is_of_types and isinstance(value, torch.Tensor):
        return not value.any()
    return value is None or (isinstance(value, dict) and not value)


def _is_sharded(models: Sequence[PreTrainedModel]) -> bool:
    """Whether a forward waits for the other processes', for which `generate` turns `synced_gpus` on."""
    is_sharded = is_deepspeed_zero3_enabled() or any(is_fsdp_managed_module(m) for m in models)
    return is_sharded and torch.distributed.get_world_size() > 1


def _has_own_positions(input_ids: torch.Tensor, mask: torch.Tensor | None, position_ids: torch.Tensor | None) -> bool:
    """Whether somebody passed other positions than `generate` makes. (Those of images have three dimensions.)"""
    if position_ids is None or position_ids.ndim != 2 or input_ids.shape[1] == 0:  # embeddings in the text's place
        return False
    mask = input_ids.new_ones(input_ids.shape) if mask is None else mask
    columns = slice(-min(position_ids.shape[1], mask.shape[1]), None)
    is_other = positions_of(mask)[:, columns] != position_ids[:, columns]
    return bool((is_other & (mask[:, columns] != 0)).any())


def _lacks_text(input_ids: torch.Tensor, mask: torch.Tensor | None, cache: DynamicCache) -> bool:
    length = input_ids.shape[1]
    return cache.get_seq_length() >= length or (mask is not None and mask.shape[1] != length)


def _outgrows_rope(
    model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor | None, generation_config: GenerationConfig
) -> bool:
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("longrope", "dynamic") or generation_config.max_length is None:
        return False
    columns = input_ids.shape[1]
    shortest, longest = (columns, columns) if mask is None else (int(mask.sum(1).min()), int(mask.sum(1).max()))
    longest += generation_config.max_length - columns
    if rope["rope_type"] == "dynamic":
        # From there on every length has rotations of its own, and a batch those of its longest row.
        return len(input_ids) > 1 and longest > config.max_position_embeddings
    limit = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    # There they change once, and a plain `generate` begins anew without its cache.
    return shortest <= limit < longest
