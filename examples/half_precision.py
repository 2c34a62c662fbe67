# SPDX-License-Identifier: Apache-2.0
"""How often lossless decoding and plain greedy decoding part in half precision, and how near the tie was.

    python examples/half_precision.py

A pass over several tokens sums in another order than one over a single token does, and where the two best tokens are
a rounding apart, the other one may win. What follows such a tie is another text. (In fp32 none is that near.)
"""

from __future__ import annotations

import argparse
import functools

import torch
from arguments import positive_int
from embedded_pair import MAX_NEW_TOKENS, load_pair, num_problems, read_problems
from tqdm.auto import tqdm

from autojudge_hf import judge_decoding
from autojudge_hf.tasks import GSM8K


def spacings(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far the best is from the second best, in steps of `dtype` at that size: shape `(n, v)` to `(n,)`."""
    best, second = logits.float().topk(2, dim=-1).values.unbind(-1)
    step = torch.finfo(dtype).eps * 2.0 ** best.abs().clamp(min=1e-6).log2().floor()
    return (best - second) / step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--num_problems", type=num_problems, default=200)
    parser.add_argument("--num_assistant_tokens", type=positive_int, default=8)
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    args = parser.parse_args()
    torch.set_num_threads(2)

    problems, task = read_problems("test", args.num_problems), GSM8K()
    header = (
        "dtype|texts that part|of|a tie every ... tokens|spacings at the ties, median and most|right, plain|lossless"
    )
    rows = ["| " + header.replace("|", " | ") + " |", "|" + " --- |" * (header.count("|") + 1)]
    for dtype in [getattr(torch, name) for name in args.dtypes]:
        model, draft, tokenizer = load_pair(dtype)
        lossless = functools.partial(
            judge_decoding, assistant_model=draft, num_assistant_tokens=args.num_assistant_tokens
        )
        options = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, "return_dict_in_generate": True}
        gaps, num_tokens, right = [], 0, [0, 0]
        for problem in tqdm(problems, desc=str(dtype)):
            prompt = task.prompt(problem, tokenizer)
            inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
            plain = model.generate(**inputs, **options, output_logits=True)
            ours = model.generate(**inputs, **options, assistant_model=draft, custom_generate=lossless)
            texts = [x.sequences[0, inputs["input_ids"].shape[1] :] for x in (plain, ours)]
            for i, text in enumerate(texts):
                (answer,) = task.extract_answers([problem], [tokenizer.decode(text, skip_special_tokens=True)])
                right[i] += task.is_correct(problem, answer)
            shared = min(map(len, texts))
            parted = (texts[0][:shared] != texts[1][:shared]).nonzero()
            # Behind the first difference the texts have nothing to do with each other.
            num_tokens += int(parted[0]) + 1 if len(parted) else shared
            if len(parted):
                gaps.append(spacings(plain.logits[int(parted[0])], dtype).item())
        every = f"{num_tokens / len(gaps):.0f}" if gaps else ""
        how_near = f"{sorted(gaps)[len(gaps) // 2]:.1f}, {max(gaps):.1f}" if gaps else ""
        cells = [str(dtype).removeprefix("torch."), len(gaps), len(problems), every, how_near, *right]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
