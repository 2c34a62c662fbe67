# SPDX-License-Identifier: Apache-2.0
"""Grade-school mathematics (GSM8K): prompt, answer extraction, equality."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from .gsm8k_shots import SHOTS
from .task import Task


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# The prompt and the two patterns are those of lm-evaluation-harness's task gsm8k_cot_llama.
INSTRUCTION = (
    "Given the following problem, reason and give a final answer to the problem.\n"
    "Problem: {question}\n"
    'Your response should end with "The final answer is [answer]" where [answer] is the response to the problem.'
)
NUMBER = r"((-?[$0-9.,]{2,})|(-?[0-9]+))"
PATTERNS = {"strict": re.compile("The final answer is " + NUMBER), "flexible": re.compile(NUMBER)}


def normalize(answer: str) -> str:
    """Removes what the harness ignores: commas, dollar signs, all up to `#### `, one trailing dot, case."""
    answer = answer.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return answer.removesuffix(".").lower().strip()


def same_number(a: str, b: str) -> bool:
    """Equal as normalised strings or as exact decimals ("18.00" is 18, where the harness would say no)."""
    if a == b:
        return True
    try:
        return Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False


class GSM8K(Task):
    """Word problems with one number for an answer; examples have `question` and, for grading, `answer`.

    Args:
        num_fewshot (`int`, *optional*, defaults to 0):
            Worked examples before the problem, up to 8, as earlier turns of the chat.
        extraction (`str`, *optional*, defaults to `"strict"`):
            `"strict"` takes the last "The final answer is N", `"flexible"` the last number of the response.

    Raises:
        ValueError: for more shots than there are, or an unknown extraction.
    """

    #: Raised with every change of prompt, extraction or equality. 1: the harness's rules, and equality of decimals.
    version = 1

    def __init__(self, num_fewshot: int = 0, extraction: str = "strict"):
        if type(num_fewshot) is not int or not 0 <= num_fewshot <= len(SHOTS):
            raise ValueError(f"`num_fewshot` must be an int between 0 and {len(SHOTS)}, got {num_fewshot!r}.")
        if extraction not in list(PATTERNS):
            raise ValueError(f"`extraction` must be one of {sorted(PATTERNS)}, got {extraction!r}.")
        self.num_fewshot = num_fewshot
        self.extraction = extraction
        self.name = f"gsm8k-v{self.version}-{num_fewshot}shot-{extraction}"

    def instruction(self, example: Mapping[str, Any]) -> str:
        """What the user says: the problem and how to end."""
        if "question" not in example:
            raise ValueError(f"A GSM8K example needs the field `question`, got {sorted(example)}.")
        return INSTRUCTION.format(question=example["question"])

    def prompt(self, example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        messages = []
        for shot in SHOTS[: self.num_fewshot]:
            messages += [
                {"role": "user", "content": self.instruction(shot)},
                {"role": "assistant", "content": shot["response"]},
            ]
        messages.append({"role": "user", "content": self.instruction(example)})
        if tokenizer.chat_template is None:
            return (tokenizer.bos_token or "") + "\n\n".join(m["content"] for m in messages) + "\n\n"
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def extract_answers(self, examples: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[str | None]:
        answers = []
        for text in texts:
            found = [match.group(1) for match in PATTERNS[self.extraction].finditer(text)]
            answers.append(normalize(found[-1]) or None if found else None)
        return answers

    def equivalent(self, answer: str | None, reference: str | None) -> bool:
        return answer is not None and reference is not None and same_number(answer, reference)

    def gold_answer(self, example: Mapping[str, Any]) -> str:
        """The number behind the last `#### ` of the example's `answer`."""
        answer = example.get("answer")
        if not isinstance(answer, str) or "#### " not in answer:
            raise ValueError(
                "A GSM8K example needs the field `answer`, a text ending in '#### ' and the gold number, got "
                f"{answer!r:.50}."
            )
        return normalize(answer)

    def is_correct(self, example: Mapping[str, Any], answer: str | None) -> bool:
        return self.equivalent(answer, self.gold_answer(example))
