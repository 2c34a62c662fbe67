# SPDX-License-Identifier: Apache-2.0
"""Does a threshold for "at most 1 point" keep to it? Ten judges, calibrated and tested.

    python examples/repeat_calibration.py --output_dir runs/repeat

Every seed draws its mining set from the problems that `compare_judges.py` has mined, as many as there are, with
replacement (a bootstrap: mining ten times would take two hours more), fits a judge, and calibrates it on validation
problems that no other seed has. Each is tested twice, at the threshold it chose: on test problems that are the same
for all, and on the problems that the next two seeds calibrated on, of which it knows nothing. Two passes run beside
each other, a thread each; interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import torch
from compare_judges import BATCH_SIZE, LEARNED, calibrate, kept, mine
from measure_judge import decode, take

from autojudge_hf import AutoJudge, JudgeTrainer, JudgeTrainingArguments, select_features
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


def choose(seed: int, args: argparse.Namespace) -> float:
    """Runs in a process of its own: the threshold that the judge of this seed chooses."""
    torch.set_num_threads(1)
    folder = Path(args.output_dir) / f"seed-{seed}"
    if not (folder / "trained" / NAME).exists():
        fit(seed, Path(args.output_dir) / "rows", folder / "trained" / NAME)
    validation = take(args.task, "validation", seed, args.num_validation)
    baseline = lossless(("validation", seed, args.num_validation), args)
    calibrate(NAME, baseline, args.task, validation, folder, args.draft_length, max_drops=BUDGET)
    return AutoJudge.from_pretrained(folder / "calibrated" / NAME).config.threshold


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
    """The table, how many keep to the budget, and what all of them lose on the problems of other seeds."""
    print("\n| seed | threshold | drop, test problems | drop, other seeds' problems | tokens per cycle there |")
    print("| --- | --- | --- | --- | --- |")
    num_kept, rights = [0, 0], defaultdict(list)
    for seed, threshold in thresholds.items():
        cells, (test, *others) = [], tests[seed]
        for i, problems in enumerate(([test], others)):
            before = [right for p in problems for right in baselines[p]["correct"]]
            after = [right for p in problems for right in rows[seed, threshold, p]["correct"]]
            num_kept[i] += np.mean(before) - np.mean(after) <= BUDGET["1 point"]
            cells.append(points(before, after))
        for p in others:
            rights[p].append(rows[seed, threshold, p]["correct"])
        rates = [
            sum(sum(x["num_tokens"]) for x in of) / sum(sum(x["num_target_forwards"]) for x in of)
            for of in ([baselines[p] for p in others], [rows[seed, threshold, p] for p in others])
        ]
        cells.append(f"{rates[1]:.2f} ({rates[1] / rates[0]:.2f}x)")
        print(f"| {seed} | {threshold} | " + " | ".join(cells) + " |")
    print(f"\nof {len(thresholds)}, {num_kept[0]} keep to 1 point on the test problems, {num_kept[1]} on the others")
    before = [right for p in rights for right in baselines[p]["correct"]]
    after = [float(np.mean(of)) for judges in rights.values() for of in zip(*judges)]
    print(f"all judges on the {len(before)} others: {points(before, after)} points")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", choices=["gsm8k", "livecodebench"], default="gsm8k")
    parser.add_argument("--output_dir", default="runs/repeat")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(101, 111)))
    parser.add_argument("--test_seed", type=int, default=111)
    parser.add_argument("--mined", default="runs/compare/mined", help="what `compare_judges.py` has mined")
    parser.add_argument("--mined_seed", type=int, default=21)
    parser.add_argument("--num_mined", type=int, default=1500)
    parser.add_argument("--num_validation", type=int, default=1000)
    parser.add_argument("--num_test", type=int, default=2000)
    parser.add_argument("--draft_length", type=int, default=16)
    args = parser.parse_args()
    folder = Path(args.output_dir)
    if not (folder / "rows").exists():
        mined = mine(args.task, args.mined_seed, args.num_mined, Path(args.mined))
        select_features(mined, **LEARNED[NAME][1]).save_to_disk(str(folder / "rows"))
    test, n = ("test", args.test_seed, args.num_test), args.num_validation
    tests = {
        seed: [test, *(("validation", args.seeds[(i + j) % len(args.seeds)], n) for j in (1, 2))]
        for i, seed in enumerate(args.seeds)
    }
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        thresholds = dict(zip(args.seeds, pool.map(partial(choose, args=args), args.seeds)))
        passes = [(seed, thresholds[seed], problems) for seed in args.seeds for problems in tests[seed]]
        sets = sorted({problems for _, _, problems in passes})
        baselines = dict(zip(sets, pool.map(partial(lossless, args=args), sets)))
        rows = dict(zip(passes, pool.map(partial(judged, args=args), passes)))
    report(thresholds, tests, rows, baselines)


if __name__ == "__main__":
    main()
