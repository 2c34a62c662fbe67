# SPDX-License-Identifier: Apache-2.0
"""GSM8K accuracy as a local `evaluate.Metric`: nothing is downloaded."""

from __future__ import annotations

import datasets
import evaluate

from .gsm8k import GSM8K


class GSM8KAccuracy(evaluate.Metric):
    """Share of responses whose final number is the gold one.

    ```python
    >>> from autojudge_hf.tasks.gsm8k_metric import GSM8KAccuracy
    >>> GSM8KAccuracy().compute(predictions=["The final answer is 18.00"], references=["So 18.\\n#### 18"])
    {'accuracy': 1.0, 'answered': 1.0}

    ```
    """

    def __init__(self, extraction: str = "strict", **kwargs):
        super().__init__(**kwargs)
        self.task = GSM8K(extraction=extraction)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy on GSM8K: the response's final number against the one behind '#### '.",
            citation="arXiv:2110.14168",
            inputs_description="predictions: responses; references: answers in GSM8K's form.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        examples = [{"question": "", "answer": reference} for reference in references]
        answers = self.task.extract_answers(examples, predictions)
        correct = [self.task.is_correct(*pair) for pair in zip(examples, answers)]
        answered = [answer is not None for answer in answers]
        return {"accuracy": sum(correct) / len(correct), "answered": sum(answered) / len(answered)}
