# SPDX-License-Identifier: Apache-2.0
"""Programming problems for the embedded pair, as rows in LiveCodeBench's official format.

    python examples/tiny_pair/make_problems.py --task livecodebench --split test --seed 1 --n 500 --out problems.jsonl

A problem takes a list of integers through two to four steps and asks for one number. Its solution says the same in
one of very many ways: comprehensions, loops or slices, names, comments, spacing, constants with a name of their own in
any order. So most differences between two solutions are harmless, and operators, bounds, indices and conditions
decide: no problem is kept whose tests wouldn't notice that a step is left out or its number is off by one.

The four splits never share a problem, whatever the seeds: the split is a hash of the steps.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from make_problems import SPLITS, FirstChoices


RESULTS = "values kept items data rest numbers part found chosen left".split()
LOOPS = "x n v value num item".split()
TOTALS = "result total answer out res".split()
CONSTANTS = "limit k bound step amount cut size base".split()
OPENINGS = (
    "",
    "Here is a program.\n",
    "This follows the steps one by one.\n",
    "We can do it in a few lines.\n",
    "The list is changed step by step.\n",
)
COMMENTS = (
    "next step",
    "as the problem says",
    "change the list",
    "go through the list",
    "only what we need",
    "this comes next",
    "now the numbers",
)
NUM_TESTS = 10
STARTER = "class Solution:\n    def solve(self, nums: List[int]) -> int:\n        "

CONDITIONS = {
    "greater": (">", ("greater than {k}", "larger than {k}", "above {k}")),
    "less": ("<", ("less than {k}", "smaller than {k}", "below {k}")),
    "at_least": (">=", ("at least {k}", "{k} or more")),
    "at_most": ("<=", ("at most {k}", "{k} or less")),
    "not": ("!=", ("not equal to {k}", "different from {k}")),
}
DIVISIBLE = {
    "multiple": ("==", ("divisible by {k}", "a multiple of {k}")),
    "no_multiple": ("!=", ("not divisible by {k}", "no multiple of {k}")),
}


class Step(NamedTuple):
    """`kind` says what is done to the list, `k` with which number."""

    kind: str
    k: int


STEPS: dict[str, Callable[[list[int], int], list[int]]] = {
    "greater": lambda xs, k: [x for x in xs if x > k],
    "less": lambda xs, k: [x for x in xs if x < k],
    "at_least": lambda xs, k: [x for x in xs if x >= k],
    "at_most": lambda xs, k: [x for x in xs if x <= k],
    "not": lambda xs, k: [x for x in xs if x != k],
    "multiple": lambda xs, k: [x for x in xs if x % k == 0],
    "no_multiple": lambda xs, k: [x for x in xs if x % k != 0],
    "add": lambda xs, k: [x + k for x in xs],
    "subtract": lambda xs, k: [x - k for x in xs],
    "times": lambda xs, k: [x * k for x in xs],
    "remainder": lambda xs, k: [x % k for x in xs],
    "without_first": lambda xs, k: xs[k:],
    "without_last": lambda xs, k: xs[:-k],
    "first": lambda xs, k: xs[:k],
    "last": lambda xs, k: xs[-k:],
    "every": lambda xs, k: xs[::k],
    "up": lambda xs, k: sorted(xs),
    "down": lambda xs, k: sorted(xs, reverse=True),
    "reverse": lambda xs, k: xs[::-1],
}
ENDS: dict[str, Callable[[list[int]], int]] = {
    "sum": sum,
    "count": len,
    "largest": lambda xs: max(xs, default=0),
    "smallest": lambda xs: min(xs, default=0),
    "front": lambda xs: xs[0] if xs else 0,
    "back": lambda xs: xs[-1] if xs else 0,
}


class Program(NamedTuple):
    """Steps, what is asked for in the end, and whether the program reads its standard input."""

    steps: tuple[Step, ...]
    end: str
    is_stdin: bool

    def split(self) -> str:
        bucket = int(hashlib.sha256(json.dumps([self.steps, self.end]).encode()).hexdigest(), 16) % 100
        return next(name for name, buckets in SPLITS.items() if bucket in buckets)

    def variants(self) -> Iterator[Program]:
        """The program without one of its steps, or with a step's number off by one."""
        for i, (kind, k) in enumerate(self.steps):
            before, behind = self.steps[:i], self.steps[i + 1 :]
            yield self._replace(steps=before + behind)
            if k > 1:
                yield from (self._replace(steps=(*before, Step(kind, other), *behind)) for other in (k - 1, k + 1))

    def run(self, numbers: list[int]) -> int:
        for kind, k in self.steps:
            numbers = STEPS[kind](numbers, k)
        return ENDS[self.end](numbers)


