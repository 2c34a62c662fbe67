# SPDX-License-Identifier: Apache-2.0
"""Whether a drafter and a judge fit the models they are used with; what doesn't is refused, or warned of."""

from __future__ import annotations

import functools
import logging
import numbers
from typing import TYPE_CHECKING

from .configuration import checked_threshold, decoding_settings, public_name
from .draft_length import ADAPTIVE, DEFAULT_DRAFT_LENGTH
from .model_properties import drafts_from_target, hidden_size, num_mtp_layers, reads_targets_layers, vocab_size
from .modeling import Judge


if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


logger = logging.getLogger(__name__)

#: Settings that a judge's config doesn't record since mining has none of them, and that change which candidates are
#: mismatches; with what turns each off besides `None`.
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


def checked_draft_length(
    num_assistant_tokens: int | str | None,
    model: PreTrainedModel,
    assistant_model: PreTrainedModel | None,
    generation_config: GenerationConfig | None,
) -> int | str:
    """Candidates per cycle, or `"adaptive"`; the drafter's own number for `num_assistant_tokens=None`.

    Raises:
        ValueError: for no drafter at all, what is neither a positive int nor `"adaptive"`, or more than an assistant's
            block (DFlash).
    """
    use_mtp = getattr(generation_config, "use_mtp", None)
    prompt_lookup = getattr(generation_config, "prompt_lookup_num_tokens", None)
    early_exit = getattr(generation_config, "assistant_early_exit", None)
    if assistant_model is None and prompt_lookup is None and early_exit is None and not use_mtp:
        raise ValueError(
            "Judge decoding needs a drafter: expected `assistant_model=<a smaller model with the same tokenizer>`, "
            "`prompt_lookup_num_tokens=<int>`, `assistant_early_exit=<layers>` or, where the target has heads for "
            "tokens further on, `use_mtp=True`, got None of them."
        )
    default, longest = DEFAULT_DRAFT_LENGTH, None
    if use_mtp:
        default = num_mtp_layers(model)
    elif assistant_model is not None and reads_targets_layers(assistant_model):
        default = longest = assistant_model.config.block_size - 1
    elif assistant_model is not None:
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
    if longest is not None and num_assistant_tokens > longest:
        raise ValueError(
            f"`num_assistant_tokens` must be at most {longest} for a {type(assistant_model).__name__}, which drafts "
            f"blocks of so many, got {num_assistant_tokens}."
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
    has_other_tokenizer: bool = False,
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
    config, use_mtp = judge.config, generation_config.use_mtp
    if use_mtp:
        drafter = "`use_mtp`"
    elif has_other_tokenizer:
        drafter = "an assistant with another tokenizer"
    else:
        drafter = "prompt lookup" if assistant_model is None else type(assistant_model).__name__
    has_no_logits = not use_mtp and (assistant_model is None or has_other_tokenizer)
    if judge.reads_assistant_logits and has_no_logits:
        raise ValueError(
            f"A {judge.judge_type!r} judge reads the assistant's distribution, and {drafter} has none of the target's "
            "tokens. Pass an `assistant_model` with the target's tokenizer, or use a judge that reads the target's "
            "distribution alone, such as `margin`."
        )
    has_no_states = use_mtp or has_no_logits or drafts_from_target(assistant_model)
    if config.assistant_hidden_size is not None and has_no_states:
        raise ValueError(
            f"The judge reads an assistant's hidden states, of size {config.assistant_hidden_size}, and {drafter} has "
            "none of the target's tokens. Pass an `assistant_model` that reads these, or train a judge on the "
            "target's states alone."
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
