# SPDX-License-Identifier: Apache-2.0
"""Does a threshold for "at most 1 point" keep to it? Ten judges, calibrated and tested.

    python examples/repeat_calibration.py --output_dir runs/repeat

Every seed draws its mining set from the problems that `compare_judges.py` has mined, as many as there are, with
replacement (a bootstrap: mining ten times would take two hours more), fits a judge, and calibrates it on validation
problems that no other seed has, to be sure to 90 %, and to 97.5 %. Each is tested on the problems that the next two
seeds calibrated on, of which it knows nothing, on test problems that are the same for all, and on test problems that
no other judge has. Two passes run beside each other, a thread each; interrupted, the same command goes on where it
was.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import torch
from arguments import positive_int
from compare_judges import BATCH_SIZE, LEARNED, calibrate, kept, mine_all
from measure_judge import decode, take

from autojudge_hf import AutoJudge, JudgeTrainer, JudgeTrainingArguments, select_features
from autojudge_hf.calibration import is_within_budget
from autojudge_hf.evaluation import paired_interval


NAME, BUDGET = "mlp", {"1 point": 0.01}
#: Chosen by cross-validation in `compare_judges.py`.
C = 0.01
#: Split, seed and number.
Problems = tuple[str, int, int]


def lossless(problems: Problems, args: argparse.Namespace) -> dict:
    """Runs in a process of its own: the baseline."""
    torch.set_num_threads(1)
    split, seed, n = problems
    make = partial(decode, args.task, take(args.task, split, seed, n), None, None, args.draft_length, BATCH_SIZE)
    return {"threshold": None, **kept(Path(args.output_dir) / f"lossless-{split}-{seed}.json", make)}


def fit(seed: int, rows: Path, folder: Path) -> None:
    """Fits a judge on a bootstrap sample of the mined problems, and saves it."""
    mined = datasets.load_from_disk(str(rows))
    ids = np.asarray(mined["example_id"])
    problems = np.unique(ids)
    drawn = np.random.default_rng(seed).choice(problems, len(problems))
    mined = mined.select(np.concatenate([np.flatnonzero(ids == i) for i in drawn]))
    arguments = JudgeTrainingArguments(output_dir=str(folder), judge_type=NAME, seed=seed, C_grid=[C], max_iter=400)
    trainer = JudgeTrainer(arguments, mined)
    trainer.train()
    trainer.save_model()


def highest(rows: list[dict], confidence: float) -> float:
    """The last threshold before the first that isn't sure to keep to the budget; 0 where none comes before."""
    lossless, *judged = rows
    sure = itertools.takewhile(
        lambda row: is_within_budget(lossless["correct"], row["correct"], BUDGET["1 point"], confidence), judged
    )
    return max((row["threshold"] for row in sure), default=0.0)


