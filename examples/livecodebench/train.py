# SPDX-License-Identifier: Apache-2.0
"""Trains a judge on the mismatches of all folds but one.

python examples/livecodebench/train.py --folder runs/livecodebench --fold 0
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


@dataclass
class Arguments:
    folder: str = field(
        metadata={"help": "What mine.py wrote to; the judge goes to its `fold-<number>-of-<folds>/judge`."}
    )
    fold: int | None = field(default=None, metadata={"help": "Fold to leave out, from 0. Default: train on all."})
    num_folds: int = field(default=5, metadata={"help": "Problem i is in fold i modulo this."})
    recall: float = field(default=0.9, metadata={"help": "Share of important mismatches the threshold rejects."})
    validation_size: float = field(default=0.1, metadata={"help": "Share of the problems held out."})
    seed: int = field(default=42, metadata={"help": "Seed of that split."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an earlier judge."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    if args.num_folds < 2:
        raise SystemExit(f"--num_folds must be at least 2, got {args.num_folds}.")
    if args.fold is not None and not 0 <= args.fold < args.num_folds:
        raise SystemExit(f"--fold must be from 0 to {args.num_folds - 1}, got {args.fold}.")

    from datasets import Dataset

    from autojudge_hf import JudgeTrainer, JudgeTrainingArguments

    folder = Path(args.folder)
    mined = Dataset.from_parquet(str(folder / "mismatches.parquet"))
    if args.fold is not None:
        folds = [number % args.num_folds for number in mined["example_id"]]
        mined = mined.select([i for i, fold in enumerate(folds) if fold != args.fold])
    output_dir = folder / ("all" if args.fold is None else f"fold-{args.fold}-of-{args.num_folds}") / "judge"
    training_args = JudgeTrainingArguments(
        output_dir=str(output_dir),
        recall=args.recall,
        validation_size=args.validation_size,
        seed=args.seed,
        overwrite_output_dir=args.overwrite_output_dir,
    )
    trainer = JudgeTrainer(training_args, mined)
    trainer.train()
    trainer.save_model()
    for entry in trainer.state.log_history:
        print("  ".join(f"{name}={value:.4g}" for name, value in entry.items()))
    print(f"judge in {output_dir}")


if __name__ == "__main__":
    main()
