# SPDX-License-Identifier: Apache-2.0
"""Mines mismatches on LiveCodeBench, or on a JSONL file with rows in its official format.

python examples/livecodebench/mine.py --output_dir runs/livecodebench
accelerate launch --num_processes 8 examples/livecodebench/mine.py --output_dir runs/livecodebench

The benchmark has no training split, so judges are trained and tested fold by fold: train.py leaves a fold out, and
generate.py solves it. A problem's mismatches don't depend on the other problems, so that all are mined once.
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
    data_file: str | None = field(default=None, metadata={"help": "Local JSONL file instead of the Hub's files."})
    release: int = field(default=5, metadata={"help": "LiveCodeBench's release; 5 has 880 problems."})
    since: str | None = field(default=None, metadata={"help": "First contest date, such as 2024-08-01."})
    until: str | None = field(default=None, metadata={"help": "Last contest date."})
    max_examples: int | None = field(default=None, metadata={"help": "Mine only the first so many."})
    compare: str = field(
        default="verdict", metadata={"help": "'verdict': programs that both pass or fail mean the same; or 'tests'."}
    )
    max_new_tokens: int = field(default=1024, metadata={"help": "Limit of a whole response, in tokens."})
    num_assistant_tokens: int | None = field(default=None, metadata={"help": "Draft length; changes the speed only."})
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from autojudge_hf import mine_mismatches
    from autojudge_hf.tasks import LiveCodeBench
    from autojudge_hf.tasks.livecodebench import load_problems

    problems = load_problems(args.data_file, args.release, args.since, args.until)[: args.max_examples]
    # Several processes share the problems; each has both models, on a device of its own.
    state = PartialState(cpu=not torch.cuda.is_available())
    device_map = args.device_map if state.num_processes == 1 else {"": state.device}
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model, assistant_model = (
        AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype, device_map=device_map).eval()
        for name in (args.model_name_or_path, args.assistant_model_name_or_path)
    )
    folder = Path(args.output_dir)
    mined = mine_mismatches(
        model,
        assistant_model,
        tokenizer,
        problems,
        LiveCodeBench(compare=args.compare),
        max_new_tokens=args.max_new_tokens,
        num_assistant_tokens=args.num_assistant_tokens,
        batch_size=args.batch_size,
        state_position=args.state_position,
        logit_features=args.logit_features,
        output_dir=folder / "examples",
    )
    if len(mined) == 0:
        raise SystemExit("No mismatch was mined: expected responses with code. Raise --max_new_tokens.")
    if state.is_main_process:
        mined.to_parquet(folder / "mismatches.parquet")
        important = sum(mined["label"]) / len(mined)
        processes = "1 process" if state.num_processes == 1 else f"{state.num_processes} processes"
        print(f"{len(mined)} mismatches, {important:.1%} important, in {folder / 'mismatches.parquet'} ({processes})")


if __name__ == "__main__":
    main()
