# SPDX-License-Identifier: Apache-2.0
"""Speed of every way to decode with the embedded pair, in one run.

    python examples/benchmark.py --judge runs/quickstart/judge

A machine's speed drifts by more than what is to be seen, and so the ways take turns: each problem is decoded by all of
them, in random order, before the next one is. A first round is left out: it warms up, compiles, and lets adaptive
lengths settle. A way's time for a problem is its median over the other rounds. Every lossless text is compared with
that of the target alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from arguments import check_ways, positive_int
from embedded_pair import MAX_NEW_TOKENS, load_pair, num_problems, read_problems
from tqdm.auto import tqdm
from transformers import CompileConfig

from autojudge_hf import AutoJudge, judge_decoding
from autojudge_hf.measuring import decode_batch
from autojudge_hf.tasks import GSM8K


class Way(NamedTuple):
    """A row: `arguments` of `generate`, `settings` of the assistant, and the row of batch 1 it is compared with."""

    name: str
    draft_length: int | str
    batch_size: int
    arguments: dict[str, Any]
    settings: dict[str, Any]
    reference: tuple[str, int | str]
    is_lossless: bool = True


@contextlib.contextmanager
def assistant_settings(model, **values) -> Iterator[None]:
    """Stock assisted generation reads its settings from the assistant's generation config."""
    config = model.generation_config
    before = {name: getattr(config, name) for name in values}
    config.update(**values)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def ways_to_decode(
    draft, judge: AutoJudge | None, draft_lengths: list[int | str], batch_sizes: list[int]
) -> list[Way]:
    alone, stock = ("target alone", ""), {"assistant_model": draft}
    ways = [Way(*alone, b, {}, {}, alone) for b in batch_sizes]
    ways.append(Way("stock, its defaults", "", 1, stock, {}, alone))
    ours = {**stock, "return_dict_in_generate": True}
    compiled = {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=False)}
    for k in draft_lengths:
        lossless = {**ours, "custom_generate": functools.partial(judge_decoding, **stock, num_assistant_tokens=k)}
        judged = {**ours, "judge": judge, "num_assistant_tokens": k}
        # Asks the judge about every mismatch and accepts none: what judging costs.
        rejecting = {**judged, "judge_threshold": 1e-12}
        beside, own = ("stock, its defaults", ""), ("ours lossless", k)
        if k != "adaptive":
            fixed = {"num_assistant_tokens": k, "assistant_confidence_threshold": 0.0}
            unsure = {**fixed, "assistant_confidence_threshold": 0.4}
            scheduled = {**fixed, "num_assistant_tokens_schedule": "heuristic"}
            beside = ("stock", k)
            ways.append(Way("stock, stops when unsure", k, 1, stock, unsure, alone))
            ways.append(Way("stock, its schedule", k, 1, stock, scheduled, alone))
            ways.append(Way(*beside, 1, stock, fixed, alone))
        ways.append(Way(*own, 1, lossless, {}, beside))
        ways.append(Way("ours, judge rejects all", k, 1, rejecting, {}, own))
        ways.append(Way("ours lossless, compiled", k, 1, {**lossless, **compiled}, {}, beside))
        ways.append(Way("ours judged, compiled", k, 1, {**judged, **compiled}, {}, beside, is_lossless=False))
        ways += [Way("ours lossless", k, b, lossless, {}, own) for b in batch_sizes[1:]]
        ways += [Way("ours judged", k, b, judged, {}, own, is_lossless=False) for b in batch_sizes]
    return ways


def only(parts: list[str], ways: list[Way]) -> list[Way]:
    """Ways whose names have one of these parts, what they are compared with, what that is compared with, and so on."""
    asked = [way for way in ways if any(part in way.name for part in parts)]
    alone = {(way.name, way.draft_length): way for way in ways if way.batch_size == 1}
    needed = {("target alone", "")}
    for way in asked:
        reference = way.reference
        while reference not in needed:
            needed.add(reference)
            reference = alone[reference].reference
    return [way for way in ways if way in asked or (way.batch_size == 1 and (way.name, way.draft_length) in needed)]


