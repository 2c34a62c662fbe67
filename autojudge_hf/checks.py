# SPDX-License-Identifier: Apache-2.0
"""What judge decoding refuses, or warns of, before any forward."""

from __future__ import annotations

import functools
import logging
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from .caches import CACHE_NAME, other_layers
from .configuration import checked_threshold, decoding_settings, public_name
from .draft_length import ADAPTIVE, DEFAULT_DRAFT_LENGTH
from .forward import hidden_size, positions_of, takes_positions, vocab_size
from .modeling import Judge


if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer


logger = logging.getLogger(__name__)

# Pairs with one tokenizer pad its vocabulary to different sizes, Qwen2.5's by 128. Tokenizers differ by more.
LARGEST_PADDING = 1024
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
    "use_mtp": (False, "`use_mtp`"),
    "speculation_type": (None, "`speculation_type`"),
    "assistant_ensemble_weight": (None, "`assistant_ensemble_weight`"),
}
#: More settings that change which candidates are mismatches, with what turns each off besides `None`. Mining has none.
NEVER_MINED = {
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "sequence_bias": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "min_length": 0,
    "min_new_tokens": 0,
}
# XLM and CPM-Ant add tokens that nobody passes, GIT those of an image where there is a mask; Moshi forgets what leaves
# its window, and its mask doesn't say so; ProphetNet reads one new token at a time; Dory adds layers to its cache.
UNLIKE_THEIR_TEXT = ("xlm", "flaubert", "cpmant", "git", "moshi", "prophetnet", "dory")
WITHOUT_CACHES = ("openai-gpt", "reformer", "xlnet")
# These say that they aren't decoders, and are.
DECODERS_ANYWAY = ("gpt_neox", "gpt_neox_japanese")


def checked_draft_length(
    num_assistant_tokens: int | str | None,
    assistant_model: PreTrainedModel | None,
    generation_config: GenerationConfig | None,
) -> int | str:
    """Candidates per cycle, or `"adaptive"`; the drafter's own number for `num_assistant_tokens=None`.

    Raises:
        ValueError: for no drafter at all, or what is neither a positive int nor `"adaptive"`.
    """
    prompt_lookup = getattr(generation_config, "prompt_lookup_num_tokens", None)
    early_exit = getattr(generation_config, "assistant_early_exit", None)
    if assistant_model is None and prompt_lookup is None and early_exit is None:
        raise ValueError(
            "Judge decoding needs a drafter: expected `assistant_model=<a smaller model with the same tokenizer>`, "
            "`prompt_lookup_num_tokens=<int>` or `assistant_early_exit=<layers>`, got None of them."
        )
    default = DEFAULT_DRAFT_LENGTH
    if assistant_model is not None:
        default = assistant_model.generation_config.num_assistant_tokens or default
    elif prompt_lookup is not None:
        default = prompt_lookup
    else:
        default = generation_config.num_assistant_tokens or default
    if num_assistant_tokens == ADAPTIVE:
        return ADAPTIVE
    if num_assistant_tokens is None:
        num_assistant_tokens = int(default)
    is_number = isinstance(num_assistant_tokens, numbers.Integral) and not isinstance(num_assistant_tokens, bool)
    if not is_number or num_assistant_tokens < 1:
        raise ValueError(
            f"`num_assistant_tokens` must be an int of at least 1 or {ADAPTIVE!r}, got {num_assistant_tokens!r}."
        )
    return int(num_assistant_tokens)


def check_is_judge(judge: object) -> None:
    if not isinstance(judge, Judge):
        raise ValueError(
            f"`judge` must be a judge, got {type(judge).__name__}. Load one with `AutoJudge.from_pretrained(...)`."
        )