def choose(seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """Runs in a process of its own: the thresholds that the judge of this seed chooses, at 90 % and at 97.5 %."""
    torch.set_num_threads(1)
    folder, n = Path(args.output_dir) / f"seed-{seed}", args.num_validation
    if not (folder / "trained" / NAME).exists():
        fit(seed, Path(args.output_dir) / "rows", folder / "trained" / NAME)

    def calibrated() -> list[float]:
        baseline, problems = lossless(("validation", seed, n), args), take(args.task, "validation", seed, n)
        options = {"confidence": 0.9, "max_drops": BUDGET}
        rows = calibrate(NAME, baseline, args.task, problems, folder, args.draft_length, **options)
        return [highest(rows, 0.9), highest(rows, 0.975)]

    return tuple(kept(folder / "thresholds.json", calibrated))


def judged(point: tuple[int, float, Problems], args: argparse.Namespace) -> dict:
    """Runs in a process of its own: problems decoded with the judge of a seed, at its threshold."""
    judge_seed, threshold, problems = point
    if threshold == 0.0:
        return lossless(problems, args)
    torch.set_num_threads(1)
    folder, (split, seed, n) = Path(args.output_dir) / f"seed-{judge_seed}", problems
    judge = AutoJudge.from_pretrained(folder / "calibrated" / NAME)
    make = partial(decode, args.task, take(args.task, split, seed, n), judge, threshold, args.draft_length, BATCH_SIZE)
    return kept(folder / f"{split}-{seed}-{threshold}.json", make)


def points(first: Sequence[float], second: Sequence[float]) -> str:
    """What is lost from the first to the second, with its 95 % interval."""
    low, high = paired_interval(first, second)
    return f"{100 * (np.mean(first) - np.mean(second)):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def report(thresholds: dict[int, float], tests: dict[int, list[Problems]], rows: dict, baselines: dict) -> None:
    """A row a seed, how many keep to the budget, and what all of them lose."""
    print("\n| seed | threshold | drop, points | tokens per cycle |\n| --- | --- | --- | --- |")
    num_kept, rights = 0, defaultdict(list)
    for seed, threshold in thresholds.items():
        before = [baselines[problems] for problems in tests[seed]]
        after = [rows[seed, threshold, problems] for problems in tests[seed]]
        for problems, row in zip(tests[seed], after):
            rights[problems].append(row["correct"])
        right = [[x for row in of for x in row["correct"]] for of in (before, after)]
        num_kept += np.mean(right[0]) - np.mean(right[1]) <= BUDGET["1 point"]
        rates = [
            sum(sum(x["num_tokens"]) for x in of) / sum(sum(x["num_target_forwards"]) for x in of)
            for of in (before, after)
        ]
        print(f"| {seed} | {threshold} | {points(*right)} | {rates[1]:.2f} ({rates[1] / rates[0]:.2f}x) |")
    before = [right for problems in rights for right in baselines[problems]["correct"]]
    after = [float(np.mean(of)) for judges in rights.values() for of in zip(*judges)]
    print(f"\n{num_kept} of {len(thresholds)} keep to 1 point; on all {len(before)} problems: {points(before, after)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", choices=["gsm8k", "livecodebench"], default="gsm8k")
    parser.add_argument("--output_dir", default="runs/repeat")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(101, 111)))
    parser.add_argument("--test_seed", type=int, default=111)
    parser.add_argument("--mined", default="runs/compare/mined", help="what `compare_judges.py` has mined")
    parser.add_argument("--mined_seed", type=int, default=21)
    parser.add_argument("--num_mined", type=positive_int, default=1500)
    parser.add_argument("--num_validation", type=positive_int, default=1000)
    parser.add_argument("--num_test", type=positive_int, default=2000)
    parser.add_argument("--draft_length", type=positive_int, default=16)
    args = parser.parse_args()
    folder = Path(args.output_dir)
    if not (folder / "rows").exists():
        mined = mine_all(args.task, args.mined_seed, args.num_mined, Path(args.mined))
        select_features(mined, **LEARNED[NAME][1]).save_to_disk(str(folder / "rows"))
    seeds, n = args.seeds, args.num_validation
    test = {seed: [("test", args.test_seed, args.num_test)] for seed in seeds}
    others = {seed: [("validation", seeds[(i + j) % len(seeds)], n) for j in (1, 2)] for i, seed in enumerate(seeds)}
    # For what was chosen after the others had been looked at.
    fresh = {seed: [("test", args.test_seed + 1, n)] for seed in seeds}
    # And after those: as many as the budget needs, whose luck the judges don't share.
    own = {seed: [("test", seed, args.num_test)] for seed in seeds}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        at_90, at_97 = (dict(zip(seeds, of)) for of in zip(*pool.map(partial(choose, args=args), seeds)))
        plans = (
            ("sure to 90 %, other seeds' problems", at_90, others),
            ("sure to 90 %, test problems", at_90, test),
            ("sure to 97.5 %, other seeds' problems", at_97, others),
            ("sure to 97.5 %, other test problems", at_97, fresh),
            ("sure to 97.5 %, test problems of its own", at_97, own),
        )
        passes = [(seed, chosen[seed], p) for _, chosen, tests in plans for seed in seeds for p in tests[seed]]
        passes = list(dict.fromkeys(passes))
        sets = sorted({problems for *_, problems in passes})
        baselines = dict(zip(sets, pool.map(partial(lossless, args=args), sets)))
        rows = dict(zip(passes, pool.map(partial(judged, args=args), passes)))
    for title, chosen, tests in plans:
        print(f"\n{title}")
        report(chosen, tests, rows, baselines)


if __name__ == "__main__":
    main()
