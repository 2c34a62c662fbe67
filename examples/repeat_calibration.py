# SPDX-License-Identifier: Apache-2.0
"""Does a threshold for "at most 1 point" keep to it? Ten judges, calibrated and tested.

    python examples/repeat_calibration.py --output_dir runs/repeat

Every seed draws its mining set from the problems that `compare_judges.py` has mined, as many as there are, with
replacement (a bootstrap: mining ten times would take two hours more), fits a judge, and calibrates it on validation
problems that no other seed has. Then all are tested, at the threshold they chose, on the same fresh test problems. Two
seeds run beside each other, a thread each; interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import torch
from compare_judges import BATCH_SIZE, LEARNED, calibrate, decode, kept, mine, per_cycle, test
from measure_judge import take

from autojudge_hf import AutoJudge, JudgeTrainer, JudgeTrainingArguments, select_features
from autojudge_hf.evaluation import paired_interval


NAME, BUDGET = "mlp", {"1 point": 0.01}
#: Chosen by cross-validation in `compare_judges.py`.
C = 0.01


def lossless(args: argparse.Namespace, split: str, seed: int, n: int, folder: Path) -> dict:
    """Runs in a process of its own: the baseline on a split."""
    torch.set_num_threads(1)
    problems = take(args.task, split, seed, n)
    folder.mkdir(parents=True, exist_ok=True)
    make = partial(decode, args.task, problems, None, None, args.draft_length, BATCH_SIZE)
    return {"threshold": None, **kept(folder / f"{split}-lossless.json", make)}


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


def repeat(seed: int, args: argparse.Namespace) -> float:
    """Runs in a process of its own: the threshold that the judge of this seed chooses, tested."""
    torch.set_num_threads(1)
    folder = Path(args.output_dir) / f"seed-{seed}"
    if not (folder / "trained" / NAME).exists():
        fit(seed, Path(args.output_dir) / "rows", folder / "trained" / NAME)
    shared = {"task": args.task, "folder": folder, "draft_length": args.draft_length}
    validation = take(args.task, "validation", seed, args.num_validation)
    baseline = lossless(args, "validation", seed, args.num_validation, folder)
    calibrate(NAME, baseline, problems=validation, max_drops=BUDGET, **shared)
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
