# SPDX-License-Identifier: Apache-2.0
"""The embedded pair, and the problems that lie beside it, for the scripts that measure on them."""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import torch
from arguments import positive_int
from transformers import AutoModelForCausalLM, AutoTokenizer


PAIR = Path(__file__).parent / "tiny_pair"
#: Enough for every response to these problems.
MAX_NEW_TOKENS = 320
#: In the file of each split.
NUM_PROBLEMS = 500


@functools.cache
def load_pair(dtype: torch.dtype = torch.float32) -> tuple:
    """Target, draft and their tokenizer."""
    models = (AutoModelForCausalLM.from_pretrained(PAIR / role, dtype=dtype).eval() for role in ("target", "draft"))
    return *models, AutoTokenizer.from_pretrained(PAIR / "target")


def num_problems(text: str) -> int:
    """A number of problems that a split holds, from an argument."""
    number = positive_int(text)
    if number > NUM_PROBLEMS:
        raise argparse.ArgumentTypeError(f"must be at most {NUM_PROBLEMS}, which is all there are, got {number}.")
    return number


def read_problems(split: str, n: int) -> list[dict]:
    """The first `n` word problems of a split."""
    with open(PAIR / f"gsm8k_{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(n), file)]
