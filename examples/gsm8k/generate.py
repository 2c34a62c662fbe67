# SPDX-License-Identifier: Apache-2.0
"""Solves problems with a judge and colours the mismatches that it let pass.

python examples/gsm8k/generate.py --judge runs/judge
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import HfArgumentParser


@dataclass
class Arguments:
    judge: str = field(metadata={"help": "Judge: local folder or Hub id."})
    model_name_or_path: str = field(default="Qwen/Qwen2.5-7B-Instruct", metadata={"help": "The target."})
    assistant_model_name_or_path: str = field(
        default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "The assistant."}
    )
    dataset_name: str = field(default="openai/gsm8k", metadata={"help": "Dataset on the Hub, its configuration main."})
    split: str = field(default="test", metadata={"help": "Its split."})
    data_file: str | None = field(default=None, metadata={"help": "Local JSONL file instead of the Hub's dataset."})
    max_examples: int = field(default=3, metadata={"help": "Solve the first so many."})
    num_fewshot: int = field(default=0, metadata={"help": "As in mining."})
    max_new_tokens: int = field(default=512, metadata={"help": "Limit of a response, in tokens."})
    judge_threshold: float | None = field(default=None, metadata={"help": "Default: the judge's own. 0 is lossless."})
    num_assistant_tokens: int | None = field(default=None, metadata={"help": "Candidates per cycle."})
    dtype: str = field(default="bfloat16", metadata={"help": "dtype of both models."})
    device_map: str = field(default="auto", metadata={"help": "Where the models go."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    if args.max_examples < 1:
        raise SystemExit(f"--max_examples must be at least 1, got {args.max_examples}.")

    from loading import load_pair, load_problems

    from autojudge_hf import AutoJudge
    from autojudge_hf.highlighting import highlight_accepted
    from autojudge_hf.tasks import GSM8K

    judge = AutoJudge.from_pretrained(args.judge)
    examples = load_problems(args)
    model, assistant_model, tokenizer = load_pair(args, args.device_map)
    task = GSM8K(num_fewshot=args.num_fewshot)
    for example in examples.select(range(min(args.max_examples, len(examples)))):
        prompt = task.prompt(example, tokenizer)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        output = model.generate(
            **inputs,
            assistant_model=assistant_model,
            judge=judge,
            judge_threshold=args.judge_threshold,
            num_assistant_tokens=args.num_assistant_tokens,
            # The settings the judge was mined under; the models' own generation configs may say otherwise.
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=args.max_new_tokens,
            return_dict_in_generate=True,
        )
        print(example["question"])
        print(highlight_accepted(model, tokenizer, output.sequences[0], inputs["input_ids"].shape[1]))
        print(f"[{output.summary()}]\n")


if __name__ == "__main__":
    main()
