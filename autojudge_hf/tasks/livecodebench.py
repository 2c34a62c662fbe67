# SPDX-License-Identifier: Apache-2.0
"""Programming problems (LiveCodeBench): rows, prompt, code extraction, and grading by running the tests."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import pickle
import threading
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sandbox import Limits, parsed, run_isolated
from .task import Task, abandoned


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

DRIVER = Path(__file__).with_name("livecodebench_driver.py").read_text(encoding="utf-8")
REPO_ID = "livecodebench/code_generation_lite"
LARGEST_TESTS = 1 << 30

# The wording is the benchmark's own, so that results compare with others'.
SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
WITH_STARTER = (
    "### Format: You will use the following starter code to write the solution to the problem and enclose your code "
    "within delimiters.\n```python\n{starter_code}\n```\n\n"
)
FROM_STDIN = (
    "### Format: Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on "
    "the sample inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it "
    "reads the inputs, runs the algorithm and writes output to STDOUT.\n```python\n# YOUR CODE HERE\n```\n\n"
)
ANSWER = "### Answer: (use the provided format with backticks)\n\n"


def load_problems(
    path: str | os.PathLike | None = None,
    release: int = 5,
    since: str | None = None,
    until: str | None = None,
    **hub_options: Any,
) -> list[dict[str, Any]]:
    """LiveCodeBench's problems from a local JSONL file, or from the files of `livecodebench/code_generation_lite`.

    Args:
        path (`str` or `os.PathLike`, *optional*): a JSONL file with rows in the official format.
        release (`int`, *optional*, defaults to 5): the Hub's release; 5 has the 880 problems of the paper.
        since (`str`, *optional*), until (`str`, *optional*):
            First and last contest date, such as `"2024-08-01"`. With either, problems without a date are left out.
        hub_options: `revision`, `token`, `cache_dir`, `local_files_only`, as `hf_hub_download` takes them.

    Raises:
        ValueError: for an unknown release, or what isn't a date.
    """
    first = date.min if since is None else _day(since, "`since`")
    last = date.max if until is None else _day(until, "`until`")
    if path is not None:
        files = [path]
    else:
        from huggingface_hub import hf_hub_download

        if not 1 <= release <= 6:
            raise ValueError(f"`release` must be from 1 to 6, got {release}.")
        names = ["test.jsonl", *(f"test{number}.jsonl" for number in range(2, release + 1))]
        files = [hf_hub_download(REPO_ID, name, repo_type="dataset", **hub_options) for name in names]
    problems = []
    for file in files:
        with open(file, encoding="utf-8") as lines:
            problems += (json.loads(line) for line in lines if line.strip())
    if since is None and until is None:
        return problems
    dated = [(problem, problem.get("contest_date")) for problem in problems]
    return [problem for problem, text in dated if text and first <= _day(text[:10], "`contest_date`") <= last]


def _day(text: str, name: str) -> date:
    try:
        return date.fromisoformat(text)
    except (ValueError, TypeError):
        raise ValueError(f'{name} must be a date, such as "2024-08-01", got {text!r:.50}.') from None


class _PlainUnpickler(pickle.Unpickler):
    """Strings, numbers, lists and the like; whatever would import something is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} in packed tests")


def decode_tests(example: Mapping[str, Any]) -> list[dict[str, str]]:
    """Public and private tests, each with `input` and `output`.

    Raises:
        ValueError: for a row without tests, or with tests that can't be decoded.
    """
    try:
        tests = json.loads(example.get("public_test_cases") or "[]")
        private = example.get("private_test_cases") or "[]"
        try:
            tests = tests + json.loads(private)
        except ValueError:
            inflater = zlib.decompressobj()
            data = inflater.decompress(base64.b64decode(private, validate=True), LARGEST_TESTS)
            tests = tests + json.loads(_PlainUnpickler(io.BytesIO(data)).load())
        tests = [{"input": test["input"], "output": test["output"]} for test in tests]
        if not all(isinstance(text, str) for test in tests for text in test.values()):
            raise TypeError("inputs and outputs must be strings")
    except (ValueError, TypeError, KeyError, EOFError, zlib.error, pickle.UnpicklingError, AttributeError) as error:
        raise ValueError(f"tests that can't be decoded ({type(error).__name__}: {error})") from None
    if not tests:
        raise ValueError("a row without tests")
    return tests


