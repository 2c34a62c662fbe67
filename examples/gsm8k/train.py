# SPDX-License-Identifier: Apache-2.0
"""Trains a judge on mined mismatches.

python examples/gsm8k/train.py --data_file runs/mined/mismatches.parquet --output_dir runs/judge
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import HfArgumentParser


@dataclass
class Arguments:
    data_file: str = field(metadata={"help": "Parquet file that mine.py wrote, or its folder, finished or not."})
    output_dir: str = field(default="runs/judge", metadata={"help": "Folder for the judge."})
    judge_type: str = field(default="linear", metadata={"help": "'linear', or 'mlp' for some thousand mismatches."})
    recall: float = field(default=0.9, metadata={"help": "Share of important mismatches the threshold rejects."})
    validation_size: float = field(default=0.1, metadata={"help": "Share of the problems held out."})
    seed: int = field(default=42, metadata={"help": "Seed of the split."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace an earlier judge."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the judge, too."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Where to; default: output_dir's name."})
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    license: str | None = field(default=None, metadata={"help": "The judge's licence, for its card."})
    dataset: str | None = field(default=None, metadata={"help": "Hub id of the mined problems, for the card."})
    learning_curve: bool = field(default=False, metadata={"help": "Print AUC against problems mined, and stop."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()

    from autojudge_hf import JudgeTrainer, JudgeTrainingArguments
    from autojudge_hf.mined_examples import read_mismatches

    options = vars(args)
    path, learning_curve = options.pop("data_file"), options.pop("learning_curve")
    options["push_to_hub"] &= not learning_curve
    options["overwrite_output_dir"] |= learning_curve  # which writes nothing
    card = {name: options.pop(name) for name in ("license", "dataset")}
    trainer = JudgeTrainer(JudgeTrainingArguments(**options), read_mismatches(path))
    if learning_curve:
        for point in trainer.learning_curve():
            print(f"{point['num_examples']:6} problems  validation ROC-AUC {point['eval_auc']:.3f}")
        return
    trainer.train()
    trainer.create_model_card(**card)
    trainer.save_model()
    for entry in trainer.state.log_history:
        print("  ".join(f"{name}={value:.4g}" for name, value in entry.items()))
    print(f"judge in {args.output_dir}")


if __name__ == "__main__":
    main()