def checked_judge(
    judge: Judge | None,
    judge_threshold: float | str | None,
    model: PreTrainedModel,
    assistant_model: PreTrainedModel | None,
    generation_config: GenerationConfig,
) -> float:
    """The threshold to decode with, after checking that the judge fits the pair.

    Raises:
        ValueError: for something else than a judge, a judge of other hidden sizes or of states that nobody computes, a
            threshold outside [0, 1] or a name that its config doesn't have.
    """
    if judge is None:
        if judge_threshold is not None:
            raise ValueError(f"`judge_threshold={judge_threshold}` needs a `judge`, got None.")
        return 0.0
    check_is_judge(judge)
    config = judge.config
    if judge.reads_assistant_logits and assistant_model is None:
        raise ValueError(
            f"A {judge.judge_type!r} judge reads the assistant's distribution, and prompt lookup has none. Pass an "
            "`assistant_model`, or use a judge that reads the target's alone, such as `margin`."
        )
    if config.assistant_hidden_size is not None and assistant_model is None:
        raise ValueError(
            f"The judge reads an assistant's hidden states, of size {config.assistant_hidden_size}, and prompt lookup "
            "has none. Pass an `assistant_model`, or train a judge on the target's states alone."
        )
    pair = (("target", config.hidden_size, model), ("assistant", config.assistant_hidden_size, assistant_model))
    for name, size, part in pair:
        if size is not None and size != hidden_size(part):
            raise ValueError(
                f"The judge doesn't fit this {name}: it was trained on hidden states of size {size}, and the {name}'s "
                f"have {hidden_size(part)}. It was made for {config.base_model_name_or_path} with "
                f"{config.assistant_model_name_or_path}: use that pair, or train a judge for this one."
            )
    if isinstance(judge_threshold, str):
        threshold = config.threshold_named(judge_threshold)
    elif judge_threshold is not None:
        threshold = checked_threshold(judge_threshold, "judge_threshold")
    else:
        threshold = checked_threshold(config.threshold, "judge.config.threshold")
    if unknown := [token for token in config.important_token_ids if token >= vocab_size(model)]:
        raise ValueError(
            f"`important_token_ids` of the judge has {unknown[:5]}, which aren't among the target's "
            f"{vocab_size(model)} tokens. Take them from its tokenizer: `symbol_token_ids(tokenizer)`."
        )
    if threshold > 0.0 and judge.reads_states:
        _warn_of_another_pair(judge, model, assistant_model)
        _warn_of_other_settings(judge, generation_config)
    return threshold


def _warn_of_another_pair(judge: Judge, model: PreTrainedModel, assistant_model: PreTrainedModel | None) -> None:
    config = judge.config
    others = []
    for role, trained, part in (
        ("target", config.base_model_name_or_path, model),
        ("assistant", config.assistant_model_name_or_path, assistant_model),
    ):
        actual = public_name(part.config.name_or_path) if part is not None else None
        # A local copy of "user/model" is called "model".
        if trained and actual and trained.rsplit("/", 1)[-1] != actual.rsplit("/", 1)[-1]:
            others.append(f"{role} {actual} (mined with {trained})")
    if others:
        warn_once(
            f"The judge was trained for another pair: {', '.join(others)}. Which mismatches are harmless differs from "
            "pair to pair: measure its accuracy with `evaluate_judge`, or train a judge for this pair."
        )


def _warn_of_other_settings(judge: Judge, generation_config: GenerationConfig) -> None:
    mined, actual = judge.config.decoding_settings, decoding_settings(generation_config)
    differences = [f"{name}={actual[name]} (mined: {mined[name]})" for name in actual if mined[name] != actual[name]]
    for name, off in NEVER_MINED.items():
        if (value := getattr(generation_config, name, None)) not in (None, off):
            differences.append(f"{name}={value!r:.50} (mined: {off})")
    if differences:
        warn_once(
            "The judge was mined under other decoding settings, so its threshold may not mean the same here: "
            + ", ".join(differences)
            + ". Pass the mined values to `generate`, or mine under these."
        )


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


