# SPDX-License-Identifier: Apache-2.0
"""pass@k of programs as a local `evaluate.Metric`: nothing is downloaded, and every program runs in the sandbox."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from math import comb

import datasets
import evaluate

from .livecodebench import LiveCodeBench


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that one of `k` programs drawn from the samples, without putting back, passes: unbiased in the samples.

    Source: arXiv 2107.03374, equation 1.

    Raises:
        ValueError: for more draws than samples.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    if k > num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, got {num_samples}.")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


class PassAtK(evaluate.Metric):
    """Share of problems that one of k responses solves.

    `predictions` are lists of responses, one list for each problem; `references` are the problems, of which the
    columns with tests are read; `k`, 1 by default, is how many programs are drawn, or a list of such numbers.

    ```python
    >>> from autojudge_hf.tasks.livecodebench_metric import PassAtK
    >>> tests = '[{"input": "2", "output": "4"}]'
    >>> row = {"public_test_cases": tests, "private_test_cases": "[]", "metadata": "{}"}
    >>> PassAtK().compute(predictions=[["```\\nprint(4)\\n```", "```\\nprint(5)\\n```"]], references=[row])
    {'pass@1': 0.5}

    ```
    """

    columns = ("public_test_cases", "private_test_cases", "metadata")

    def __init__(self, task: LiveCodeBench | None = None, **kwargs):
        super().__init__(**kwargs)
        self.task = task or LiveCodeBench()

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="pass@k of Python programs on LiveCodeBench's problems.",
            citation="arXiv:2403.07974",
            inputs_description="predictions: lists of responses; references: rows with tests; k: numbers of draws.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(text),
                    "references": dict.fromkeys(self.columns, text),
                }
            ),
        )

    def add_batch(self, *, predictions: list[list[str]], references: list[dict[str, str]], **kwargs) -> None:
        """As in `evaluate.Metric`, which would refuse the other columns of a problem, and `None`."""
        super().add_batch(predictions=predictions, references=list(map(self._tests, references)), **kwargs)

    def add(self, *, prediction: list[str], reference: dict[str, str], **kwargs) -> None:
        """The same."""
        super().add(prediction=prediction, reference=self._tests(reference), **kwargs)

    def _tests(self, problem: dict[str, str]) -> dict[str, str]:
        return {name: problem.get(name) or "" for name in self.columns}

    def _compute(
        self, predictions: list[list[str]], references: list[dict[str, str]], k: int | Sequence[int] = 1
    ) -> dict[str, float]:
        examples = [example for example, responses in zip(references, predictions) for _ in responses]
        answers = self.task.extract_answers(examples, [text for responses in predictions for text in responses])
        passed = iter([self.task.is_correct(*pair) for pair in zip(examples, answers)])
        draws = [k] if isinstance(k, numbers.Integral) else k
        counts = [(len(responses), sum(next(passed) for _ in responses)) for responses in predictions]
        return {f"pass@{n}": sum(pass_at_k(*count, n) for count in counts) / len(counts) for n in draws}
