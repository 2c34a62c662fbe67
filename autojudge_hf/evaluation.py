# SPDX-License-Identifier: Apache-2.0
"""What a judge costs in accuracy and gains in speed, measured by decoding."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from transformers import GenerationConfig

from .adapter import with_loop
from .checks import NEVER_MINED, check_is_judge, checked_draft_length, checked_judge
from .configuration import public_name
from .early_exit import first_layers
from .generation import judge_decoding
from .measuring import measure_decoding
from .other_tokenizer import is_other_tokenizer
from .supported import DRAFTERS, check_drafters
from .tasks.task import Task, checked_examples


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .modeling import Judge


def evaluate_judge(
    model: PreTrainedModel,
    assistant_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    task: Task,
    judge: Judge,
    *,
    thresholds: Iterable[float | str],
    num_assistant_tokens: int | Literal["adaptive"] | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int,
    batch_size: int = 1,
) -> list[dict[str, Any]]:
    """Decodes a dataset lossless and at each threshold, under the settings that the judge was mined under.

    Args:
        model, tokenizer, dataset, task: as in `mine_mismatches`; `task.is_correct` grades.
        assistant_model (`PreTrainedModel`, *optional*): the drafter; `None` where `model.generation_config` names
            another, by `use_mtp`, `prompt_lookup_num_tokens` or `assistant_early_exit`.
        judge (`Judge`): the judge to measure.
        thresholds (`Iterable[float | str]`): values of `judge_threshold`, or their names in the judge's config.
        num_assistant_tokens (`int` or `"adaptive"`, *optional*): candidates per cycle, the lossless row's included.
        assistant_tokenizer (`PreTrainedTokenizerBase`, *optional*): of an assistant that has another one.
        max_new_tokens (`int`): limit of a response, in tokens.
        batch_size (`int`, *optional*, defaults to 1): prompts decoded at once.

    Returns:
        `list[dict]`: the lossless row, then one per threshold, with `threshold` (`None`: lossless), and what
        [`measure_decoding`] says.

    Raises:
        ValueError: before any decoding, for a judge that doesn't fit, a threshold outside [0, 1], no examples.
    """
    options = {"thresholds": thresholds, "num_assistant_tokens": num_assistant_tokens}
    options |= {"assistant_tokenizer": assistant_tokenizer, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return list(rows_one_by_one(model, assistant_model, tokenizer, dataset, task, judge, **options))


def rows_one_by_one(
    model: PreTrainedModel,
    assistant_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    task: Task,
    judge: Judge,
    *,
    thresholds: Iterable[float | str],
    num_assistant_tokens: int | str | None,
    assistant_tokenizer: PreTrainedTokenizerBase | None,
    lossless: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """The rows of `evaluate_judge` as they are measured; the lossless one may be known already."""
    examples = checked_examples(dataset, task)
    check_is_judge(judge)
    settings = dict(judge.config.decoding_settings)
    if not settings["do_sample"]:
        settings["top_k"] = 50  # `generate`'s default: it warns of any other without sampling
    drafters = {name: getattr(model.generation_config, name) for name in DRAFTERS}
    config = GenerationConfig(**settings, **drafters)
    check_drafters(model, assistant_model, config)
    checked_draft_length(num_assistant_tokens, model, assistant_model, config)
    drafter = assistant_model
    if config.assistant_early_exit is not None:
        drafter = first_layers(model, config.assistant_early_exit)
    pair = model, drafter, config, is_other_tokenizer(tokenizer, assistant_tokenizer)
    values = [checked_judge(judge, threshold, *pair) for threshold in listed(thresholds)]
    measure = functools.partial(measure_decoding, model, tokenizer, examples, task, **options)
    # What mining never has, the model's own config may have.
    settings |= {**dict.fromkeys(NEVER_MINED), "stop_strings": None}
    shared = {**settings, "return_dict_in_generate": True, "assistant_model": assistant_model}
    lossless_loop = functools.partial(
        judge_decoding,
        assistant_model=assistant_model,
        num_assistant_tokens=num_assistant_tokens,
        tokenizer=tokenizer,
        assistant_tokenizer=assistant_tokenizer,
    )
    yield lossless or {"threshold": None, **measure("lossless", **with_loop(model, lossless_loop, shared))}
    for threshold in values:
        loop = functools.partial(lossless_loop, judge=judge, judge_threshold=threshold)
        yield {"threshold": threshold, **measure(f"threshold {threshold:.3g}", **with_loop(model, loop, shared))}


def evaluation_summary(
    rows: Sequence[Mapping[str, Any]],
    *,
    dataset: str,
    split: str,
    num_assistant_tokens: int | Literal["adaptive"] | None = None,
) -> list[dict[str, Any]]:
    """What `evaluate_judge` measured, for `judge.config.evaluation`, and so for the judge's card, plot and metadata.

    Args:
        rows (`Sequence`): of `evaluate_judge`, the lossless one first.
        dataset, split (`str`): Hub id or name of the examples' dataset, and their split.
        num_assistant_tokens (`int`, *optional*): as it was measured with.

    Returns:
        `list[dict]`: per row its `threshold`, `accuracy`, the `drop` from the lossless accuracy with its paired 95 %
        interval (`drop_low`, `drop_high`), `tokens_per_cycle`, `speedup` (tokens per second to lossless),
        `mean_response_length` (tokens), and what the arguments say.
    """
    dataset, split = checked_name(dataset, "dataset"), checked_name(split, "split")
    if isinstance(num_assistant_tokens, numbers.Integral):
        num_assistant_tokens = int(num_assistant_tokens)
    if not rows or rows[0]["threshold"] is not None:
        got = f"that of threshold {rows[0]['threshold']}" if rows else "no rows"
        raise ValueError(f"The first row must be the lossless one, got {got}.")
    lossless = rows[0]
    summary = []
    for row in rows:
        low, high = paired_interval(lossless["correct"], row["correct"])
        summary.append(
            {
                "dataset": dataset,
                "split": split,
                "num_examples": len(row["correct"]),
                "num_assistant_tokens": num_assistant_tokens,
                "threshold": row["threshold"],
                "accuracy": row["accuracy"],
                "drop": lossless["accuracy"] - row["accuracy"],
                "drop_low": low,
                "drop_high": high,
                "tokens_per_cycle": row["tokens_per_cycle"],
                "speedup": row["tokens_per_second"] / lossless["tokens_per_second"],
                "mean_response_length": row["mean_response_length"],
            }
        )
    return summary


def listed(thresholds: Iterable[float | str]) -> list[float | str]:
    if isinstance(thresholds, str) or not isinstance(thresholds, Iterable):
        raise ValueError(f"`thresholds` must be a list, such as [0.05, 0.1], got {thresholds!r:.50}.")
    return list(thresholds)


def checked_name(value: Any, argument: str) -> str:
    """What a judge's card calls it: of a path, the last part. Raises a `ValueError` where there is none."""
    name = public_name(value) if isinstance(value, str) else None
    if not name or not name.strip(" ."):
        raise ValueError(f"`{argument}` must be a name, for the judge's card, got {value!r:.50}.")
    return name


def paired_interval(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """95 % bootstrap interval of `mean(first) - mean(second)` over the same examples."""
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    rng = np.random.default_rng(0)
    # The mean of a bootstrap sample only depends on how often each value is drawn.
    values, counts = np.unique(difference, return_counts=True)
    draws = rng.multinomial(len(difference), counts / len(difference), size=10_000)
    low, high = np.quantile(draws @ values / len(difference), [0.025, 0.975])
    return float(low), float(high)