def check_supported(
    model: PreTrainedModel,
    assistant_model: PreTrainedModel | None,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> None:
    """Raises one `ValueError` that lists everything about the call that judge decoding can't do."""
    models = [model] if assistant_model is None else [model, assistant_model]
    cache = model_kwargs.get(CACHE_NAME)
    mask = model_kwargs.get("attention_mask")
    # A single prompt may have gaps: `generate` masks whatever looks like padding in it.
    is_padded_behind = mask is not None and not mask[:, -1].all()
    is_padded_behind |= mask is not None and len(mask) > 1 and bool((mask[:, 1:] < mask[:, :-1]).any())
    lacks_text = _lacks_text(input_ids, mask, cache)
    layers = other_layers(cache) if type(cache) is DynamicCache else []
    # `generate` has made an empty one of its own, in whose place comes ours.
    is_static = generation_config.cache_implementation == "static" and type(cache) is StaticCache
    known = {CACHE_NAME, "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
    known |= {"output_hidden_states", "output_attentions"}  # also in the config, which is what counts
    other = sorted(k for k, v in model_kwargs.items() if k not in known and not _says_nothing(k, v, model))
    config = generation_config
    drafters = {
        "assistant_model": assistant_model,
        "prompt_lookup_num_tokens": config.prompt_lookup_num_tokens,
        "assistant_early_exit": config.assistant_early_exit,
    }
    given = [name for name, value in drafters.items() if value is not None]
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
        "streamers with several prompts": len(input_ids) > 1 and streamer is not None,
        "`use_cache=False`, or a model that has no cache": cache is None,
        f"the cache {type(cache).__name__}": not is_static and cache is not None and type(cache) is not DynamicCache,
        f"the cache's {', '.join(layers)}": bool(layers),
        "offloaded caches": bool(getattr(cache, "offloading", False)),
        "`cache_implementation='static'` with `assistant_early_exit`": is_static and bool(config.assistant_early_exit),
        f"two drafters at once ({', '.join(given)})": len(given) > 1,
        f"the model inputs {other}": bool(other),
    }
    for name, (off, reason) in REFUSED_SETTINGS.items():
        reasons[reason] = getattr(config, name, None) not in (None, off)
    _refuse(reasons)
    if assistant_model is not None and abs(vocab_size(model) - vocab_size(assistant_model)) > LARGEST_PADDING:
        raise ValueError(
            f"The models have different vocabularies: {vocab_size(model)} tokens in the target's, "
            f"{vocab_size(assistant_model)} in the assistant's. Expected one tokenizer (the padding of its embeddings "
            "may differ). Use an assistant of the target's own family."
        )
    if config.compile_config is not None and not is_static:
        warn_once("Only fixed shapes are compiled: `compile_config` needs `cache_implementation='static'`.")


def check_models(*models: PreTrainedModel) -> None:
    """Raises one `ValueError` for models that judge decoding can't do, whatever the call."""
    _refuse(_reasons_of_models(models))


def _reasons_of_models(models: Sequence[PreTrainedModel]) -> dict[str, bool]:
    return {
        "encoder-decoder models": any(m.config.is_encoder_decoder for m in models),
        "stateful models, which can't take tokens back": any(m._is_stateful for m in models),
        "models sharded by FSDP or ZeRO-3: ranks differ in their number of forwards": _is_sharded(models),
        "encoders, which see what follows (for a decoder, set `is_decoder=True` in its config)": any(
            # Any config may have been given one; whose class says so goes by it.
            not getattr(type(m.config), "is_decoder", True)
            and not m.config.is_decoder
            and m.config.model_type not in DECODERS_ANYWAY
            for m in models
        ),
        "models whose forward isn't of the text alone": any(m.config.model_type in UNLIKE_THEIR_TEXT for m in models),
        "models that cache no keys and values": any(m.config.model_type in WITHOUT_CACHES for m in models),
    }


def _refuse(reasons: dict[str, bool]) -> None:
    if refused := [reason for reason, applies in reasons.items() if applies]:
        raise ValueError("Judge decoding doesn't support: " + "; ".join(refused) + ".")


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


def _lacks_text(input_ids: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> bool:
    if type(cache) is not DynamicCache or cache.get_seq_length() == 0:
        return False
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
