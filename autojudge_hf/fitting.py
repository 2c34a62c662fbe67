# SPDX-License-Identifier: Apache-2.0
"""The fit itself: features and labels in, a judge's tensors out, one set for each C. By scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .training_args import JudgeTrainingArguments


if TYPE_CHECKING:
    from sklearn.preprocessing import StandardScaler


# Rows that are scaled at once: what they cost in double precision is small beside all rows.
SCALED_ROWS = 4096


def fit_judges(
    args: JudgeTrainingArguments,
    features: np.ndarray,
    labels: np.ndarray,
    C_grid: Sequence[float],
    progress: str | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Standard scaler and classifier, folded into the tensors of an `args.judge_type` judge, for each C.

    Beside `features` it holds one scaled copy of them, however large they are.

    Args:
        args (`JudgeTrainingArguments`): which classifier, and how to fit it.
        features (`np.ndarray` of shape `(n, f)`): float32.
        labels (`np.ndarray` of shape `(n,)`): 1 is important.
        C_grid (`Sequence[float]`): inverse strengths of the L2 penalty.
        progress (`str`, *optional*): what a progress bar says.
    """
    from sklearn.preprocessing import StandardScaler

    scaler, scaled = StandardScaler(), np.empty_like(features)
    parts = [slice(start, start + SCALED_ROWS) for start in range(0, len(features), SCALED_ROWS)]
    for part in parts:
        scaler.partial_fit(features[part].astype(np.float64))
    for part in parts:
        scaled[part] = scaler.transform(features[part].astype(np.float64))
    classifier, fits = _classifier(args), {}
    # From the strongest penalty on: a logistic regression starts where the one before ended.
    for c in tqdm(sorted(C_grid), desc=progress, unit="fit", disable=progress is None):
        # An MLP's `alpha` is 1 / C: what the sum of all rows' losses is divided by.
        classifier.set_params(**{"alpha": 1 / c} if args.judge_type == "mlp" else {"C": c})
        classifier.fit(scaled, labels)
        fits[c] = _folded(args.judge_type, scaler, classifier)
    return [fits[c] for c in C_grid]


def folds(labels: np.ndarray, example_ids: np.ndarray, num_folds: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of the rows to fit and of those held out, `num_folds` times; no example is on both sides.

    Raises:
        ValueError: for fewer examples than folds, or a fold that leaves one kind of mismatch only.
    """
    from sklearn.model_selection import GroupKFold

    num_examples = len(np.unique(example_ids))
    if num_examples < num_folds:
        raise ValueError(f"{num_folds} folds need at least as many examples, got {num_examples}. Mine more.")
    for fitted, held_out in GroupKFold(num_folds).split(labels, labels, example_ids):
        if len(np.unique(labels[fitted])) < 2:
            raise ValueError(
                "All mismatches of one kind are in one fold, and a judge has to see both. Mine more examples."
            )
        yield fitted, held_out


def roc_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores))


def _classifier(args: JudgeTrainingArguments) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    if args.judge_type == "mlp":
        size = (args.intermediate_size,)
        return MLPClassifier(size, solver="lbfgs", max_iter=args.max_iter, max_fun=10**9, random_state=args.seed)
    return LogisticRegression(class_weight=args.class_weight, max_iter=args.max_iter, warm_start=True)


def _folded(judge_type: str, scaler: StandardScaler, classifier: Any) -> dict[str, torch.Tensor]:
    """The classifier's tensors with the scaler in them, so that none is needed when decoding."""

    def first_layer(weight: np.ndarray, bias: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        # w' = w / scale and b' = b - w' . mean
        weight = (weight / scaler.scale_[:, None]).astype(np.float32)
        # From the rounded weights, so that their error is multiplied by distances from the mean only.
        return torch.from_numpy(weight), torch.from_numpy(bias - scaler.mean_ @ weight.astype(np.float64))

    if judge_type == "linear":
        weight, bias = first_layer(classifier.coef_.T, classifier.intercept_)
        return {"weight": weight[:, 0], "bias": bias}
    hidden_weight, hidden_bias = first_layer(classifier.coefs_[0], classifier.intercepts_[0])
    weight, bias = torch.from_numpy(classifier.coefs_[1][:, 0]), torch.from_numpy(classifier.intercepts_[1])
    return {"hidden_weight": hidden_weight, "hidden_bias": hidden_bias, "weight": weight, "bias": bias}
