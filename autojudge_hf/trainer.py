# SPDX-License-Identifier: Apache-2.0
"""`JudgeTrainer`: from mined mismatches to a learned judge."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import EvalPrediction
from transformers.trainer_utils import PredictionOutput

from .auto import AutoJudge
from .configuration import JudgeConfig
from .fitting import fit_judges, folds, roc_auc
from .hub import create_repo
from .modeling import SAVED_NAMES
from .training_args import JudgeTrainingArguments
from .training_rows import check_both_kinds, common_pair, split_by_example, to_arrays
from .verification import harmless


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)
# With fewer important mismatches than this, a judge is hardly more than these.
FEW_IMPORTANT = 10


@dataclass
class JudgeTrainerState:
    """`log_history` holds one dict per value of C, then one for the judge that was kept."""

    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None


class JudgeTrainer:
    """Fits a judge: standard scaler and L2 logistic regression (scikit-learn), folded into one vector, or an MLP.

    Args:
        args (`JudgeTrainingArguments`): how to fit.
        train_dataset (`datasets.Dataset`): mined mismatches.
        eval_dataset (`datasets.Dataset`, *optional*): mismatches of other examples, for C and the threshold. Without
            it `args.validation_size` of the training examples are held out.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*): more figures for `evaluate`, from scores in
            [0, 1] (`predictions`) and labels (`label_ids`).

    Raises:
        ValueError: before any fit, for a dataset that can't be learned from.
    """

    def __init__(
        self,
        args: JudgeTrainingArguments,
        train_dataset: datasets.Dataset,
        eval_dataset: datasets.Dataset | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    ):
        if not isinstance(args, JudgeTrainingArguments):
            raise ValueError(f"`args` must be `JudgeTrainingArguments`, got {type(args).__name__}.")
        if compute_metrics is not None and not callable(compute_metrics):
            raise ValueError(f"`compute_metrics` must be a function, got {compute_metrics!r:.50}.")
        self.args = args
        self.compute_metrics = compute_metrics
        self.state = JudgeTrainerState()
        self._check_output_dir()
        self._pair = common_pair(None, train_dataset, "train_dataset")
        if eval_dataset is None:
            train_dataset, eval_dataset = split_by_example(train_dataset, args.validation_size, args.seed)
        else:
            common_pair(self._pair, eval_dataset, "eval_dataset")
            ids = (set(part.with_format(None)["example_id"][:]) for part in (train_dataset, eval_dataset))
            if shared := set.intersection(*ids):
                logger.warning(
                    f"{len(shared)} example ids are in both datasets. If they are the same problems, the AUC is too "
                    "high."
                )
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.judge = AutoJudge.from_config(self._config())
        width = self.judge.config.num_features
        self._train = to_arrays(train_dataset, "training", width)
        self._eval = to_arrays(eval_dataset, "validation", width)
        check_both_kinds(self._train[1], "training")
        check_both_kinds(self._eval[1], "validation")
        if args.push_to_hub:
            # Now, so that a bad name or token is told before the fit.
            create_repo(self._hub_model_id(), private=args.hub_private_repo, token=args.hub_token)

    def train(self) -> JudgeTrainerState:
        """Fits every C of the grid, keeps the best by ROC-AUC, sets the threshold by recall."""
        grid, fits = self.args.C_grid, []
        if self.args.num_folds is None:
            metric = "eval_auc"
            fits = fit_judges(self.args, *self._train, grid, progress="fitting C")
            aucs = [self._eval_auc(fit) for fit in fits]
        else:
            metric = "cross_validated_auc"
            aucs = [roc_auc(self._train[1], scores) for scores in self.cross_validate(self.args.num_folds)]
        self.state.log_history += [{"C": c, metric: auc} for c, auc in zip(grid, aucs)]
        best = int(np.argmax(aucs))
        self.state.best_metric = aucs[best]
        self._warn_of_weak_data(aucs[best])
        self.judge.load_state_dict(fits[best] if fits else fit_judges(self.args, *self._train, [grid[best]])[0])
        self.judge.config.threshold = self._threshold_by_recall()
        # Whatever was measured was measured of other weights.
        self.judge.config.thresholds, self.judge.config.evaluation = {}, []
        metrics = self.evaluate()
        self.judge.config.training = self._figures(grid[best])
        self.state.log_history.append({"best_C": grid[best], **metrics})
        return self.state

    def cross_validate(self, num_folds: int = 5) -> list[np.ndarray]:
        """For each C, logits of all training rows, each by a judge that was fitted without the row's example."""
        features, labels = self._train
        scores = [np.empty(len(labels), np.float32) for _ in self.args.C_grid]
        parts = folds(labels, np.asarray(self.train_dataset["example_id"]), num_folds)
        for fitted, held_out in tqdm(parts, total=num_folds, desc="cross-validation", unit="fold"):
            fits = fit_judges(self.args, features[fitted], labels[fitted], self.args.C_grid)
            for of_C, fit in zip(scores, fits):
                of_C[held_out] = self._scores(fit, features[held_out])
        return scores

    def learning_curve(self, shares: Sequence[float] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)) -> list[dict[str, float]]:
        """Validation ROC-AUC of judges fitted on parts of the training examples. Where it flattens, mining may stop.

        Args:
            shares (`Sequence[float]`, *optional*): parts of the training examples, each within the next; those that
                come to the same number are one.

        Returns:
            `list[dict]` of `num_examples` and `eval_auc`, the best of the C grid; parts with one kind of mismatch only
            are left out.
        """
        if wrong := [share for share in shares if not 0.0 < share <= 1.0]:
            raise ValueError(f"`shares` are parts of the training examples, above 0 and up to 1, got {wrong}.")
        ids = np.asarray(self.train_dataset["example_id"])
        examples = np.random.default_rng(self.args.seed).permutation(np.unique(ids))
        curve = []
        sizes = dict.fromkeys(max(1, round(share * len(examples))) for share in shares)
        for size in tqdm(sizes, desc="learning curve", unit="part"):
            part = examples[:size]
            features, labels = (array[np.isin(ids, part)] for array in self._train)
            if len(np.unique(labels)) == 2:
                fits = fit_judges(self.args, features, labels, self.args.C_grid)
                curve.append({"num_examples": len(part), "eval_auc": max(map(self._eval_auc, fits))})
        return curve

    def evaluate(
        self, eval_dataset: datasets.Dataset | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """ROC-AUC, and at the judge's threshold: recall of important mismatches, share of harmless ones accepted."""
        return self.predict(self.eval_dataset if eval_dataset is None else eval_dataset, metric_key_prefix).metrics

    def predict(self, test_dataset: datasets.Dataset, metric_key_prefix: str = "test") -> PredictionOutput:
        """Scores in [0, 1] of a mined dataset, labels, and those metrics of `evaluate` that the labels allow."""
        common_pair(self._pair, test_dataset, "test_dataset")
        self._check_trained()
        features, labels = to_arrays(test_dataset, metric_key_prefix, self.judge.config.num_features)
        logits = self.judge.decision_function(torch.from_numpy(features))
        scores = torch.sigmoid(logits).numpy()
        accepted = harmless(logits, self.judge.config.threshold).numpy()
        is_important = labels == 1
        metrics = {"threshold": self.judge.config.threshold}
        if is_important.any():
            metrics["recall"] = float((~accepted[is_important]).mean())
        if not is_important.all():
            metrics["harmless_accepted"] = float(accepted[~is_important].mean())
        if is_important.any() and not is_important.all():
            metrics["auc"] = roc_auc(labels, logits.numpy())
        if self.compute_metrics is not None:
            own = self.compute_metrics(EvalPrediction(predictions=scores, label_ids=labels))
            if not isinstance(own, dict) or not all(isinstance(name, str) for name in own):
                raise ValueError(f"`compute_metrics` must return a dict of figures by name, got {own!r:.50}.")
            metrics |= own
        start = f"{metric_key_prefix}_"
        metrics = {start + name.removeprefix(start): value for name, value in metrics.items()}
        return PredictionOutput(predictions=scores, label_ids=labels, metrics=metrics)

    def save_model(self, output_dir: str | None = None) -> None:
        """Saves the judge, with its card, to `output_dir` or `args.output_dir`; pushes it if `args.push_to_hub`."""
        self._check_trained()
        self.judge.save_pretrained(output_dir or self.args.output_dir)
        if self.args.push_to_hub:
            self.push_to_hub()

    def create_model_card(
        self, output_dir: str | Path | None = None, *, license: str | None = None, dataset: str | None = None
    ) -> None:
        """Writes the judge's README.md, and the plot it shows.

        What is told here stays in the judge's config, for later cards: tell it before `save_model`.

        Args:
            output_dir (`str`, *optional*): folder to write to, `args.output_dir` by default.
            license (`str`, *optional*): the judge's licence, as the Hub names it (`"apache-2.0"`).
            dataset (`str`, *optional*): Hub id of the problems that were mined (`"openai/gsm8k"`).
        """
        self._check_trained()
        self._describe(license, dataset)
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.judge.save_card(folder, folder.resolve().name)

    def push_to_hub(
        self, repo_id: str | None = None, *, license: str | None = None, dataset: str | None = None, **kwargs: Any
    ) -> str:
        """Uploads the judge.

        Args:
            repo_id (`str`, *optional*): default: `args.hub_model_id`, or else the name of `args.output_dir`.
            license, dataset (`str`, *optional*): as in `create_model_card`.
            kwargs: of `Judge.push_to_hub`; `private` and `token` by default `args.hub_private_repo` and
                `args.hub_token`.
        """
        self._check_trained()
        self._describe(license, dataset)
        kwargs = {"private": self.args.hub_private_repo, "token": self.args.hub_token, **kwargs}
        return self.judge.push_to_hub(repo_id or self._hub_model_id(), **kwargs)

    def _describe(self, license: str | None, dataset: str | None) -> None:
        told = {name: value for name, value in (("license", license), ("dataset", dataset)) if value is not None}
        self.judge.config = replace(self.judge.config, **told)

    def _hub_model_id(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir).resolve().name

    def _check_trained(self) -> None:
        if self.state.best_metric is None:
            raise ValueError("The judge isn't trained yet and would accept nothing. Call `train()` first.")

    def _check_output_dir(self) -> None:
        folder = Path(self.args.output_dir)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"`output_dir` must be a folder, got the file {folder.name}.")
        found = [name for name in SAVED_NAMES if (folder / name).exists()]
        if found and not self.args.overwrite_output_dir:
            raise ValueError(
                f"`output_dir` {folder.name} has what a judge is saved to already: {', '.join(found)}. Give another "
                "folder, or pass `overwrite_output_dir=True` to replace these."
            )

    def _config(self) -> JudgeConfig:
        pair = json.loads(self._pair)
        if pair["features"] is None:
            raise ValueError("The rows hold tokens only. Give them features first, with `compute_features`.")
        target, assistant = pair["target"], pair["assistant"]
        return JudgeConfig(
            judge_type=self.args.judge_type,
            intermediate_size=self.args.intermediate_size if self.args.judge_type == "mlp" else None,
            **pair["features"],
            base_model_name_or_path=target["name"],
            base_model_revision=target["revision"],
            assistant_model_name_or_path=assistant["name"],
            assistant_model_revision=assistant["revision"],
            decoding_settings=pair["decoding_settings"],
            task=pair["task"],
        )

    def _scores(self, tensors: dict[str, torch.Tensor], features: np.ndarray) -> np.ndarray:
        """Logits of a judge with these tensors, which the trainer's own needn't have."""
        judge = AutoJudge.from_config(self.judge.config)
        judge.load_state_dict(tensors)
        return judge.decision_function(torch.from_numpy(features)).numpy()

    def _eval_auc(self, tensors: dict[str, torch.Tensor]) -> float:
        features, labels = self._eval
        return roc_auc(labels, self._scores(tensors, features))

    def _threshold_by_recall(self) -> float:
        """The highest threshold that rejects at least `args.recall` of the important validation mismatches."""
        features, labels = self._eval
        logits = self.judge.decision_function(torch.from_numpy(features[labels == 1])).double().sort().values
        # Rounded, or the product of 0.07 and 100 would come to 8.
        num_missed = len(logits) - math.ceil(round(self.args.recall * len(logits), 9))
        # A hair below the score itself, which must not be accepted, whichever way the comparison is rounded.
        return float(torch.sigmoid(logits[num_missed]) * (1 - 1e-6))

    def _warn_of_weak_data(self, auc: float) -> None:
        for name, (_, labels) in (("training", self._train), ("validation", self._eval)):
            if labels.sum() < FEW_IMPORTANT:
                logger.warning(
                    f"Only {labels.sum()} of the {len(labels)} {name} mismatches are important, and the judge rests "
                    "on these. Mine more examples."
                )
        if auc <= 0.5:
            logger.warning(
                f"The judge is no better than chance (ROC-AUC {auc:.2f}): these features don't tell which mismatches "
                "are important. Mine more examples, or other features."
            )

    def _figures(self, C: float) -> dict[str, Any]:
        """What the card says of the fit."""
        labels = np.concatenate([self._train[1], self._eval[1]])
        return {
            "Mismatches": f"{len(self._train[1])} for training, {len(self._eval[1])} for validation",
            "Important": f"{labels.mean():.1%}",
            "C": C,
            "Validation ROC-AUC": round(self._eval_auc(self.judge.state_dict()), 4),
        }
