# SPDX-License-Identifier: Apache-2.0
"""What mining costs beside a literal transcription of the search, on the embedded pair, in one run.

    python examples/measure_mining.py

The transcription calls `model.generate` for every continuation. Both must find the same mismatches and labels.
"""

from __future__ import annotations

import argparse
import contextlib
import time

import torch
from arguments import positive_int
from embedded_pair import MAX_NEW_TOKENS, load_pair, num_problems, read_problems
from tqdm import tqdm

from autojudge_hf import mine_mismatches
from autojudge_hf.tasks import GSM8K


@contextlib.contextmanager
def counted(model):
    """Counts the model's forwards, and the positions they compute: rows times new tokens."""
    counts = {"forwards": 0, "positions": 0}

    def count(module, args, kwargs):
        counts["forwards"] += 1
        counts["positions"] += kwargs["input_ids"].numel()

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()


@torch.no_grad()
def transcription(model, assistant, tokenizer, task, prompt):
    """Algorithm 1 (arXiv 2504.20039), line by line; yields `(position, candidate, target_token, label)`."""

    def respond(prefix):
        room = len(prompt) + MAX_NEW_TOKENS - len(prefix)
        if room == 0 or (len(prefix) > len(prompt) and prefix[-1] == tokenizer.eos_token_id):
            return prefix
        return model.generate(input_ids=torch.tensor([prefix]), do_sample=False, max_new_tokens=room)[0].tolist()

    def answer(tokens):
        return task.extract_answers([{}], [tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)])[0]

    response, t = respond(prompt), len(prompt)
    reference = answer(response)
    while reference is not None and t < len(response):
        choices = assistant(input_ids=torch.tensor([response[:-1]])).logits[0].argmax(dim=-1).tolist()
        while t < len(response) and choices[t - 1] == response[t]:
            t += 1
        if t < len(response):
            candidate = choices[t - 1]
            alternative = respond([*response[:t], candidate])
            important = not task.equivalent(answer(alternative), reference)
            yield t, candidate, response[t], int(important)
            response = response if important else alternative
            t += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--num_problems", type=num_problems, default=64)
    parser.add_argument(
        "--num_assistant_tokens", type=positive_int, default=8, help="draft length of our continuations"
    )
    parser.add_argument("--batch_sizes", type=positive_int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, draft, tokenizer = load_pair()
    problems, task = read_problems("train", args.num_problems), GSM8K()

    def literal():
        rows = []
        for i, problem in enumerate(tqdm(problems, desc="transcription")):
            prompt = tokenizer.encode(task.prompt(problem, tokenizer), add_special_tokens=False)
            rows += [(i, *row) for row in transcription(model, draft, tokenizer, task, prompt)]
        return rows

    def ours(batch_size):
        options = {"num_assistant_tokens": args.num_assistant_tokens, "batch_size": batch_size}
        mined = mine_mismatches(model, draft, tokenizer, problems, task, max_new_tokens=MAX_NEW_TOKENS, **options)
        columns = ("example_id", "position", "candidate_token_id", "target_token_id", "label")
        return list(zip(*(mined[name][:] for name in columns)))

    runs = [("transcription", literal)]
    runs += [(f"ours, {b} at a time", lambda b=b: ours(b)) for b in args.batch_sizes]
    results = []
    for name, run in runs:
        with counted(model) as counts:
            started = time.perf_counter()
            rows = run()
            results.append((name, rows, time.perf_counter() - started, counts))
    (_, expected, seconds, baseline), *_ = results

    print(f"\n{len(problems)} problems, {len(expected)} mismatches, {torch.get_num_threads()} threads, fp32")
    print(f"{'':20}  seconds  (times)  target forwards  (times)  target positions  (times)  same rows")
    for name, rows, took, counts in results:
        print(
            f"{name:20}  {took:7.0f}  {seconds / took:7.1f}  {counts['forwards']:15}"
            f"  {baseline['forwards'] / counts['forwards']:7.1f}  {counts['positions']:16}"
            f"  {baseline['positions'] / counts['positions']:7.1f}  {'yes' if rows == expected else 'NO'}"
        )


if __name__ == "__main__":
    main()
