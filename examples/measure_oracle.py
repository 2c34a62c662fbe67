# SPDX-License-Identifier: Apache-2.0
"""How much of what any judge could gain a judge gains: beside an oracle, on the embedded pair.

    python examples/measure_oracle.py --task livecodebench --judge runs/judge_code/judge

The oracle knows the labels that the search finds on the test problems themselves, and so stops at important mismatches
only; its answers are the target's by construction. What is counted is how many cycles the way takes that the search
went. A cycle's own last token is taken to lie on that way, too.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from arguments import positive_int
from embedded_pair import MAX_NEW_TOKENS, load_pair
from measure_judge import TASKS, mine, take
from tqdm import tqdm

from autojudge_hf import AutoJudge, evaluate_judge


def cycles(start: int, end: int, important: list[int], draft_length: int) -> int:
    """Cycles from `start` to `end`, behind the token of the prefill, if only `important` positions end a draft."""
    position, number = start + 1, 0
    while position < end:
        stop = next((p for p in important if p >= position), end)
        position += min(stop - position, draft_length) + 1
        number += 1
    return number


def way_of_the_search(model, tokenizer, prompt: list[int], rows: list[dict]) -> tuple[int, int, list[int]]:
    """Where the response starts and ends after the search's last decision, and its important positions."""
    tokens = prompt
    if rows:
        last = rows[-1]
        tokens = [*last["input_ids"], last["target_token_id"] if last["label"] else last["candidate_token_id"]]
    room = len(prompt) + MAX_NEW_TOKENS - len(tokens)
    if room > 0 and tokens[-1] != tokenizer.eos_token_id:
        ids = torch.tensor([tokens])
        mask = torch.ones_like(ids)
        tokens = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=room)[0].tolist()
    return len(prompt), len(tokens), [row["position"] for row in rows if row["label"]]


def ways_of_the_search(task: str, problems: list[dict], folder: Path) -> list[tuple[int, int, list[int]]]:
    """`way_of_the_search` of each problem, all of which are mined into `folder`."""
    model, _, tokenizer = load_pair()
    mined = mine(task, problems, folder, features_dtype=None)
    rows = mined.remove_columns(["features", "pair"]).to_list()
    print(f"{len(problems)} problems, {len(rows)} mismatches, {sum(mined['label']) / max(1, len(rows)):.1%} important")
    found = {i: list(group) for i, group in itertools.groupby(rows, key=lambda row: row["example_id"])}
    ways = []
    for i, problem in enumerate(tqdm(problems, desc="oracle", unit="problem")):
        prompt = tokenizer.encode(TASKS[task][0].prompt(problem, tokenizer), add_special_tokens=False)
        ways.append(way_of_the_search(model, tokenizer, prompt, found.get(i, [])))
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", choices=list(TASKS), required=True)
    parser.add_argument("--judge", required=True, help="folder of a judge, threshold included")
    parser.add_argument("--output_dir", default="runs/measure_oracle", help="what is mined is kept here")
    parser.add_argument("--seed", type=int, default=1, help="seed of the test problems")
    parser.add_argument("--num_test", type=positive_int, default=300, help="test problems; the oracle mines them all")
    parser.add_argument("--draft_lengths", type=positive_int, nargs="+", default=[16, 32])
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, draft, tokenizer = load_pair()
    problems = take(args.task, "test", args.seed, args.num_test)
    judge = AutoJudge.from_pretrained(args.judge)
    ways = ways_of_the_search(args.task, problems, Path(args.output_dir) / f"{args.task}-{args.seed}-{args.num_test}")
    for length in args.draft_lengths:
        lossless, judged = evaluate_judge(
            model,
            draft,
            tokenizer,
            problems,
            TASKS[args.task][0],
            judge,
            thresholds=[judge.config.threshold],
            num_assistant_tokens=length,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=32,
        )
        num_tokens = sum(end - start - 1 for start, end, _ in ways)
        oracle = num_tokens / sum(cycles(*way, length) for way in ways)
        base, gained = lossless["tokens_per_cycle"], judged["tokens_per_cycle"]
        print(
            f"draft length {length}: lossless {base:.2f} tokens/cycle at {lossless['accuracy']:.1%}, judged "
            f"{gained:.2f} (x{gained / base:.2f}) at {judged['accuracy']:.1%}, oracle {oracle:.2f} "
            f"(x{oracle / base:.2f}): {(gained - base) / (oracle - base):.0%} of its gain"
        )


if __name__ == "__main__":
    main()
