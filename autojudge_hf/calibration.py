# SPDX-License-Identifier: Apache-2.0
"""A judge's thresholds, chosen by the accuracy that they cost."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from .checks import check_is_judge
from .configuration import checked_threshold
from .evaluation import checked_name, evaluation_summary, listed, rows_one_by_one
from .tasks import Task


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .modeling import Judge


logger = logging.getLogger(__name__)


def calibrate_threshold(
    model: PreTrainedModel,
    assistant_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    task: Task,
    judge: Judge,
    *,
    thresholds: Sequence[float],
    max_drops: Mapping[str, float] = MappingProxyType({"1 point": 0.01, "5 points": 0.05}),
    confidence: float = 0.975,
    lossless: dict[str, Any] | None = None,
    dataset_name: str,
    split: str = "validation",
    num_assistant_tokens: int | Literal["adaptive"] | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int,
    batch_size: int = 1,
) -> list[dict[str, Any]]:
    """Chooses a judge's thresholds by the accuracy that they cost, measured by decoding.

    Tries thresholds from the lowest up; each budget gets the last one before its drop is no longer sure to stay within
    the budget. Since the first that doesn't ends the walk, trying many thresholds makes none of them pass by luck
    (fixed-sequence testing): in about a share `confidence` of all samples of problems the true drop is within the
    budget. [`is_within_budget`] tests a single threshold. Where there are too few problems for any threshold
    to pass, a warning says how many it takes.

    Sets `judge.config.threshold` (the first budget's) and `judge.config.thresholds` (all of them, by name, for
    `generate(judge_threshold="5 points")`), and puts the curve into `judge.config.evaluation`.

    Args:
        model, assistant_model, tokenizer, dataset, task, judge: as in `evaluate_judge`. Neither the judge's training
            examples nor those that its results will be reported on.
        thresholds (`Sequence[float]`): values to try.
        max_drops (`Mapping[str, float]`, *optional*): names and budgets, shares of all examples that may be lost.
            Defaults to `"1 point"` and `"5 points"`.
        confidence (`float`, *optional*, defaults to 0.975): how sure to be of a budget, one-sided: 0.975 is the upper
            end of a 95 % interval. Lower ones gain more and keep their promise less often; below 0.95, with some
            hundred examples, even less often than they say.
        lossless (`dict`, *optional*): the first row that an earlier call returned for these examples and this draft
            length, where several judges are calibrated on them.
        dataset_name, split (`str`): for `evaluation_summary`.
        num_assistant_tokens, assistant_tokenizer, max_new_tokens, batch_size: as in `evaluate_judge`.

    Returns:
        `list[dict]`: the rows of `evaluate_judge` up to the threshold at which the last budget was missed.

    Raises:
        ValueError: before any decoding, as `evaluate_judge`.
    """
    thresholds = sorted(checked_threshold(threshold, "thresholds") for threshold in listed(thresholds))
    if not thresholds:
        raise ValueError("Expected at least one of `thresholds` to try, got none.")
    if not isinstance(max_drops, Mapping) or not max_drops or not all(isinstance(name, str) for name in max_drops):
        raise ValueError(f"`max_drops` must map names to budgets, such as {{'1 point': 0.01}}, got {max_drops!r}.")
    if wrong := [v for v in max_drops.values() if not isinstance(v, (int, float)) or not 0.0 < v < 1.0]:
        raise ValueError(
            f"Budgets are shares of all examples, 0.01 for 1 point; got {wrong} in `max_drops`. (No sample can be "
            "sure of a drop of 0: for that there is `judge_threshold=0.0`.)"
        )
    if not 0.5 <= confidence < 1.0:
        raise ValueError(f"`confidence` must be at least 0.5 and below 1, got {confidence!r}.")
    check_is_judge(judge)
    replace(judge.config)  # what is wrong with it is told now
    dataset_name, split = checked_name(dataset_name, "dataset_name"), checked_name(split, "split")
    dataset = list(dataset)
    if lossless is not None and (lossless["threshold"] is not None or len(lossless["correct"]) != len(dataset)):
        raise ValueError(
            f"`lossless` must be the lossless row of these {len(dataset)} examples, got one of "
            f"{len(lossless['correct'])} at threshold {lossless['threshold']}."
        )
    # With a drop of just the budget, so many may all keep their answers by luck.
    z = NormalDist().inv_cdf(confidence)
    needed = {name: math.ceil(z**2 * (1 - budget) / budget) for name, budget in max_drops.items()}
    if few := {name: n for name, n in needed.items() if n > len(dataset)}:
        logger.warning(f"{len(dataset)} examples are too few to be {confidence:.1%} sure of a budget: it takes {few}.")
    options = {"thresholds": thresholds, "num_assistant_tokens": num_assistant_tokens, "lossless": lossless}
    options |= {"assistant_tokenizer": assistant_tokenizer, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    rows, kept, open_budgets = [], dict.fromkeys(max_drops, 0.0), set(max_drops)
    for row in rows_one_by_one(model, assistant_model, tokenizer, dataset, task, judge, **options):
        rows.append(row)
        if row["threshold"] is None:
            # No more can be lost than is right, whatever a judge does: that says nothing of it.
            meaningless = {name for name, budget in max_drops.items() if budget >= row["accuracy"]}
            open_budgets -= meaningless
        else:
            pair = rows[0]["correct"], row["correct"]
            open_budgets = {name for name in open_budgets if is_within_budget(*pair, max_drops[name], confidence)}
            kept |= dict.fromkeys(open_budgets, row["threshold"])
        if not open_budgets:
            break
    if meaningless:
        logger.warning(
            f"Lossless decoding gets {rows[0]['accuracy']:.1%} of the answers right, too few to lose "
            f"{sorted(meaningless)}: there the judge accepts nothing. See whether `max_new_tokens` cuts the answers "
            "off and whether the task finds them, in the `texts` of the first row that this returns."
        )
    if unkept := [name for name, threshold in kept.items() if threshold == 0.0 and name not in meaningless]:
        logger.warning(
            f"The lowest threshold tried, {min(thresholds)}, isn't sure to keep to {unkept}: there the judge accepts "
            "nothing. Try lower ones, or more examples."
        )
    summary = evaluation_summary(rows, dataset=dataset_name, split=split, num_assistant_tokens=num_assistant_tokens)
    others = [row for row in judge.config.evaluation if (row["dataset"], row["split"]) != (dataset_name, split)]
    judge.config = replace(
        judge.config, threshold=next(iter(kept.values())), thresholds=kept, evaluation=[*others, *summary]
    )
    return rows


def is_within_budget(
    lossless: Sequence[bool], judged: Sequence[bool], budget: float, confidence: float = 0.975
) -> bool:
    """Whether a judge is sure to cost at most `budget`, as far as the answers to some examples tell.

    Args:
        lossless, judged (`Sequence[bool]`): which of these answers are right.
        budget (`float`): the share of all examples that may be lost, those that are gained set off against it.
        confidence (`float`, *optional*, defaults to 0.975): a true drop of `budget` passes in a share of about
            1 - `confidence` of all samples (score test for two shares of the same examples, Tango 1998,
            doi:10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B). It holds where losses are too rare
            for a bootstrap, which knows nothing of those it hasn't seen.
    """
    n = len(lossless)
    lost = sum(before and not after for before, after in zip(lossless, judged))
    gained = sum(after and not before for before, after in zip(lossless, judged))
    # The likeliest share of gained answers if the drop were exactly the budget.
    a, b, c = 2 * n, (2 * n - lost + gained) * budget - lost - gained, -gained * budget * (1 - budget)
    share_gained = (math.sqrt(b**2 - 4 * a * c) - b) / (2 * a)
    deviation = math.sqrt(n * (2 * share_gained + budget * (1 - budget)))
    return lost - gained - n * budget <= -NormalDist().inv_cdf(confidence) * deviation
