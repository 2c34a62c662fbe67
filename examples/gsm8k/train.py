# SPDX-License-Identifier: Apache-2.0
"""Trains a judge on mined mismatches.

python examples/gsm8k/train.py --data_file runs/mined/mismatches.parquet --output_dir runs/judge
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import HfArgumentParser


@dataclass
class Arguments:
    data_file: str = field(metadata={"help": "Parquet file that mine.py wrote."})
    output_dir: str = field(metadata={"help": "Folder the judge is saved to; new or empty."})
    recall: float = field(default=0.9, metadata={"help": "Share of important mismatches the threshold rejects."})
    validation_size: float = field(default=0.1, metadata={"help": "Share of the problems held out."})
    seed: int = field(default=42, metadata={"help": "Seed of the split."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace files in output_dir."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()

    from datasets import Dataset

    from autojudge_hf import JudgeTrainer, JudgeTrainingArguments

    options = vars(args)
    dataset = Dataset.from_parquet(options.pop("data_file"))
    trainer = JudgeTrainer(JudgeTrainingArguments(**options), dataset)
    trainer.train()
    trainer.save_model()
    for entry in trainer.state.log_history:
        print("  ".join(f"{name}={value:.4g}" for name, value in entry.items()))
    print(f"judge in {args.output_dir}")


if __name__ == "__main__":
    main()