def extract_code(text: str) -> str | None:
    """What stands between the last two lines that contain a triple backtick."""
    lines = text.split("\n")
    fences = [i for i, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else None


def same_output(printed: str, expected: str) -> bool:
    """As many lines, without blanks around them, each the same text or the same numbers, as exact decimals."""

    def lines(text: str) -> list[str]:
        return [line.strip() for line in text.strip().split("\n")]

    def numbers(line: str) -> list[Decimal]:
        return [Decimal(word) for word in line.split()]

    def same(a: str, b: str) -> bool:
        try:
            return a == b or numbers(a) == numbers(b)
        except InvalidOperation:  # a word, or a number that can't be compared
            return False

    a, b = lines(printed), lines(expected)
    return len(a) == len(b) and all(map(same, a, b))


def same_value(encoded: Any, expected: Any) -> bool:
    """Whether a value, as the driver encodes it, is equal to one from JSON: no tuple is, nor what JSON can't say."""
    pairs = [(encoded, expected)]
    while pairs:  # not by recursion, which has a limit
        encoded, expected = pairs.pop()
        kind, *items = encoded if isinstance(encoded, list) else ["plain"]
        if kind == "dict" and isinstance(expected, dict):
            # JSON's keys are strings, and a key of another type isn't equal to one.
            keys = [key for key, _ in items if isinstance(key, str)]
            same = len(keys) == len(items) and set(keys) == set(expected)
            pairs += [(value, expected[key]) for key, value in items if same]
        elif kind == "list" and isinstance(expected, list):
            same = len(items) == len(expected)
            pairs += zip(items, expected)
        else:
            same = kind == "plain" and not isinstance(expected, (list, dict)) and encoded == expected
        if not same:
            return False
    return True


class LiveCodeBench(Task):
    """Problems that a Python program has to solve; examples are rows in LiveCodeBench's official format.

    An answer is a report: `{"passed": bool, "results": [bool, ...], "reason": str}`, with a result for every test that
    was run and the reason of the first failure. A response without code, or a row without tests, fails with a reason.

    Differs from the official checker where that fails correct programs: they run as processes of their own, so
    `for line in sys.stdin`, `open(0)` and `global` work. What JSON can't hold, such as `Fraction(2)`, equals nothing.

    Args:
        compare (`str`, *optional*, defaults to `"verdict"`):
            What makes two programs equivalent: `"verdict"`, whether they pass (the paper's rule), or `"tests"`, which
            tests they pass; then all tests are run.
        limits ([`~autojudge_hf.tasks.sandbox.Limits`], *optional*): what a program may use; 6 seconds a test.
        num_workers (`int`, *optional*): programs at a time; default: one for each core.

    Raises:
        ValueError: for another `compare`.
    """

    #: Raised with every change of prompt, extraction or grading.
    version = 1

    def __init__(self, compare: str = "verdict", limits: Limits | None = None, num_workers: int | None = None):
        if compare not in ("verdict", "tests"):
            raise ValueError(f"`compare` must be 'verdict' or 'tests', got {compare!r}.")
        self.compare = compare
        self.limits = limits or Limits()
        self.num_workers = num_workers or os.cpu_count()
        self.name = f"livecodebench-v{self.version}-{compare}"

    def instruction(self, example: Mapping[str, Any]) -> str:
        """What the user says: the problem, the form of the answer, and the starter code if there is one."""
        if "question_content" not in example:
            raise ValueError(f"A LiveCodeBench example needs the field `question_content`, got {sorted(example)}.")
        starter_code = example.get("starter_code")
        form = WITH_STARTER.format(starter_code=starter_code) if starter_code else FROM_STDIN
        return f"### Question:\n{example['question_content']}\n\n{form}{ANSWER}"

    def prompt(self, example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
        instruction = self.instruction(example)
        if tokenizer.chat_template is None:
            return f"{tokenizer.bos_token or ''}{SYSTEM}\n\n{instruction}"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": instruction}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def extract_answers(self, examples: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[dict[str, Any]]:
        over = abandoned.get() or threading.Event()
        with ThreadPoolExecutor(self.num_workers, initializer=abandoned.set, initargs=(over,)) as pool:
            try:
                return list(pool.map(self.report, examples, map(extract_code, texts)))
            except KeyboardInterrupt:
                over.set()
                raise

    def report(self, example: Mapping[str, Any], code: str | None) -> dict[str, Any]:
        """Runs `code` on the example's tests, up to the first that fails."""
        results: list[bool] = []

        def failed(reason: str) -> dict[str, Any]:
            return {"passed": False, "results": results, "reason": reason}

        try:
            tests = decode_tests(example)
            metadata = example.get("metadata") or {}
            function = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
            expected = [test["output"] if function is None else parsed(test["output"]) for test in tests]
        except (ValueError, AttributeError, RecursionError) as error:
            logger.warning(f"Problem {example.get('question_id')} can't be graded, so every program fails: {error}")
            return failed(str(error))
        if code is None:
            return failed("no code between two fences")
        try:
            code.encode()
        except UnicodeEncodeError:
            return failed("code that isn't Unicode")
        reason = ""
        while len(results) < len(tests):
            first = self._run(code, function, tests, expected, results)
            reason = reason or first
            if self.compare == "verdict" and reason:
                break
        return {"passed": all(results) and not reason, "results": results, "reason": reason}

    def _run(
        self, code: str, function: str | None, tests: list[dict], expected: list[Any], results: list[bool]
    ) -> str:
        """Goes on from test `len(results)` until one ends the program; returns why the first one failed."""
        inputs = [test["input"] for test in tests[len(results) :]]
        request = {"code": code, "function": function, "inputs": inputs, "seconds": self.limits.seconds}
        request["output_bytes"] = self.limits.output_bytes
        reason = ""
        for result in run_isolated(DRIVER, request, len(inputs), self.limits):
            wanted = expected[len(results)]
            if "error" in result:
                passed, why = False, str(result["error"])
            elif function is None:
                passed, why = same_output(result.get("stdout", ""), wanted), "wrong output"
            else:
                value = result.get("value")
                if isinstance(value, list) and value[:1] == ["tuple"]:
                    value = ["list", *value[1:]]
                try:
                    passed, why = same_value(value, wanted), "wrong value"
                except (ValueError, TypeError):  # the program wrote it, not the driver
                    passed, why = False, "wrote among the results"
            results.append(passed)
            if not passed:
                reason = reason or f"test {len(results)}: {why}"
            stopped = "error" in result or (not passed and self.compare == "verdict")
            if stopped or len(results) == len(tests):
                return reason
        results.append(False)
        return reason or f"test {len(results)}: the program ended"

    def equivalent(self, answer: dict[str, Any] | None, reference: dict[str, Any] | None) -> bool:
        if answer is None or reference is None:
            return False
        compared = "passed" if self.compare == "verdict" else "results"
        return answer[compared] == reference[compared]

    def is_correct(self, example: Mapping[str, Any], answer: dict[str, Any] | None) -> bool:
        return answer is not None and answer["passed"]
