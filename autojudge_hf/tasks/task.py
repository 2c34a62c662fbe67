# SPDX-License-Identifier: Apache-2.0
"""What mining and evaluation need to know of a task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import threading

    from transformers import PreTrainedTokenizerBase


METHODS = ("prompt", "extract_answers", "equivalent", "is_correct")

#: An event that is set as soon as nobody waits for this thread's answers any more.
abandoned: ContextVar[threading.Event | None] = ContextVar("abandoned", default=None)


class Task(ABC):
    """A kind of problem whose answers can be compared.

    Mining asks whether two responses mean the same (`equivalent`), evaluation whether one is right (`is_correct`).
    Answers may be anything that survives `==` and JSON; `None` stands for "no answer was given". A class that has the
    four methods is a task, too, without inheriting from this one.

    Attributes:
        name (`str`, *optional*, defaults to the class's):
            Recorded in mined datasets and judges. Change it with every change of prompt or grading.
    """

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        if cls is not Task:
            return NotImplemented
        return all(callable(getattr(other, method, None)) for method in METHODS) or NotImplemented

    @abstractmethod
    def prompt(self, example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        """The whole prompt with its special tokens; callers tokenise it with `add_special_tokens=False`."""

    @abstractmethod
    def extract_answers(self, examples: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[Any]:
        """One answer, or `None`, for each response in `texts`. Batched, so that a grader can run in parallel.

        Mining calls it in a thread, one call at a time, while it decodes.
        """

    @abstractmethod
    def is_correct(self, example: Mapping[str, Any], answer: Any) -> bool:
        """Whether `answer` is right by the example's gold answer. `None` never is, whatever is said of it."""

    def equivalent(self, answer: Any, reference: Any) -> bool:
        """Whether `answer` means the same as the target's own `reference`. `None` never does: mining doesn't ask."""
        return answer is not None and reference is not None and answer == reference


def name_of(task: Task) -> str:
    return getattr(task, "name", type(task).__name__)


def prompt_ids(example_id: int, prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of an example's prompt. Raises a `ValueError` where there are none."""
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if not ids:
        raise ValueError(f"Example {example_id}: expected a prompt of at least one token, got none.")
    return ids


def stop_if_abandoned() -> None:
    """For a thread's work to call between its parts: an interruption doesn't reach a thread, and its end is awaited.

    Raises:
        CancelledError: where nobody waits for the answers any more.
    """
    over = abandoned.get()
    if over is not None and over.is_set():
        raise CancelledError("nobody waits for these answers any more")


def answers_or_errors(task: Task, examples: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[Any]:
    """What `extract_answers` gives, or for an example on which it fails its error: one can't stop a run."""
    stop_if_abandoned()
    try:
        answers = task.extract_answers(examples, texts)
        if len(answers) != len(texts):
            raise ValueError(f"`extract_answers` gave {len(answers)} answers for {len(texts)} texts")
        return answers
    except (Exception, SystemExit) as error:  # a user's code, which may raise anything
        if len(texts) == 1:
            return [error if isinstance(error, Exception) else RuntimeError(f"the task raised {error!r}")]
        return [answer for pair in zip(examples, texts) for answer in answers_or_errors(task, *([x] for x in pair))]


def checked_examples(dataset: Iterable[Mapping[str, Any]], task: Task) -> list[Mapping[str, Any]]:
    """The examples of a dataset, as a list.

    Raises:
        ValueError: where they aren't examples, or the task isn't one.
    """
    if not isinstance(task, Task):
        raise ValueError(f"`task` must be a task, such as `GSM8K()`, with the methods {METHODS}, got {task!r:.50}.")
    examples = list(dataset)
    for example in examples:
        if not isinstance(example, Mapping):
            raise ValueError(
                f"`dataset` must hold examples, mappings of fields, got {example!r:.50}. Of a `DatasetDict`, pass one "
                "split; of examples, a list."
            )
    return examples
