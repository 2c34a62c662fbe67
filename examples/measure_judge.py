# SPDX-License-Identifier: Apache-2.0
"""What a judge gains and costs on the embedded pair: mined, trained, threshold chosen, tested once.

    python examples/measure_judge.py --output_dir runs/measure_judge
    python examples/measure_judge.py --task livecodebench --output_dir runs/measure_judge_programs

Training problems give the judge, validation problems its threshold, and fresh test problems, used once, the figures.
These are kept in the judge's config, and so in its card. `--judge` tests one that is there, on either task.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autojudge_hf import (
    AutoJudge,
    JudgeTrainer,
    JudgeTrainingArguments,
    evaluate_judge,
    evaluation_summary,
    mine_mismatches,
)
from autojudge_hf.tasks import GSM8K, LiveCodeBench


PAIR = Path(__file__).parent / "tiny_pair"
sys.path.insert(0, str(PAIR))

from make_problems import problems  # noqa: E402  (lives beside the pair)
from make_programs import programs  # noqa: E402


MAX_NEW_TOKENS = 320
TASKS = {
    "gsm8k": (GSM8K(), problems, "word problems of the embedded pair"),
    "livecodebench": (LiveCodeBench(), programs, "programming problems of the embedded pair"),
}


@functools.cache
def load_pair() -> tuple:
    """Target, draft and their tokenizer."""
    models = (AutoModelForCausalLM.from_pretrained(PAIR / x, dtype=torch.float32).eval() for x in ("target", "draft"))
    return *models, AutoTokenizer.from_pretrained(PAIR / "target")


def take(task: str, split: str, seed: int, n: int) -> list[dict]:
    """The first `n` problems of a split."""
    return list(itertools.islice(TASKS[task][1](split, seed), n))


def show(row: dict, lossless: dict) -> None:
    name = "lossless" if row["threshold"] is None else f"threshold {row['threshold']:.4f}"
    gain = row["tokens_per_cycle"] / lossless["tokens_per_cycle"]
    print(
        f"{name:18}  accuracy {row['accuracy']:.1%}"
        f"  drop {100 * row['drop']:+.2f} points [{100 * row['drop_low']:+.2f}, {100 * row['drop_high']:+.2f}]"
        f"  tokens/cycle {row['tokens_per_cycle']:.2f} (x{gain:.2f})"
        f"  mean length {row['mean_response_length']:.0f}"
    )


def measure(pair, tokenizer, task_name, judge, thresholds, examples, split, title, options) -> list[dict]:
    """Decodes, prints, and returns what `judge.config.evaluation` holds."""
    task, _, dataset = TASKS[task_name]
    rows = evaluate_judge(*pair, tokenizer, examples, task, judge, thresholds=thresholds, **options)
    length = options["num_assistant_tokens"]
    rows = evaluation_summary(rows, dataset=dataset, split=split, num_assistant_tokens=length)
    print(f"\n{len(examples)} {title}, draft length {length}")
    for row in rows:
        show(row, rows[0])
    return rows


def make_judge(pair, tokenizer, args, options):
    """Mines, trains, chooses the threshold on validation problems, and saves."""
    folder = Path(args.output_dir)
    mined = mine_mismatches(
        *pair,
        tokenizer,
        take(args.task, "train", args.seed, args.num_mined),
        TASKS[args.task][0],
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=32,
        num_assistant_tokens=8,
        state_position="both",
        logit_features=True,
        output_dir=folder / "mined",
    )
    print(f"{len(mined)} mismatches, {sum(mined['label']) / len(mined):.1%} important")
    # Where few important mismatches may pass, the fit has to care about these as much as about the many others.
    arguments = JudgeTrainingArguments(
        output_dir=str(folder / "judge"), overwrite_output_dir=True, validation_size=0.2, class_weight="balanced"
    )
    trainer = JudgeTrainer(arguments, mined)
    trainer.train()
    prediction = trainer.predict(trainer.eval_dataset)
    print(f"validation ROC-AUC {trainer.state.best_metric:.3f}")

    important = torch.from_numpy(prediction.predictions[prediction.label_ids == 1])
    thresholds = sorted({important.quantile(1 - recall).item() for recall in args.recalls})
    judge = trainer.judge
    examples = take(args.task, "validation", args.seed, args.num_validation)
    rows = measure(
        pair, tokenizer, args.task, judge, thresholds, examples, "validation", "validation problems", options
    )
    good = [row["threshold"] for row in rows[1:] if row["drop_high"] <= args.max_drop]
    judge.config.threshold = max(good, default=0.0)
    trainer.save_model()
    return judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", choices=list(TASKS), default="gsm8k")
    parser.add_argument("--output_dir", default="runs/measure_judge")
    parser.add_argument("--judge", help="folder of a judge, threshold included, to test instead of making one")
    parser.add_argument("--seed", type=int, default=1, help="seed of all problems")
    parser.add_argument("--test_seed", type=int, help="seed of the test problems, where it's another")
    parser.add_argument("--num_mined", type=int, default=2000)
    parser.add_argument("--num_validation", type=int, default=2000)
    parser.add_argument("--num_test", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=32, help="problems decoded at once; each row as if alone")
    parser.add_argument("--num_assistant_tokens", type=int, default=16, help="draft length")
    parser.add_argument(
        "--recalls",
        type=float,
        nargs="+",
        default=[0.92, 0.93, 0.94, 0.95],
        help="thresholds to try: those that reject these shares of the important mismatches held out from the fit",
    )
    parser.add_argument(
        "--factors", type=float, nargs="+", default=[1.0], help="test at these multiples of the judge's threshold"
    )
    parser.add_argument(
        "--max_drop", type=float, default=0.01, help="accuracy the threshold may cost, with 97.5 %% confidence"
    )
    args = parser.parse_args()
    torch.set_num_threads(2)
    *pair, tokenizer = load_pair()
    options = {"num_assistant_tokens": args.num_assistant_tokens, "max_new_tokens": MAX_NEW_TOKENS}
    options["batch_size"] = args.batch_size
    if args.judge is not None:
        judge = AutoJudge.from_pretrained(args.judge)
    else:
        judge = make_judge(pair, tokenizer, args, options)

    tested = take(args.task, "test", args.seed if args.test_seed is None else args.test_seed, args.num_test)
    thresholds = sorted(min(1.0, factor * judge.config.threshold) for factor in args.factors)
    rows = measure(
        pair, tokenizer, args.task, judge, thresholds, tested, "test", "fresh test problems, used once", options
    )
    # What it did on the other task stays.
    other = [row for row in judge.config.evaluation if row["dataset"] != TASKS[args.task][2]]
    judge.config.evaluation = other + rows
    judge.save_pretrained(args.judge or Path(args.output_dir) / "judge")


if __name__ == "__main__":
    main()
