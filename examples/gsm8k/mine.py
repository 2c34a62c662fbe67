# SPDX-License-Identifier: Apache-2.0
"""Mines mismatches on GSM8K, or on a JSONL file with the fields `question` and `answer`.

python examples/gsm8k/mine.py --output_dir runs/mined
accelerate launch --num_processes 8 examples/gsm8k/mine.py --output_dir runs/mined
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


@dataclass
class Arguments:
    output_dir: str = field(metadata={"help": "Folder for the mined dataset. The same command again goes on with it."})
    model_name_or_path: str = field(default="Qwen/Qwen2.5-7B-Instruct", metadata={"help": "The target."})
    assistant_model_name_or_path: str = field(
        default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "The assistant; same tokenizer as the target."}
    )
    dataset_name: str = field(default="openai/gsm8k", metadata={"help": "Dataset on the Hub, its configuration main."})
    split: str = field(default="train", metadata={"help": "Its split. Never mine what you test on."})
    data_file: str | None = field(default=None, metadata={"help": "Local JSONL file instead of the Hub's dataset."})
    max_examples: int | None = field(default=None, metadata={"help": "Mine only the first so many."})
    num_fewshot: int = field(default=0, metadata={"help": "Worked examples in the prompt, 0 to 8."})
    extraction: str = field(
        default="strict", metadata={"help": "'strict': after 'The final answer is'; 'flexible': the last number."}
    )
    max_new_tokens: int = field(default=512, metadata={"help": "Limit of a whole response, in tokens."})
    num_assistant_tokens: int | None = field(default=None, metadata={"help": "Draft length; changes the speed only."})
    temperature: float = field(default=0.0, metadata={"help": "0: greedy. Above: both models draw with one noise."})
    seed: int = field(default=0, metadata={"help": "Seed of that noise."})
    batch_size: int = field(default=16, metadata={"help": "Problems in flight."})
    state_position: str = field(
        default="both", metadata={"help": "'candidate', 'previous' or 'both': whose states the judge may read."}
    )
    logit_features: bool = field(
        default=True, metadata={"help": "Judge by the target's logits too, not states alone."}
    )
    dtype: str = field(default="bfloat16", metadata={"help": "dtype of both models."})
    device_map: str = field(default="auto", metadata={"help": "Where the models go."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    if args.max_examples is not None and args.max_examples < 1:
        raise SystemExit(f"--max_examples must be at least 1, got {args.max_examples}.")

    import torch
    from accelerate import PartialState
    from loading import load_pair, load_problems

    from autojudge_hf import mine_mismatches
    from autojudge_hf.tasks import GSM8K

    examples = load_problems(args)
    if args.max_examples is not None:
        examples = examples.select(range(min(args.max_examples, len(examples))))
    # Several processes share the examples; each has both models, on a device of its own.
    state = PartialState(cpu=not torch.cuda.is_available())
    device_map = args.device_map if state.num_processes == 1 else {"": state.device}
    model, assistant_model, tokenizer = load_pair(args, device_map)
    folder = Path(args.output_dir)
    mined = mine_mismatches(
        model,
        assistant_model,
        tokenizer,
        examples,
        GSM8K(num_fewshot=args.num_fewshot, extraction=args.extraction),
        max_new_tokens=args.max_new_tokens,
        num_assistant_tokens=args.num_assistant_tokens,
        temperature=args.temperature,
        seed=args.seed,
        batch_size=args.batch_size,
        state_position=args.state_position,
        logit_features=args.logit_features,
        output_dir=folder / "examples",
    )
    if len(mined) == 0:
        raise SystemExit(
            "No mismatch was mined: expected some responses with an answer. Raise --max_new_tokens or --max_examples."
        )
    if state.is_main_process:
        mined.to_parquet(folder / "mismatches.parquet")
        important = sum(mined["label"]) / len(mined)
        processes = "1 process" if state.num_processes == 1 else f"{state.num_processes} processes"
        print(f"{len(mined)} mismatches, {important:.1%} important, in {folder / 'mismatches.parquet'} ({processes})")


if __name__ == "__main__":
    main()
