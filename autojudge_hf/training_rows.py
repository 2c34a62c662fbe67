# SPDX-License-Identifier: Apache-2.0
"""Mined rows as a trainer takes them: of one mining, split by example, as checked arrays."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from .mined_rows import pairs_in


if TYPE_CHECKING:
    import datasets


REQUIRED_COLUMNS = ("example_id", "label", "features", "pair")


def common_pair(known: str | None, dataset: datasets.Dataset, name: str) -> str:
    """The value of the column `pair` that all rows share, with those of earlier datasets (`known`).

    Raises:
        ValueError: for rows of different minings, and for what isn't a dataset of mined mismatches.
    """
    pairs = _pairs(dataset, name) | ({known} if known is not None else set())
    if len(pairs) == 1:
        return pairs.pop()
    read = [json.loads(pair) for pair in sorted(pairs)]
    differences = [
        f"{key}: " + " or ".join(dict.fromkeys(json.dumps(pair.get(key)) for pair in read))
        for key in sorted(set().union(*read))
        if any(pair.get(key) != read[0].get(key) for pair in read)
    ]
    raise ValueError(
        f"The rows come from {len(pairs)} different minings, expected one: a judge knows one pair and one "
        f"setting. They differ in {'; '.join(differences)}."
    )


def _pairs(dataset: datasets.Dataset, name: str) -> set[str]:
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"`{name}` must be a `datasets.Dataset`, as `mine_mismatches` returns it, got {type(dataset).__name__}."
        )
    missing = [column for column in REQUIRED_COLUMNS if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`{name}` lacks the columns {missing}. Expected what `mine_mismatches` returns "
            f"({sorted(REQUIRED_COLUMNS)} at least), got {sorted(dataset.column_names)}."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` has no rows. Mine more examples.")
    return pairs_in(dataset)


def split_by_example(
    dataset: datasets.Dataset, validation_size: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Holds out whole examples: rows of one response are far too alike to be on both sides."""
    ids = np.asarray(dataset.with_format(None)["example_id"][:])
    examples = np.random.default_rng(seed).permutation(np.unique(ids))
    if len(examples) < 2:
        raise ValueError("The rows are of one example, and none is left to hold out. Mine more examples.")
    num_held_out = min(max(1, round(validation_size * len(examples))), len(examples) - 1)
    held_out = np.isin(ids, examples[:num_held_out])
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def to_arrays(dataset: datasets.Dataset, name: str, num_features: int) -> tuple[np.ndarray, np.ndarray]:
    """Features as float32 of shape `(n, num_features)` and labels of shape `(n,)`, checked."""
    labels = dataset.with_format(None)["label"][:]
    if other := {label for label in labels if label not in (0, 1)}:
        other = sorted(other, key=str)
        raise ValueError(f"A label is 0 (unimportant) or 1 (important), the {name} rows hold {other}.")
    labels = np.asarray(labels, dtype=np.int64)
    if num_without := dataset.with_format("arrow")["features"][:].null_count:
        raise ValueError(f"{num_without} of the {len(dataset)} {name} rows have no features. Find or drop them.")
    features = dataset.with_format("numpy")["features"][:]
    if features.ndim != 2 or features.shape[1] != num_features:
        widths = sorted({len(row) for row in features})
        raise ValueError(f"Expected {num_features} features in each of the {name} rows, as `pair` says, got {widths}.")
    features = features.astype(np.float32, copy=False)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{(~finite).sum()} of the {len(finite)} {name} rows have features that aren't finite, the first is "
            f"row {np.flatnonzero(~finite)[0]}. Mine them again in a wider dtype, or drop them."
        )
    return features, labels


def check_both_kinds(labels: np.ndarray, name: str) -> None:
    for label, meaning in ((0, "unimportant"), (1, "important")):
        if not (labels == label).any():
            raise ValueError(
                f"The {name} rows ({len(labels)}) hold no {meaning} mismatch, and a judge has to see both kinds. "
                "Mine more examples, or hold out others (`validation_size`, `seed`)."
            )
