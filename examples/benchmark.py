# SPDX-License-Identifier: Apache-2.0
"""Speed of every way to decode with the embedded pair, in one run: warm-up left out, rounds interleaved.

    python examples/benchmark.py --judge runs/quickstart/judge

Each row is the median of the rounds, so that a busy moment of the machine hits all rows alike.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autojudge_hf import AutoJudge, judge_decoding
from autojudge_hf.evaluation import measure_decoding
from autojudge_hf.tasks import GSM8K


PAIR = Path(__file__).parent / "tiny_pair"
MAX_NEW_TOKENS = 320


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
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8])
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

    # Name, batch size, settings of the assistant, arguments of `generate`.
    ways: list[tuple[str, int, dict, dict]] = [("target alone", b, {}, {}) for b in args.batch_sizes]
    ways.append(("stock, its defaults", 1, {}, {"assistant_model": draft}))
    for k in args.draft_lengths:
        fixed = {"num_assistant_tokens": k, "assistant_confidence_threshold": 0.0}
        ways.append((f"stock, {k}", 1, fixed, {"assistant_model": draft}))
        confident = {**fixed, "assistant_confidence_threshold": 0.4}
        ways.append((f"stock, {k}, stops when unsure", 1, confident, {"assistant_model": draft}))
        heuristic = {**fixed, "num_assistant_tokens_schedule": "heuristic"}
        ways.append((f"stock, {k}, its schedule", 1, heuristic, {"assistant_model": draft}))
    ours = {"assistant_model": draft, "return_dict_in_generate": True}
    for k in [*args.draft_lengths, "adaptive"]:
        lossless = functools.partial(judge_decoding, assistant_model=draft, num_assistant_tokens=k)
        judged = {**ours, "judge": judge, "num_assistant_tokens": k}
        for b in args.batch_sizes:
            ways.append((f"ours lossless, {k}", b, {}, {**ours, "custom_generate": lossless}))
            ways.append((f"ours judged, {k}", b, {}, judged))
        # Asks the judge about every mismatch and accepts none: what judging costs.
        ways.append((f"ours, judge rejects all, {k}", 1, {}, {**judged, "judge_threshold": 1e-12}))

    rows: list[list[dict]] = [[] for _ in ways]
    for number in range(args.rounds):
        for row, (name, batch_size, settings, arguments) in zip(rows, ways):
            with assistant_settings(draft, **settings):
                description = f"round {number + 1}: {name}, batch {batch_size}"
                row.append(measure(description, batch_size=batch_size, **arguments))

    print(f"\n{args.num_problems} problems, {args.rounds} rounds, {torch.get_num_threads()} threads, fp32")
    print(f"{'decoding, draft length':32}  batch  accuracy  tokens/cycle  tokens/s (lowest to highest)")
    for row, (name, batch_size, _, _) in zip(rows, ways):
        speeds = [result["tokens_per_second"] for result in row]
        print(
            f"{name:32}  {batch_size:5}  {row[0]['accuracy']:8.1%}  {row[0]['tokens_per_cycle']:12.2f}"
            f"  {statistics.median(speeds):8.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
        )


if __name__ == "__main__":
    main()
