# SPDX-License-Identifier: Apache-2.0
"""Does a threshold for "at most 1 point" keep to it? Ten judges, each made from problems of its own.

    python examples/repeat_calibration.py --output_dir runs/repeat

For every seed a judge is mined, trained, and calibrated on validation problems that no other seed has seen. Then all
are tested, at the threshold they chose, on the same fresh test problems. Two seeds run beside each other, a thread
each; interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from compare_judges import BATCH_SIZE, calibrate, decode, kept, mine, per_cycle, test, train
from measure_judge import take

from autojudge_hf import AutoJudge
from autojudge_hf.evaluation import paired_interval


NAME, BUDGET = "linear", {"1 point": 0.01}
THRESHOLDS = (0.03, 0.06, 0.1, 0.15)


def lossless(args: argparse.Namespace, split: str, seed: int, n: int, folder: Path) -> dict:
    """Runs in a process of its own: the baseline on a split."""
    torch.set_num_threads(1)
    problems = take(args.task, split, seed, n)
    folder.mkdir(parents=True, exist_ok=True)
    make = partial(decode, args.task, problems, None, None, args.draft_length, BATCH_SIZE)
    return {"threshold": None, **kept(folder / f"{split}-lossless.json", make)}


def repeat(seed: int, args: argparse.Namespace) -> float:
    """Runs in a process of its own: the threshold that the judge of this seed chooses, tested."""
    torch.set_num_threads(1)
    folder = Path(args.output_dir) / f"seed-{seed}"
    mined = mine(args.task, seed, args.num_mined, folder / "mined")
    if not (folder / "trained" / NAME).exists():
        train(NAME, mined, folder / "trained")
    shared = {"task": args.task, "folder": folder, "draft_length": args.draft_length}
    validation = take(args.task, "validation", seed, args.num_validation)
    baseline = lossless(args, "validation", seed, args.num_validation, folder)
    calibrate(NAME, baseline, problems=validation, thresholds=THRESHOLDS, max_drops=BUDGET, **shared)
    threshold = AutoJudge.from_pretrained(folder / "calibrated" / NAME).config.threshold
    if threshold > 0.0:
        test((NAME, threshold), problems=take(args.task, "test", args.test_seed, args.num_test), **shared)
    return threshold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", choices=["gsm8k", "livecodebench"], default="gsm8k")
    parser.add_argument("--output_dir", default="runs/repeat")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(101, 111)))
    parser.add_argument("--test_seed", type=int, default=111)
    parser.add_argument("--num_mined", type=int, default=200)
    parser.add_argument("--num_validation", type=int, default=1000)
    parser.add_argument("--num_test", type=int, default=2000)
    parser.add_argument("--draft_length", type=int, default=16)
    args = parser.parse_args()
    folder = Path(args.output_dir)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        baseline = pool.submit(lossless, args, "test", args.test_seed, args.num_test, folder)
        thresholds = dict(zip(args.seeds, pool.map(partial(repeat, args=args), args.seeds)))
        baseline = baseline.result()

    print(f"\n{args.num_test} test problems, draft length {args.draft_length}; drop in points, 95 % intervals")
    print(f"lossless: accuracy {baseline['accuracy']:.1%}, tokens/cycle {per_cycle(baseline):.2f}\n")
    print("| seed | threshold | accuracy | drop | tokens per cycle |\n| --- | --- | --- | --- | --- |")
    num_kept = 0
    for seed, threshold in thresholds.items():
        path = folder / f"seed-{seed}" / f"test-{NAME}-{threshold}.json"
        row = baseline if threshold == 0.0 else kept(path, dict)
        drop = baseline["accuracy"] - row["accuracy"]
        low, high = paired_interval(baseline["correct"], row["correct"])
        num_kept += drop <= BUDGET["1 point"]
        gain = per_cycle(row) / per_cycle(baseline)
        print(
            f"| {seed} | {threshold} | {row['accuracy']:.1%} | {100 * drop:.1f} [{100 * low:.1f}, {100 * high:.1f}] | "
            f"{per_cycle(row):.2f} ({gain:.2f}x) |"
        )
    print(f"\n{num_kept} of {len(thresholds)} keep to {next(iter(BUDGET))} on the test problems.")


if __name__ == "__main__":
    main()
