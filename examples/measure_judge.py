# SPDX-License-Identifier: Apache-2.0
"""What judges gain and cost on the embedded pair: made for a task, or for both at once, and tested on either.

    python examples/measure_judge.py --task livecodebench --output_dir runs/judge_code
    python examples/measure_judge.py --task livecodebench --judges runs/judge_code/judge

The first command mines training problems, fits, and chooses the threshold on validation problems, by the accuracy it
costs. The second decodes fresh test problems, to be used once. What both find is kept in the judge's config, and so
in its card.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from arguments import positive_int
from embedded_pair import MAX_NEW_TOKENS, PAIR, load_pair

from autojudge_hf import (
    AutoJudge,
    JudgeTrainer,
    JudgeTrainingArguments,
    calibrate_threshold,
    evaluation_summary,
    judge_decoding,
    mine_mismatches,
)
from autojudge_hf.measuring import measure_decoding
from autojudge_hf.tasks import GSM8K, LiveCodeBench, Task


sys.path.insert(0, str(PAIR))

from make_problems import problems
from make_programs import programs


class Both(Task):
    """Word problems and programming problems; an answer says which it belongs to."""

    name = "word-and-programming-problems-v1"
    tasks = {"words": GSM8K(), "programs": LiveCodeBench()}

    def _kind(self, example: Mapping[str, Any]) -> str:
        return "words" if "question" in example else "programs"

    def prompt(self, example, tokenizer) -> str:
        return self.tasks[self._kind(example)].prompt(example, tokenizer)

    def extract_answers(self, examples: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[Any]:
        kinds = [self._kind(example) for example in examples]
        answers: list[Any] = [None] * len(texts)
        for kind, task in self.tasks.items():
            at = [i for i, other in enumerate(kinds) if other == kind]
            found = task.extract_answers([examples[i] for i in at], [texts[i] for i in at]) if at else []
            for i, answer in zip(at, found):
                answers[i] = None if answer is None else [kind, answer]
        return answers

    def is_correct(self, example: Mapping[str, Any], answer: Any) -> bool:
        kind = self._kind(example)
        return self.tasks[kind].is_correct(example, None if answer is None else answer[1])

    def equivalent(self, answer: Any, reference: Any) -> bool:
        if answer is None or reference is None or answer[0] != reference[0]:
            return False
        return self.tasks[answer[0]].equivalent(answer[1], reference[1])


def both(split: str, seed: int) -> Iterator[dict]:
    """Word problems and programming problems in turn."""
    return itertools.chain.from_iterable(zip(problems(split, seed), programs(split, seed)))


TASKS = {
    "gsm8k": (GSM8K(), problems, "word problems of the embedded pair"),
    "livecodebench": (LiveCodeBench(), programs, "programming problems of the embedded pair"),
    "both": (Both(), both, "word and programming problems of the embedded pair"),
}


def take(task: str, split: str, seed: int, n: int) -> list[dict]:
    """The first `n` problems of a split."""
    return list(itertools.islice(TASKS[task][1](split, seed), n))


def mine(task: str, problems: list[dict], folder: Path, **features: Any) -> datasets.Dataset:
    """`mine_mismatches` with the embedded pair; `features` are its arguments about these."""
    return mine_mismatches(
        *load_pair(),
        problems,
        TASKS[task][0],
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=32,
        num_assistant_tokens=8,
        output_dir=folder,
        **features,
    )


def decode(
    task: str, problems: list[dict], judge, threshold: float | None, draft_length: int, batch_size: int
) -> dict:
    """`measure_decoding` of the embedded pair, lossless without a judge."""
    model, draft, tokenizer = load_pair()
    loop = functools.partial(judge_decoding, assistant_model=draft, num_assistant_tokens=draft_length)
    if judge is not None:
        loop = functools.partial(loop, judge=judge, judge_threshold=threshold)
    row = measure_decoding(
        model,
        tokenizer,
        problems,
        TASKS[task][0],
        "lossless" if judge is None else f"{judge.judge_type} at {threshold:.3g}",
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=batch_size,
        custom_generate=loop,
        assistant_model=draft,
        do_sample=False,
        return_dict_in_generate=True,
    )
    del row["texts"]
    return row


def untimed(rows: list[dict]) -> list[dict]:
    """Passes run beside each other, so that their speed says nothing."""
    return [{**row, "speedup": None} for row in rows]


def show(row: dict, lossless: dict) -> None:
    name = "lossless" if row["threshold"] is None else f"threshold {row['threshold']:.4f}"
    gain = row["tokens_per_cycle"] / lossless["tokens_per_cycle"]
    print(
        f"{name:18}  accuracy {row['accuracy']:.1%}"
        f"  drop {100 * row['drop']:+.2f} points [{100 * row['drop_low']:+.2f}, {100 * row['drop_high']:+.2f}]"
        f"  tokens/cycle {row['tokens_per_cycle']:.2f} (x{gain:.2f})"
        f"  mean length {row['mean_response_length']:.0f}"
    )


def make_judge(args: argparse.Namespace) -> None:
    """Mines, fits, chooses the threshold on validation problems, and saves."""
    folder, (task, _, dataset) = Path(args.output_dir), TASKS[args.task]
    model, draft, tokenizer = load_pair()
    problems = take(args.task, "train", args.seed, args.num_mined)
    mined = mine(args.task, problems, folder / "mined", state_position="both", logit_features=True)
    print(f"{len(mined)} mismatches, {sum(mined['label']) / len(mined):.1%} important")
    arguments = JudgeTrainingArguments(
        output_dir=str(folder / "judge"),
        overwrite_output_dir=True,
        num_folds=5,
        C_grid=[1.0, 0.1, 0.01, 0.001],
    )
    trainer = JudgeTrainer(arguments, mined)
    trainer.train()
    print(f"ROC-AUC {trainer.state.best_metric:.3f} across folds")
    examples = take(args.task, "validation", args.seed, args.num_validation)
    calibrate_threshold(
        model,
        draft,
        tokenizer,
        examples,
        task,
        trainer.judge,
        thresholds=args.thresholds,
        max_drops={"1 point": 0.01, "2 points": 0.02},
        confidence=0.9,
        dataset_name=dataset,
        num_assistant_tokens=args.num_assistant_tokens,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=args.batch_size,
    )
    print(f"\n{len(examples)} validation problems, draft length {args.num_assistant_tokens}")
    rows = trainer.judge.config.evaluation = untimed(trainer.judge.config.evaluation)
    for row in rows:
        show(row, rows[0])
    trainer.save_model()


def test_judges(args: argparse.Namespace) -> None:
    """Decodes test problems with each judge, at the thresholds that it has for 1 point and for 2."""
    dataset, length = TASKS[args.task][2], args.num_assistant_tokens
    examples = take(args.task, "test", args.test_seed, args.num_test)
    measure = functools.partial(decode, args.task, examples, draft_length=length, batch_size=args.batch_size)
    lossless = {"threshold": None, **measure(None, None)}
    print(f"{len(examples)} fresh test problems, used once, draft length {length}")
    for folder in args.judges:
        judge = AutoJudge.from_pretrained(folder)
        thresholds = sorted({*judge.config.thresholds.values()} - {0.0})
        judged = [{"threshold": threshold, **measure(judge, threshold)} for threshold in thresholds]
        rows = evaluation_summary([lossless, *judged], dataset=dataset, split="test", num_assistant_tokens=length)
        print(f"\n{folder}: {judge.config.thresholds}")
        for row in rows:
            show(row, rows[0])
        # What it did on the other task stays.
        others = [row for row in judge.config.evaluation if (row["dataset"], row["split"]) != (dataset, "test")]
        judge.config.evaluation = others + untimed(rows)
        judge.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", choices=list(TASKS), default="gsm8k")
    parser.add_argument("--output_dir", default="runs/measure_judge")
    parser.add_argument("--judges", nargs="+", help="folders of judges to test, instead of making one")
    parser.add_argument("--seed", type=int, default=1, help="seed of training and validation problems")
    parser.add_argument("--test_seed", type=int, default=2)
    parser.add_argument("--num_mined", type=positive_int, default=400)
    parser.add_argument("--num_validation", type=positive_int, default=1000)
    parser.add_argument("--num_test", type=positive_int, default=1000)
    parser.add_argument(
        "--batch_size", type=positive_int, default=32, help="problems decoded at once; each row as if alone"
    )
    parser.add_argument("--num_assistant_tokens", type=positive_int, default=16, help="draft length")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.03, 0.06, 0.1, 0.15, 0.2])
    parser.add_argument(
        "--num_threads", type=positive_int, default=2, help="1 where two of these run beside each other"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    if args.judges:
        test_judges(args)
    else:
        make_judge(args)


if __name__ == "__main__":
    main()
