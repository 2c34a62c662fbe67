# SPDX-License-Identifier: Apache-2.0
"""The embedded pair, and the problems that lie beside it, for the scripts that measure on them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


PAIR = Path(__file__).parent / "tiny_pair"
#: Enough for every response to these problems.
MAX_NEW_TOKENS = 320


@functools.cache
def load_pair(dtype: torch.dtype = torch.float32) -> tuple:
    """Target, draft and their tokenizer."""
    models = (AutoModelForCausalLM.from_pretrained(PAIR / role, dtype=dtype).eval() for role in ("target", "draft"))
    return *models, AutoTokenizer.from_pretrained(PAIR / "target")


def read_problems(split: str, n: int) -> list[dict]:
    """The first `n` word problems of a split."""
    with open(PAIR / f"gsm8k_{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(n), file)]
