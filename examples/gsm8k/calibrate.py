# SPDX-License-Identifier: Apache-2.0
"""Chooses a judge's thresholds by the accuracy that they cost, on problems that it wasn't trained on.

python examples/gsm8k/calibrate.py --judge runs/judge --skip 500
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import HfArgumentParser


@dataclass
class Arguments:
    judge: str = field(metadata={"help": "Folder of a judge; the thresholds are written into it."})
    model_name_or_path: str = field(default="Qwen/Qwen2.5-7B-Instruct", metadata={"help": "The target."})
    assistant_model_name_or_path: str = field(
        default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "The assistant."}
    )
    dataset_name: str = field(default="openai/gsm8k", metadata={"help": "Dataset on the Hub, its configuration main."})
    split: str = field(default="train", metadata={"help": "Its split. Never calibrate on what you test on."})
    data_file: str | None = field(default=None, metadata={"help": "Local JSONL file instead of the Hub's dataset."})
    skip: int = field(default=0, metadata={"help": "The first so many problems were mined, and are left out."})
    max_examples: int = field(default=1000, metadata={"help": "Decode the next so many."})
    thresholds: list[float] = field(
        default_factory=lambda: [0.01, 0.02, 0.05, 0.1, 0.2, 0.4], metadata={"help": "Tried from the lowest on."}
    )
    confidence: float = field(default=0.975, metadata={"help": "How sure to keep to 1 and to 5 points."})
    num_fewshot: int = field(default=0, metadata={"help": "As in mining."})
    extraction: str = field(default="strict", metadata={"help": "As in mining."})
    num_assistant_tokens: int = field(default=16, metadata={"help": "Candidates per cycle."})
    max_new_tokens: int = field(default=512, metadata={"help": "Limit of a response, in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Problems at a time."})
    dtype: str = field(default="bfloat16", metadata={"help": "dtype of both models."})
    device_map: str = field(default="auto", metadata={"help": "Where the models go."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    if args.max_examples < 1:
        raise SystemExit(f"--max_examples must be at least 1, got {args.max_examples}.")
    if args.skip < 0:
        raise SystemExit(f"--skip must be at least 0, got {args.skip}.")

    from loading import load_pair, load_problems

    from autojudge_hf import AutoJudge, calibrate_threshold
    from autojudge_hf.tasks import GSM8K

    judge = AutoJudge.from_pretrained(args.judge)
    examples = load_problems(args)
    last = min(args.skip + args.max_examples, len(examples))
    if args.skip >= last:
        raise SystemExit(f"Expected problems behind the first {args.skip}, got {len(examples)} in all.")
    model, assistant_model, tokenizer = load_pair(args, args.device_map)
    rows = calibrate_threshold(
        model,
        assistant_model,
        tokenizer,
        examples.select(range(args.skip, last)),
        GSM8K(num_fewshot=args.num_fewshot, extraction=args.extraction),
        judge,
        thresholds=args.thresholds,
        confidence=args.confidence,
        dataset_name=args.dataset_name if args.data_file is None else args.data_file,
        split=args.split,
        num_assistant_tokens=args.num_assistant_tokens,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )
    judge.save_pretrained(args.judge)
    for row in rows:
        name = "lossless" if row["threshold"] is None else f"{row['threshold']:.3g}"
        print(f"{name:>8}  accuracy {row['accuracy']:6.1%}  {row['tokens_per_cycle']:6.2f} tokens per cycle")
    for name, threshold in judge.config.thresholds.items():
        print(f"at most {name}: {threshold:.3g}")


if __name__ == "__main__":
    main()
