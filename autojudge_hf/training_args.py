# SPDX-License-Identifier: Apache-2.0
"""`JudgeTrainingArguments`: how a judge is fitted."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .configuration import LEARNED


@dataclass
class JudgeTrainingArguments:
    """Arguments of `JudgeTrainer`; names and meanings are those of `transformers.TrainingArguments` where one exists.

    Args:
        output_dir (`str`):
            Folder the judge is saved to. It mustn't hold files that a judge has, unless `overwrite_output_dir`.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether files in `output_dir` may be replaced.
        judge_type (`str`, *optional*, defaults to `"linear"`):
            `"linear"`: logistic regression. `"mlp"`: a hidden layer in front of it (scikit-learn's `MLPClassifier`, by
            L-BFGS), which tells more apart where there are some thousand mismatches to learn from.
        intermediate_size (`int`, *optional*, defaults to 32):
            Hidden units of an `"mlp"`.
        seed (`int`, *optional*, defaults to 42):
            Seed of the split into training and validation examples, and of an `"mlp"`'s first weights.
        validation_size (`float`, *optional*, defaults to 0.1):
            Share of the examples (problems, not rows) held out when no `eval_dataset` is given.
        C_grid (`list[float]`, *optional*):
            Inverse strengths of the L2 penalty to try; the best ROC-AUC wins. Defaults to the paper's grid
            1e0 ... 1e-7 (arXiv 2504.20039, section 4).
        num_folds (`int`, *optional*):
            Number of folds for choosing C by cross-validation, grouped by example.
            `None`: by the validation rows, one fit a C.
        recall (`float`, *optional*, defaults to 0.9):
            The threshold is the highest that still rejects this share of the important validation mismatches.
        class_weight (`str`, *optional*):
            `None` or `"balanced"`, as in scikit-learn.
        max_iter (`int`, *optional*, defaults to 2000):
            Maximum number of solver iterations.
        push_to_hub (`bool`, *optional*, defaults to `False`):
            Whether `save_model` uploads the judge, too. The repository is made when the trainer is.
        hub_model_id (`str`, *optional*):
            Repository, `"user/judge"`; default: the name of `output_dir`, of the token's user.
        hub_private_repo (`bool`, *optional*):
            Whether a new repository is private; default: the account's setting.
        hub_token (`str`, *optional*):
            Default: the token of `hf auth login`. It is never printed or stored.

    Raises:
        ValueError: for a value outside its range.
    """

    output_dir: str
    overwrite_output_dir: bool = False
    judge_type: str = "linear"
    intermediate_size: int = 32
    seed: int = 42
    validation_size: float = 0.1
    C_grid: list[float] = field(default_factory=lambda: [10.0**-i for i in range(8)])
    num_folds: int | None = None
    recall: float = 0.9
    class_weight: str | None = None
    max_iter: int = 2000
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    hub_token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("max_iter", 1), ("intermediate_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"`{name}` must be an int of at least {least}, got {value!r:.50}.")
        for name in ("validation_size", "recall"):
            value = getattr(self, name)
            is_number = isinstance(value, numbers.Real)
            if not (is_number and 0.0 < value < 1.0) and not (name == "recall" and value == 1.0):
                raise ValueError(f"`{name}` must be a share between 0 and 1, got {value!r}.")
        is_list = isinstance(self.C_grid, (Sequence, np.ndarray)) and len(self.C_grid) > 0
        if not is_list or not all(isinstance(c, numbers.Real) and 0 < c < 1e9 for c in self.C_grid):
            raise ValueError(
                f"`C_grid` must be a list of at least one value, all above 0 and below 1e9, got {self.C_grid!r}."
            )
        self.C_grid = list(map(float, self.C_grid))
        if self.class_weight not in (None, "balanced"):
            raise ValueError(f"`class_weight` must be None or 'balanced', got {self.class_weight!r}.")
        if self.judge_type not in LEARNED:
            raise ValueError(f"`judge_type` must be one of {sorted(LEARNED)}, got {self.judge_type!r}.")
        if self.judge_type == "mlp" and self.class_weight is not None:
            raise ValueError("An 'mlp' can't weigh classes: leave `class_weight=None`; the threshold decides.")
        if self.num_folds is not None and (not isinstance(self.num_folds, int) or self.num_folds < 2):
            raise ValueError(f"`num_folds` must be an int of at least 2 or None, got {self.num_folds!r}.")
