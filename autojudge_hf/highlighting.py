# SPDX-License-Identifier: Apache-2.0
"""A judged response as coloured text: which tokens the target wouldn't have written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .mined_rows import inner_text
from .model_properties import input_device
from .verification import of_candidates


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def highlight_accepted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequence: torch.LongTensor, prompt_length: int
) -> str:
    """The response of a greedily decoded `sequence`, with the tokens the target wouldn't have written in colour.

    One forward of the target over the whole sequence of shape `(length,)`, without padding; in a judged response these
    tokens are the mismatches that the judge accepted. Colours are ANSI codes, for a terminal.
    """
    sequence = sequence.to(input_device(model))
    response = sequence[prompt_length:]
    logits = model(sequence[None, :-1]).logits[:, prompt_length - 1 :]
    best, written = logits.amax(dim=-1), of_candidates(logits, response[None])
    # In half precision a tie falls either way, with two roundings in between at most.
    (is_own,) = written >= best - 2 * torch.finfo(logits.dtype).eps * best.abs()
    parts = []
    for token, own in zip(response.tolist(), is_own.tolist()):
        if token in tokenizer.all_special_ids:
            continue
        text = inner_text(tokenizer, [token])
        parts.append(text if own else f"\033[30;43m{text}\033[0m")
    return "".join(parts)
