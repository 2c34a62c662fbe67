# SPDX-License-Identifier: Apache-2.0
"""Speed of every way to decode with the embedded pair, in one run: warm-up left out, rounds interleaved.

    python examples/benchmark.py --judge runs/quickstart/judge

Each row is the median of the rounds, so that a busy moment of the machine hits all rows alike, and is compared with a
row measured just before.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompileConfig

from autojudge_hf import AutoJudge, judge_decoding
from autojudge_hf.evaluation import measure_decoding
from autojudge_hf.tasks import GSM8K


PAIR = Path(__file__).parent / "tiny_pair"
MAX_NEW_TOKENS = 320


class Way(NamedTuple):
    """A row: `arguments` of `generate`, `settings` of the assistant, and the row it is compared with."""

    name: str
    batch_size: int
    arguments: dict[str, Any]
    settings: dict[str, Any] = {}
    reference: str = ""


@contextlib.contextmanager
def assistant_settings(model, **values):
    """Stock assisted generation reads its settings from the assistant's generation config."""
    config = model.generation_config
    before = {name: getattr(config, name) for name in values}
    config.update(**values)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--judge", default="runs/quickstart/judge", help="folder of a judge for the embedded pair")
    parser.add_argument("--num_problems", type=int, default=16, help="held-out problems, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--draft_lengths", type=int, nargs="+", default=[4, 8, 16], help="and adaptive, ours only")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8], help="the first is compared with")
    args = parser.parse_args()
    torch.set_num_threads(2)

    judge = AutoJudge.from_pretrained(args.judge)
    tokenizer = AutoTokenizer.from_pretrained(PAIR / "target")
    model, draft = (
        AutoModelForCausalLM.from_pretrained(PAIR / role, dtype=torch.float32).eval() for role in ("target", "draft")
    )
    with open(PAIR / "gsm8k_test.jsonl", encoding="utf-8") as file:
        problems = [json.loads(line) for _, line in zip(range(args.num_problems), file)]
    measure = functools.partial(
        measure_decoding, model, tokenizer, problems, GSM8K(), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    )

    # Rows that are compared stand together, since a machine's speed drifts.
    ways: list[Way] = [Way("target alone", b, {}, reference="target alone") for b in args.batch_sizes]
    stock = {"assistant_model": draft}
    ways.append(Way("stock, its defaults", 1, stock, reference="target alone"))
    ours = {**stock, "return_dict_in_generate": True}
    compiled = {"cache_implementation": "static", "compile_config": CompileConfig(dynamic=False)}
    for k in [*args.draft_lengths, "adaptive"]:
        lossless = {**ours, "custom_generate": functools.partial(judge_decoding, **stock, num_assistant_tokens=k)}
        judged = {**ours, "judge": judge, "num_assistant_tokens": k}
        # Asks the judge about every mismatch and accepts none: what judging costs.
        rejecting = {**judged, "judge_threshold": 1e-12}
        beside = "stock, its defaults"
        if k != "adaptive":
            fixed = {"num_assistant_tokens": k, "assistant_confidence_threshold": 0.0}
            unsure = {**fixed, "assistant_confidence_threshold": 0.4}
            scheduled = {**fixed, "num_assistant_tokens_schedule": "heuristic"}
            beside = f"stock, {k}"
            ways.append(Way(f"stock, {k}, stops when unsure", 1, stock, unsure, "target alone"))
            ways.append(Way(f"stock, {k}, its schedule", 1, stock, scheduled, "target alone"))
            ways.append(Way(beside, 1, stock, fixed, "target alone"))
        ways.append(Way(f"ours lossless, {k}", 1, lossless, reference=beside))
        ways.append(Way(f"ours, judge rejects all, {k}", 1, rejecting, reference=f"ours lossless, {k}"))
        ways.append(Way(f"ours lossless, compiled, {k}", 1, {**lossless, **compiled}, reference=beside))
        ways.append(Way(f"ours judged, compiled, {k}", 1, {**judged, **compiled}, reference=beside))
        for b in args.batch_sizes[1:]:
            ways.append(Way(f"ours lossless, {k}", b, lossless, reference=f"ours lossless, {k}"))
        for b in args.batch_sizes:
            ways.append(Way(f"ours judged, {k}", b, judged, reference=f"ours lossless, {k}"))

    rows: list[list[dict]] = [[] for _ in ways]
    for number in range(args.rounds):
        for row, way in zip(rows, ways):
            with assistant_settings(draft, **way.settings):
                description = f"round {number + 1}: {way.name}, batch {way.batch_size}"
                row.append(measure(description, batch_size=way.batch_size, **way.arguments))

    speeds = {
        (way.name, way.batch_size): [result["tokens_per_second"] for result in row] for way, row in zip(ways, rows)
    }
    print(f"\n{args.num_problems} problems, {args.rounds} rounds, {torch.get_num_threads()} threads, fp32")
    print("times: the median over rounds of the speed, divided by that of the reference, batch 1, in the same round")
    print(f"{'decoding, draft length':32}  batch  accuracy  tokens/cycle  tokens/s (from, to)  times  of")
    for way, row in zip(ways, rows):
        own, reference = speeds[way.name, way.batch_size], speeds[way.reference, args.batch_sizes[0]]
        print(
            f"{way.name:32}  {way.batch_size:5}  {row[0]['accuracy']:8.1%}  {row[0]['tokens_per_cycle']:12.2f}"
            f"  {statistics.median(own):6.0f} ({min(own):5.0f}, {max(own):5.0f})"
            f"  {statistics.median(a / b for a, b in zip(own, reference)):5.2f}  {way.reference}"
        )
    medians = {name: statistics.median(row) for (name, batch), row in speeds.items() if batch == args.batch_sizes[0]}
    stock_at_best = max(speed for name, speed in medians.items() if name.startswith("stock"))
    for ours in ("ours lossless", "ours judged", "ours lossless, compiled", "ours judged, compiled"):
        fixed = max(medians[f"{ours}, {k}"] for k in args.draft_lengths)
        adaptive = medians[f"{ours}, adaptive"]
        print(
            f"{ours}: at its best fixed length {fixed / stock_at_best:.2f} times stock at its best, "
            f"adaptive {adaptive / fixed:.2f} times that"
        )


if __name__ == "__main__":
    main()
