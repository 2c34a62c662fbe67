# SPDX-License-Identifier: Apache-2.0
"""Solves the fold that a judge wasn't trained on, without and with it, and sums up over the folds solved so far.

python examples/livecodebench/generate.py --folder runs/livecodebench --fold 0
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


@dataclass
class Arguments:
    folder: str = field(
        metadata={"help": "What mine.py wrote to; the judge is in its `fold-<number>-of-<folds>/judge`."}
    )
    fold: int = field(metadata={"help": "Fold to solve, from 0."})
    num_folds: int = field(default=5, metadata={"help": "As in train.py."})
    model_name_or_path: str = field(default="Qwen/Qwen2.5-7B-Instruct", metadata={"help": "The target."})
    assistant_model_name_or_path: str = field(
        default="Qwen/Qwen2.5-0.5B-Instruct", metadata={"help": "The assistant."}
    )
    data_file: str | None = field(default=None, metadata={"help": "As in mine.py."})
    release: int = field(default=5, metadata={"help": "As in mine.py."})
    since: str | None = field(default=None, metadata={"help": "As in mine.py."})
    until: str | None = field(default=None, metadata={"help": "As in mine.py."})
    max_examples: int | None = field(default=None, metadata={"help": "As in mine.py: the first so many of all folds."})
    judge_threshold: float | None = field(default=None, metadata={"help": "Default: the judge's own."})
    num_assistant_tokens: int = field(default=16, metadata={"help": "Candidates per cycle."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Limit of a response, in tokens."})
    batch_size: int = field(default=1, metadata={"help": "Problems at a time."})
    dtype: str = field(default="bfloat16", metadata={"help": "dtype of both models."})
    device_map: str = field(default="auto", metadata={"help": "Where the models go."})


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    if args.num_folds < 2:
        raise SystemExit(f"--num_folds must be at least 2, got {args.num_folds}.")
    if args.max_examples is not None and args.max_examples < 1:
        raise SystemExit(f"--max_examples must be at least 1, got {args.max_examples}.")
    if not 0 <= args.fold < args.num_folds:
        raise SystemExit(f"--fold must be from 0 to {args.num_folds - 1}, got {args.fold}.")

    folder = Path(args.folder) / f"fold-{args.fold}-of-{args.num_folds}"
    if not (folder / "judge").exists():
        raise SystemExit(
            f"There is no judge in {folder}: train it first, with train.py --folder {args.folder} --fold {args.fold} "
            f"--num_folds {args.num_folds}."
        )

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from autojudge_hf import AutoJudge, evaluate_judge
    from autojudge_hf.tasks import LiveCodeBench
    from autojudge_hf.tasks.livecodebench import load_problems

    judge = AutoJudge.from_pretrained(folder / "judge")
    problems = load_problems(args.data_file, args.release, args.since, args.until)[: args.max_examples]
    problems = problems[args.fold :: args.num_folds]
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model, assistant_model = (
        AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype, device_map=args.device_map).eval()
        for name in (args.model_name_or_path, args.assistant_model_name_or_path)
    )
    rows = evaluate_judge(
        model,
        assistant_model,
        tokenizer,
        problems,
        LiveCodeBench(),
        judge,
        thresholds=[judge.config.threshold if args.judge_threshold is None else args.judge_threshold],
        num_assistant_tokens=args.num_assistant_tokens,
        max_new_tokens=args.max_new_tokens,
        batch_size=args.batch_size,
    )
    of_a_fold = ("folder", "fold", "device_map")
    settings = {name: value for name, value in vars(args).items() if name not in of_a_fold}
    result = {"settings": settings, "num_problems": len(problems), "lossless": rows[0], "judged": rows[1]}
    (folder / "result.json").write_text(json.dumps(result))

    found = [
        json.loads(path.read_text()) for path in sorted(folder.parent.glob(f"fold-*-of-{args.num_folds}/result.json"))
    ]
    results = [result for result in found if result.get("settings") == settings]
    if len(results) < len(found):
        print(f"left out: {len(found) - len(results)} folds that were solved under other settings")
    total = sum(result["num_problems"] for result in results)
    print(f"{total} problems, {len(results)} of {args.num_folds} folds, each with the judge of the others")
    for name in ("lossless", "judged"):
        rows = [result[name] for result in results]
        right = sum(sum(row["correct"]) for row in rows)
        in_cycles, cycles = (sum(sum(row[key]) for row in rows) for key in ("num_tokens", "num_target_forwards"))
        lengths = [row["mean_response_length"] * len(row["correct"]) for row in rows]
        seconds = sum(length / row["tokens_per_second"] for length, row in zip(lengths, rows))
        print(
            f"{name:8}  pass@1 {right / total:6.1%}  {in_cycles / cycles:6.2f} tokens/cycle  "
            f"{sum(lengths) / seconds:6.1f} tokens/s  {sum(lengths) / total:6.1f} tokens a response"
        )


if __name__ == "__main__":
    main()
