# SPDX-License-Identifier: Apache-2.0
"""Mined mismatches as a dataset: its columns, and what `pair` says of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


def pairs_in(mined: datasets.Dataset) -> set[str]:
    """The values of the column `pair`, one for each mining that the rows come from."""
    # `Dataset.unique` would copy the whole of a split, under a progress bar.
    return set(mined.with_format("arrow")["pair"][:].unique().to_pylist())


def pair_of(mined: datasets.Dataset) -> dict[str, Any]:
    """What the column `pair` says: which models were mined, and how.

    Raises:
        ValueError: for rows of several minings, or none.
    """
    pairs = pairs_in(mined)
    if len(pairs) != 1:
        raise ValueError(f"The rows come from {len(pairs)} different minings, expected one.")
    return json.loads(pairs.pop())


def features_of(pair: dict[str, Any]) -> datasets.Features:
    """The columns, and their types."""
    import datasets

    integer, text = datasets.Value("int64"), datasets.Value("string")
    return datasets.Features(
        {
            "example_id": integer,
            "input_ids": datasets.List(integer),
            "prompt_length": integer,
            "position": integer,
            "candidate_token_id": integer,
            "target_token_id": integer,
            "candidate_token": text,
            "target_token": text,
            "label": integer,
            "features": datasets.List(datasets.Value(pair["features_dtype"])),
            "pair": text,
        }
    )


def to_dataset(rows: list[dict[str, Any]], pair: dict[str, Any]) -> datasets.Dataset:
    import datasets

    features = features_of(pair)
    constant = json.dumps(pair, sort_keys=True)
    columns = {name: [row[name] for row in rows] for name in features if name != "pair"}
    return datasets.Dataset.from_dict({**columns, "pair": [constant] * len(rows)}, features=features)


def inner_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """What tokens say inside a text: at its start, SentencePiece's lose blanks, which a token's second time has."""
    once, twice = (tokenizer.decode(token_ids[:1] * n) for n in (1, 2))
    return " " * (len(twice) - 2 * len(once)) + tokenizer.decode(token_ids)