def decode(model, draft, inputs, way: Way) -> tuple[float, list[list[int]], int]:
    """Seconds, every row's response up to its end, and target forwards with the prefill, rows added up."""
    with assistant_settings(draft, **way.settings):
        started = time.perf_counter()
        responses, forwards, decisions = decode_batch(
            model, inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, **way.arguments
        )
        seconds = time.perf_counter() - started
    # Ours counts cycles, of which the prefill isn't one.
    prefills = 0 if decisions is None else len(responses)
    return seconds, responses, sum(forwards) + prefills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--judge", default="runs/quickstart/judge", help="folder of a judge for the embedded pair")
    parser.add_argument(
        "--num_problems", type=num_problems, default=16, help="held-out problems, a multiple of the batch sizes"
    )
    parser.add_argument("--rounds", type=positive_int, default=4, help="behind the one that is left out")
    parser.add_argument(
        "--draft_lengths", type=positive_int, nargs="+", default=[4, 8, 16], help="and adaptive, ours only"
    )
    parser.add_argument(
        "--ways", nargs="+", help="only rows whose names have one of these parts, and what they are compared with"
    )
    parser.add_argument("--batch_sizes", type=positive_int, nargs="+", default=[1, 4, 8], help="the first one is 1")
    args = parser.parse_args()
    if args.batch_sizes[0] != 1 or any(args.num_problems % b for b in args.batch_sizes):
        parser.error(f"--batch_sizes must begin with 1 and divide --num_problems, got {args.batch_sizes}.")
    draft_lengths = [*args.draft_lengths, "adaptive"]
    check_ways(parser, args.ways, ways_to_decode(None, None, draft_lengths, args.batch_sizes))
    torch.set_num_threads(2)

    judge = AutoJudge.from_pretrained(args.judge)
    model, draft, tokenizer = load_pair()
    problems, task = read_problems("test", args.num_problems), GSM8K()
    # Rows of a batch wait for its longest.
    prompts = sorted((task.prompt(problem, tokenizer) for problem in problems), key=len)
    options = {"return_tensors": "pt", "padding": True, "padding_side": "left", "add_special_tokens": False}
    batches = {
        b: [tokenizer(prompts[i : i + b], **options) for i in range(0, len(prompts), b)] for b in args.batch_sizes
    }
    ways = ways_to_decode(draft, judge, draft_lengths, args.batch_sizes)
    if args.ways:
        ways = only(args.ways, ways)

    seconds: dict[tuple, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    texts: dict[tuple, list[list[int]]] = defaultdict(list)
    forwards: dict[tuple, int] = defaultdict(int)
    order, turns = random.Random(0), [(b, i) for b in args.batch_sizes for i in range(len(batches[b]))]
    turns.sort(key=lambda turn: math.prod(turn) // max(args.batch_sizes))  # a batch right behind its problems
    for number in range(args.rounds + 1):
        for b, i in tqdm(turns, desc=f"round {number} of {args.rounds}"):
            taking_part = [way for way in ways if way.batch_size == b]
            for way in order.sample(taking_part, k=len(taking_part)):
                spent, responses, num_forwards = decode(model, draft, batches[b][i], way)
                key = way.name, way.draft_length, b
                if number:
                    seconds[key][i].append(spent)
                if number == args.rounds:
                    texts[key] += responses
                    forwards[key] += num_forwards

    num_tokens = {key: sum(map(len, responses)) for key, responses in texts.items()}
    speed = {key: num_tokens[key] / sum(map(statistics.median, by.values())) for key, by in seconds.items()}
    rounds = {
        key: [num_tokens[key] / sum(by[i][r] for i in by) for r in range(args.rounds)] for key, by in seconds.items()
    }
    print(f"\n{len(prompts)} problems, {args.rounds} rounds, {torch.get_num_threads()} threads, fp32")
    print("times: tokens/s by those of another row of batch 1; in brackets the least and the most of any round\n")
    header = "decoding|draft length|batch|tokens per forward|tokens/s|times|of"
    print("| " + header.replace("|", " | ") + " |\n|" + " --- |" * (header.count("|") + 1))
    for way in ways:
        key, reference = (way.name, way.draft_length, way.batch_size), (*way.reference, 1)
        ratios = [own / other for own, other in zip(rounds[key], rounds[reference])]
        per_forward = f"{num_tokens[key] / forwards[key]:.2f}"
        times = f"{speed[key] / speed[reference]:.3f} ({min(ratios):.2f}, {max(ratios):.2f})"
        compared = f"{way.reference[0]} {way.reference[1]}".strip()
        cells = [way.name, way.draft_length, way.batch_size, per_forward, f"{speed[key]:.0f}", times, compared]
        print("| " + " | ".join(map(str, cells)) + " |")
    lossless = {(way.name, way.draft_length, way.batch_size) for way in ways if way.is_lossless}
    same = sum(texts[key] == texts["target alone", "", 1] for key in lossless)
    print(f"\n{same} of {len(lossless)} lossless ways give the target's own tokens for every problem.")
    stock_at_best = max((value for (name, _, _), value in speed.items() if name.startswith("stock")), default=math.nan)
    for name in ("ours lossless", "ours judged", "ours lossless, compiled", "ours judged, compiled"):
        if (name, "adaptive", 1) in speed:
            fixed = max(speed[name, k, 1] for k in args.draft_lengths)
            print(
                f"{name}: at its best fixed length {fixed / stock_at_best:.2f} times stock at its best, "
                f"adaptive {speed[name, 'adaptive', 1] / fixed:.2f} times that"
            )


if __name__ == "__main__":
    main()