def draw_step(rng: random.Random) -> Step:
    kind = rng.choice([*CONDITIONS, *DIVISIBLE, *STEPS])  # conditions twice as often
    if kind in CONDITIONS:
        return Step(kind, rng.randint(2, 20))
    if kind in DIVISIBLE or kind in ("times", "every"):
        return Step(kind, rng.randint(2, 5 if kind in DIVISIBLE else 3))
    if kind in ("add", "subtract"):
        return Step(kind, rng.randint(1, 12))
    if kind == "remainder":
        return Step(kind, rng.randint(3, 12))
    return Step(kind, 0 if kind in ("up", "down", "reverse") else rng.randint(1, 4))


def draw_program(rng: random.Random) -> Program:
    while True:
        steps = tuple(draw_step(rng) for _ in range(rng.randint(2, 4)))
        end = rng.choice([*ENDS])
        if len({step.kind for step in steps}) == len(steps):
            return Program(steps, end, rng.random() < 0.3)


def test_lists(program: Program, rng: random.Random, n: int) -> list[list[int]]:
    """Lists with the numbers at the edges of the program's conditions, seen through the steps before them."""
    edges, shift, factor = [], 0, 1
    for kind, k in program.steps:
        if kind in CONDITIONS or kind in DIVISIBLE:
            edges += [(k + d - shift) // factor for d in (-1, 0, 1)]
        shift, factor = {
            "add": (shift + k, factor),
            "subtract": (shift - k, factor),
            "times": (shift * k, factor * k),
        }.get(kind, (shift, factor))
    lists = []
    for _ in range(n):
        numbers = [rng.randint(1, 30) for _ in range(rng.randint(7, 12))] + edges
        rng.shuffle(numbers)
        lists.append(numbers)
    return lists


class Writer:
    """Words and code for one program; `style` chooses among the ways to say the same."""

    def __init__(self, program: Program, rng: random.Random, style: random.Random | FirstChoices):
        self.program = program
        self.rng = rng
        self.style = style

    # The statement is drawn from `rng`: it is part of the problem.

    def statement(self) -> str:
        rng = self.rng
        given = rng.choice(
            ("You are given a list of integers.", "There is a list of integers.", "Take the given list.")
        )
        steps = [self.step_words(step) for step in self.program.steps]
        end = rng.choice(
            {
                "sum": ("the sum of what is left", "what the numbers add up to"),
                "count": ("how many numbers are left", "the number of numbers left"),
                "largest": ("the largest number, or 0 if there is none", "the maximum, or 0 if nothing is left"),
                "smallest": ("the smallest number, or 0 if there is none", "the minimum, or 0 if nothing is left"),
                "front": ("the first number, or 0 if there is none", "the number in front, or 0 if nothing is left"),
                "back": ("the last number, or 0 if there is none", "the number at the end, or 0 if nothing is left"),
            }[self.program.end]
        )
        verb = "Print" if self.program.is_stdin else "Return"
        form = " The input is one line of integers." if self.program.is_stdin else ""
        return " ".join([given, *steps, f"{verb} {end}.{form}"])

    def step_words(self, step: Step) -> str:
        rng, (kind, k) = self.rng, step
        if kind in CONDITIONS or kind in DIVISIBLE:
            words = rng.choice({**CONDITIONS, **DIVISIBLE}[kind][1]).format(k=k)
            return rng.choice(("Keep the numbers that are {}.", "Only numbers that are {} stay.")).format(words)
        some = "the {} number" if k == 1 else "the {} {} numbers"
        ways = {
            "add": ("Add {k} to each number.", "Make each number {k} larger."),
            "subtract": ("Subtract {k} from each number.", "Make each number {k} smaller."),
            "times": ("Multiply each number by {k}.", "Make each number {k} times as large."),
            "remainder": ("Replace each number by its remainder modulo {k}.", "Take each number modulo {k}."),
            "without_first": ("Leave out {first}.", "Remove {first}."),
            "without_last": ("Leave out {last}.", "Remove {last}."),
            "first": ("Keep {first}.", "Only {first} stays." if k == 1 else "Only {first} stay."),
            "last": ("Keep {last}.", "Only {last} stays." if k == 1 else "Only {last} stay."),
            "every": ("From the first on, keep one number in {k}.", "Starting in front, only one in {k} stays."),
            "up": ("Sort from small to large.", "Put the small numbers first."),
            "down": ("Sort from large to small.", "Put the large numbers first."),
            "reverse": ("Reverse the list.", "Turn the list around."),
        }[kind]
        return rng.choice(ways).format(k=k, first=some.format("first", k), last=some.format("last", k))

    # The solution is drawn from `style`.

    def code(self) -> str:
        style, body = self.style, []
        names = self.shuffled(CONSTANTS)
        spelled: list[str] = []
        for _, k in self.program.steps:
            named = k and style.random() < 0.25
            spelled.append(names.pop() if named else str(k))
            if named:
                body.append(f"{spelled[-1]} = {k}")
        body = self.shuffled(body)
        current, results = "nums", self.shuffled(RESULTS)
        for step, k in zip(self.program.steps, spelled):
            target = results.pop() if style.random() < 0.7 else current
            if style.random() < 0.3:
                body.append(f"# {style.choice(COMMENTS)}")
            body += self.step_code(step, k, current, target)
            current = target
        body += self.end_code(current)
        if self.program.is_stdin:
            read = style.choice(("list(map(int, input().split()))", "[int(x) for x in input().split()]"))
            return "\n".join([f"nums = {read}", *body])
        return STARTER.rstrip(" ") + "\n".join(" " * 8 + line for line in body)

    def step_code(self, step: Step, k: str, xs: str, ys: str) -> list[str]:
        x = self.style.choice(LOOPS)
        kind = step.kind
        if kind in CONDITIONS or kind in DIVISIBLE:
            operator = {**CONDITIONS, **DIVISIBLE}[kind][0]
            test = f"{x} {operator} {k}" if kind in CONDITIONS else f"{x} % {k} {operator} 0"
            loop = [f"{ys} = []", f"for {x} in {xs}:", f"    if {test}:", f"        {ys}.append({x})"]
            whole = [f"{ys} = [{x} for {x} in {xs} if {test}]"]
            return self.style.choice(
                (whole, whole if xs == ys else loop, [f"{ys} = list(filter(lambda {x}: {test}, {xs}))"])
            )
        if kind in ("add", "subtract", "times", "remainder"):
            sign = {"add": "+", "subtract": "-", "times": "*", "remainder": "%"}[kind]
            value = f"{x} {sign} {k}"
            if sign in "+*" and self.style.random() < 0.4:
                value = f"{k} {sign} {x}"
            loop = [f"{ys} = []", f"for {x} in {xs}:", f"    {ys}.append({value})"]
            whole = [f"{ys} = [{value} for {x} in {xs}]"]
            return self.style.choice(
                (whole, whole if xs == ys else loop, [f"{ys} = list(map(lambda {x}: {value}, {xs}))"])
            )
        if kind in ("up", "down"):
            down = "" if kind == "up" else ", reverse=True"
            in_place = [f"{ys} = list({xs})", f"{ys}.sort({down.removeprefix(', ')})"]
            return self.style.choice(([f"{ys} = sorted({xs}{down})"], in_place))
        if kind == "reverse":
            return self.style.choice(([f"{ys} = {xs}[::-1]"], [f"{ys} = list(reversed({xs}))"]))
        cut = {
            "without_first": f"{k}:",
            "without_last": f":-{k}",
            "first": f":{k}",
            "last": f"-{k}:",
            "every": f"::{k}",
        }
        return [f"{ys} = {xs}[{cut[kind]}]"]

    def end_code(self, xs: str) -> list[str]:
        style, end = self.style, self.program.end
        x, total = style.choice(LOOPS), style.choice(TOTALS)
        say = (lambda value: f"print({value})") if self.program.is_stdin else (lambda value: f"return {value}")
        ways: tuple[Any, ...]
        if end == "sum":
            loop = [f"{total} = 0", f"for {x} in {xs}:", f"    {total} += {x}", say(total)]
            ways = ([say(f"sum({xs})")], loop, [f"{total} = sum({xs})", say(total)])
        elif end == "count":
            ways = ([say(f"len({xs})")], [f"{total} = len({xs})", say(total)], [say(f"sum(1 for {x} in {xs})")])
        elif end in ("largest", "smallest"):
            name = "max" if end == "largest" else "min"
            short = f"{name}({xs}) if {xs} else 0"
            ways = ([say(f"{name}({xs}, default=0)")], [say(short)], [f"{total} = {short}", say(total)])
        else:
            value = f"{xs}[{0 if end == 'front' else -1}]"
            careful = [f"{total} = 0", f"if {xs}:", f"    {total} = {value}", say(total)]
            ways = ([say(f"{value} if {xs} else 0")], careful, [f"{total} = {value} if {xs} else 0", say(total)])
        return style.choice(ways)

    def shuffled(self, items: list[str]) -> list[str]:
        if isinstance(self.style, FirstChoices):
            return list(reversed(items))
        return self.style.sample(items, len(items))


def programs(split: str, seed: int, plain: bool = False) -> Iterator[dict[str, str]]:
    """Endless rows of one split, no two with the same statement; `answer` is a response that solves it.

    `plain` answers make no free choice.
    """
    rng = random.Random(f"livecodebench-{split}-{seed}")
    seen: set[str] = set()
    while True:
        program = draw_program(rng)
        if program.split() != split:
            continue
        lists = [*test_lists(program, rng, NUM_TESTS - 1), []]
        outputs = [program.run(numbers) for numbers in lists]
        if any([other.run(numbers) for numbers in lists] == outputs for other in program.variants()):
            continue
        style = FirstChoices() if plain else rng
        writer = Writer(program, rng, style)
        statement = writer.statement()
        if statement in seen:
            continue
        seen.add(statement)
        tests = [
            {
                "input": " ".join(map(str, numbers)) + "\n" if program.is_stdin else json.dumps(numbers),
                "output": str(output),
                "testtype": "stdin" if program.is_stdin else "functional",
            }
            for numbers, output in zip(lists, outputs)
        ]
        packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests[2:])))).decode()
        yield {
            "question_title": "-".join(step.kind for step in program.steps),
            "question_content": statement,
            "platform": "tiny",
            "question_id": hashlib.sha256(statement.encode()).hexdigest()[:12],
            "contest_id": split,
            "contest_date": "2026-01-01T00:00:00",
            "starter_code": "" if program.is_stdin else STARTER,
            "difficulty": {2: "easy", 3: "medium", 4: "hard"}[len(program.steps)],
            "public_test_cases": json.dumps(tests[:2]),
            "private_test_cases": packed,
            "metadata": json.dumps({} if program.is_stdin else {"func_name": "solve"}),
            "answer": f"{style.choice(OPENINGS)}```python\n{writer.code()}\n```",
        }
