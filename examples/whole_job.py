# SPDX-License-Identifier: Apache-2.0
"""The whole job at real sizes, without downloads: mine, train, save, load, decode; time and peak memory of each step.

    python examples/whole_job.py --pair llama
    python examples/whole_job.py --pair tiny --device cpu

The models are those of `benchmark_gpu.py`: the target counts, the draft skips some numbers, and of the numbers that
it jumps to a chosen share is important. An answer is the list of important jumps: a mined label is right if it says
what was planted, and a judged text if it has no such jump. The last column says how many are.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from arguments import positive_int
from benchmark_gpu import PAIRS, parse_arguments, planted_pair, timed
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from autojudge_hf import AutoJudge, JudgeTrainer, JudgeTrainingArguments, judge_decoding, mine_mismatches
from autojudge_hf.tasks import Task


PROMPT_LENGTH = 16


class Jumps(Task):
    """Which important numbers a text jumps to; the target's own never jumps."""

    name = "jumps"

    def __init__(self, important: torch.Tensor):
        self.important = important.tolist()

    def prompt(self, example, tokenizer) -> str:
        return " ".join(str(example["start"] + i) for i in range(PROMPT_LENGTH))

    def extract_answers(self, examples, texts) -> list[list[int]]:
        return [
            self.important_jumps(example, [int(word) for word in text.split()])
            for example, text in zip(examples, texts)
        ]

    def is_correct(self, example, answer) -> bool:
        return answer == []

    def important_jumps(self, example, tokens: list[int]) -> list[int]:
        before = [example["start"] + PROMPT_LENGTH - 1, *tokens]
        return [b for a, b in zip(before, tokens) if b != a + 1 and self.important[b]]


def number_tokenizer(size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--num_examples", type=positive_int, default=8, help="prompts to mine, and as many others to decode"
    )
    parser.add_argument("--num_tokens", type=positive_int, default=128)
    parser.add_argument("--draft_length", type=positive_int, default=16)
    args = parse_arguments(parser)
    if args.num_examples < 2:
        parser.error(f"--num_examples must be at least 2, one of them to validate on, got {args.num_examples}.")
    # No number is in two texts, and none comes to the end of the vocabulary.
    size = min(sizes["vocab_size"] for sizes in PAIRS[args.pair])
    longest = PROMPT_LENGTH + 2 * args.num_tokens
    room = (size - longest) // (2 * args.num_examples)
    if room < longest:
        parser.error(f"{2 * args.num_examples} texts of up to {longest} numbers don't fit into {size}: ask for fewer.")

    print("| step | seconds | peak GB | what came of it |\n| --- | --- | --- | --- |")

    def step(name: str, call: Callable[[], Any], report: Callable[[Any], str]) -> Any:
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        seconds, result = timed(args.device, call)
        peak = "" if args.device == "cpu" else f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"
        print(f"| {name} | {seconds:.1f} | {peak} | {report(result)} |", flush=True)
        return result

    def sizes(made: tuple) -> str:
        return " and ".join(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}B" for model in made[:2])

    model, draft, important = step("make the pair", functools.partial(planted_pair, args), sizes)
    tokenizer, task = number_tokenizer(size), Jumps(important)
    examples = [{"start": 1 + i * room} for i in range(2 * args.num_examples)]

    def mine():
        return mine_mismatches(
            model,
            draft,
            tokenizer,
            examples[: args.num_examples],
            task,
            max_new_tokens=args.num_tokens,
            batch_size=args.num_examples,
            num_assistant_tokens=args.draft_length,
        )

    def labels(mined) -> str:
        right = sum(important[row["candidate_token_id"]].item() == bool(row["label"]) for row in mined)
        return f"{right} of {len(mined)} labels are what was planted"

    mined = step("mine", mine, labels)
    with tempfile.TemporaryDirectory() as folder:

        def train() -> JudgeTrainer:
            arguments = JudgeTrainingArguments(folder, overwrite_output_dir=True, validation_size=0.25, recall=1.0)
            trainer = JudgeTrainer(arguments, mined)
            trainer.train()
            return trainer

        trainer = step("train", train, lambda trainer: f"validation ROC-AUC {trainer.state.best_metric:.3f}")
        step("save", trainer.save_model, lambda _: "")
        judge = step(
            "load", lambda: AutoJudge.from_pretrained(folder), lambda judge: f"threshold {judge.config.threshold:.2g}"
        )

    shared = {"assistant_model": draft, "return_dict_in_generate": True}
    loop = functools.partial(judge_decoding, assistant_model=draft, num_assistant_tokens=args.draft_length)
    # Stock generation refuses an assistant to a hybrid, which has no caches of a fixed shape either.
    is_hybrid = model._is_stateful
    lossless = {**shared, "assistant_model": None if is_hybrid else draft, "custom_generate": loop}
    judged = {**shared, "judge": judge, "num_assistant_tokens": args.draft_length}
    static = {**judged, "cache_implementation": "static"}

    def decode(**arguments) -> tuple[int, list]:
        outputs, right = [], 0
        for example in examples[args.num_examples :]:
            inputs = tokenizer(task.prompt(example, tokenizer), return_tensors="pt", return_token_type_ids=False)
            output = model.generate(
                **inputs.to(args.device), do_sample=False, max_new_tokens=args.num_tokens, **arguments
            )
            outputs.append(output)
            right += task.important_jumps(example, output.sequences[0, PROMPT_LENGTH:].tolist()) == []
        return right, outputs

    def result(decoded: tuple[int, list]) -> str:
        right, outputs = decoded
        cycles = sum(int(output.num_target_forwards) for output in outputs)
        per_cycle = len(outputs) * (args.num_tokens - 1) / cycles
        return f"{per_cycle:.2f} tokens per cycle, {right} of {len(outputs)} texts without an important jump"

    ways = {"decode, lossless": lossless, "decode, judged": judged}
    if not is_hybrid:
        ways |= {"decode, judged, static, compiling": static, "decode, judged, static, again": static}
    for name, arguments in ways.items():
        step(name, functools.partial(decode, **arguments), result)


if __name__ == "__main__":
    main()
