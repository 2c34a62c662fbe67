# SPDX-License-Identifier: Apache-2.0
"""Word problems for the embedded pair, in GSM8K's schema.

    python examples/tiny_pair/make_problems.py --task gsm8k --split test --seed 1 --n 500 --out problems.jsonl

A problem is a small world: three or four people, each of whom has a number of things, given outright or relative
to somebody else, and one question. Its solution says the same in one of very many ways: any valid order of the
steps, commuted terms, optional step numbers, optional checks, optional remarks on numbers that don't matter, a
dozen wordings. So most differences between two solutions are harmless, digits included, and a few decide.

The four splits never share a problem, whatever the seeds: the split is a hash of the problem's arithmetic (who
has what relative to whom, and the question; names, things, order and wording left out).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass


NAMES = "Anna Ben Clara David Emma Frank Grace Henry Ivy Jack".split()
THINGS = (
    "apples books cards coins marbles pens shells stamps stickers pears plums beads buttons candles cookies ribbons"
).split()
DISTRACTIONS = (
    ("{name} is {n} years old.", "age of {n}"),
    ("The walk home takes {n} minutes.", "{n} minutes"),
    ("There are {n} chairs in the room.", "{n} chairs"),
    ("It is {n} degrees outside.", "{n} degrees"),
    ("The bus has {n} seats.", "{n} seats"),
)
FACTOR_WORDS = {2: "twice", 3: "three times", 4: "four times"}

# Shares of the hash space, in percent. Language-model training takes most of it.
SPLITS = {"lm": range(76), "train": range(76, 84), "validation": range(84, 92), "test": range(92, 100)}
LARGEST_VALUE = 30
LARGEST_TOTAL = 60


@dataclass
class Quantity:
    """What one person has: `kind` is given, more, fewer, times or half; `reference` indexes an earlier quantity."""

    kind: str
    number: int
    reference: int
    value: int


@dataclass
class Problem:
    """The arithmetic of a problem. `asked` indexes the quantities the question is about."""

    quantities: list[Quantity]
    question: str
    asked: tuple[int, ...]
    number: int

    def expression(self, i: int) -> str:
        """Quantity i as a nested formula, free of names and order."""
        q = self.quantities[i]
        return f"{q.kind}{q.number}" + ("" if q.kind == "given" else f"({self.expression(q.reference)})")

    def split(self) -> str:
        everything = sorted(self.expression(i) for i in range(len(self.quantities)))
        asked = [self.expression(i) for i in self.asked]
        if self.question != "difference":
            asked.sort()
        canonical = json.dumps([self.question, self.number, asked, everything])
        bucket = int(hashlib.sha256(canonical.encode()).hexdigest(), 16) % 100
        return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def draw_quantity(rng: random.Random, quantities: list[Quantity]) -> Quantity:
    kind = rng.choice(("given", "more", "more", "fewer", "fewer", "times", "half")) if quantities else "given"
    reference = rng.randrange(len(quantities)) if quantities else 0
    base = quantities[reference].value if quantities else 0
    if kind == "more":
        k = rng.randint(2, 15)
        return Quantity(kind, k, reference, base + k)
    if kind == "fewer" and base > 4:
        k = rng.randint(2, min(15, base - 2))
        return Quantity(kind, k, reference, base - k)
    if kind == "times" and base <= 12:
        k = rng.randint(2, 4)
        return Quantity(kind, k, reference, base * k)
    if kind == "half" and base % 2 == 0 and base > 2:
        return Quantity(kind, 2, reference, base // 2)
    value = rng.randint(3, 20)
    return Quantity("given", value, 0, value)


def draw_problem(rng: random.Random) -> Problem:
    """Draws worlds until the numbers stay small enough for a small model."""
    while True:
        quantities: list[Quantity] = []
        for _ in range(rng.choice((3, 4, 4, 4))):
            quantities.append(draw_quantity(rng, quantities))
        values = [q.value for q in quantities]
        if max(values) > LARGEST_VALUE or len(set(values)) < len(values):
            continue
        if all(q.kind == "given" for q in quantities):
            continue
        question = rng.choice(("total", "total", "pair", "difference", "left"))
        count = {"total": min(len(values), 4), "pair": 2, "difference": 2, "left": rng.choice((1, 2, 3))}[question]
        asked = rng.sample(range(len(values)), count)
        total = sum(values[i] for i in asked)
        if not 3 <= total <= LARGEST_TOTAL:
            continue
        number = 0
        if question == "difference":
            asked.sort(key=lambda i: -values[i])
        if question == "left":
            number = rng.randint(2, min(15, total - 1))
        return Problem(quantities, question, tuple(asked), number)


class FirstChoices(random.Random):
    """Decides every free choice in the plainest way: the first of the choices, and no extras."""

    def choice(self, seq):
        return seq[0]

    def random(self) -> float:
        return 1.0

    def randrange(self, *args) -> int:
        return 0

    def shuffle(self, x) -> None:
        pass


class Writer:
    """Puts one problem into words. The question's choices are drawn from `rng`, the answer's from `style`."""

    def __init__(self, problem: Problem, rng: random.Random, style: random.Random):
        self.problem = problem
        self.rng = rng
        self.style = style
        self.names = rng.sample(NAMES, len(problem.quantities))
        self.thing = rng.choice(THINGS)
        self.order = list(range(len(problem.quantities)))  # of the facts in the question
        asides = rng.sample(DISTRACTIONS, rng.choice((0, 1, 1, 2)))
        self.asides = [(text, short, rng.randint(3, 40), rng.choice(NAMES)) for text, short in asides]
        self.label_style = style.choice(("none", "number", "step", "word", "word"))
        self.lines: list[str] = []

    def pick(self, *choices: str) -> str:
        return self.rng.choice(choices)

    # The question

    def fact(self, i: int) -> str:
        q, name, thing = self.problem.quantities[i], self.names[i], self.thing
        other = self.names[q.reference]
        if q.kind == "given":
            return f"{name} has {q.number} {thing}."
        if q.kind in ("more", "fewer"):
            return self.pick(
                f"{name} has {q.number} {q.kind} {thing} than {other}.",
                f"{name} has {q.number} {thing} {q.kind} than {other}.",
            )
        if q.kind == "times":
            return f"{name} has {FACTOR_WORDS[q.number]} as many {thing} as {other}."
        return f"{name} has half as many {thing} as {other}."

    def listing(self, indices: tuple[int, ...]) -> str:
        names = [self.names[i] for i in indices]
        return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]

    def question(self) -> str:
        p = self.problem
        if self.rng.random() < 0.2:
            self.rng.shuffle(self.order)
        sentences = [self.fact(i) for i in self.order]
        for text, _, n, name in self.asides:
            sentences.insert(self.rng.randint(0, len(sentences)), text.format(n=n, name=name))
        who = self.listing(p.asked)
        if p.question in ("total", "pair"):
            sentences.append(
                self.pick(
                    f"How many {self.thing} do {who} have in total?",
                    f"How many {self.thing} do {who} have together?",
                )
            )
        elif p.question == "difference":
            more, less = (self.names[i] for i in p.asked)
            sentences.append(
                self.pick(
                    f"How many more {self.thing} does {more} have than {less}?",
                    f"How many fewer {self.thing} does {less} have than {more}?",
                )
            )
        else:
            does = "does" if len(p.asked) == 1 else "do"
            verb = "gives" if len(p.asked) == 1 else "give"
            sentences.append(f"Then {who} {verb} away {p.number} {self.thing}.")
            sentences.append(f"How many {self.thing} {does} {who} have left?")
        return " ".join(sentences)

    # The solution

    def phrase(self, *choices: str) -> str:
        return self.style.choice(choices)

    def label(self) -> str:
        n = len(self.lines) + 1
        if self.label_style == "number":
            return f"{n}. "
        if self.label_style == "step":
            return f"Step {n}: "
        if self.label_style == "word" and self.style.random() < 0.5:
            return self.phrase("Now, ", "Next, ", "Also, ") if self.lines else "First, "
        return ""

    def add(self, line: str) -> None:
        label = self.label()
        if label.endswith(", ") and line.startswith(
            ("We ", "Never ", "The ", "After ", "Adding ", "With ", "So ", "In ", "Compare ", "Without ", "They ")
        ):
            line = line[0].lower() + line[1:]
        self.lines.append(label + line)

    def commuted(self, a: int, sign: str, b: int) -> str:
        return self.phrase(f"{a} {sign} {b}", f"{b} {sign} {a}")

    def working(self, i: int) -> tuple[str, str]:
        """The formula for quantity i, and one that checks it."""
        q = self.problem.quantities[i]
        base = self.problem.quantities[q.reference].value
        if q.kind == "more":
            return self.commuted(base, "+", q.number), self.phrase(
                f"{q.value} - {q.number} = {base}", f"{q.value} - {base} = {q.number}"
            )
        if q.kind == "fewer":
            return f"{base} - {q.number}", self.commuted(q.value, "+", q.number) + f" = {base}"
        if q.kind == "times":
            formula = self.commuted(base, "*", q.number)
            if q.number < 4 and self.style.random() < 0.4:
                formula = " + ".join([str(base)] * q.number)
            return formula, f"{q.value} / {q.number} = {base}"
        return f"{base} / 2", self.phrase(f"{q.value} + {q.value}", f"2 * {q.value}") + f" = {base}"

    def ledger(self, i: int) -> str:
        """Who has what: a name and its number side by side, which is what a small model can look up."""
        return f"{self.names[i]}: {self.problem.quantities[i].value}"

    def step(self, i: int) -> None:
        q, name, thing = self.problem.quantities[i], self.names[i], self.thing
        result = self.ledger(i)
        if q.kind == "given":
            self.add(
                self.phrase(
                    f"{name} has {q.value} {thing}, {result}.",
                    f"{name} has {q.value} {thing}. {result}.",
                    f"{name} has {q.value} {thing} to start with. {result}.",
                    f"The problem says that {name} has {q.value} {thing}, so {result}.",
                )
            )
            return
        other, known = self.names[q.reference], self.ledger(q.reference)
        relation = {
            "more": f"{q.number} more {thing} than {other}",
            "fewer": f"{q.number} fewer {thing} than {other}",
            "times": f"{FACTOR_WORDS.get(q.number)} as many {thing} as {other}",
            "half": f"half as many {thing} as {other}",
        }[q.kind]
        formula, check = self.working(i)
        self.add(
            self.phrase(
                f"{name} has {relation}, {known}. So {formula} = {q.value}, {result}.",
                f"{name} has {relation}. With {known} that makes {formula} = {q.value}, so {result}.",
                f"We know {known}, and {name} has {relation}. {formula} = {q.value}, {result}.",
                f"{known}. {name} has {relation}, that is {formula} = {q.value}. {result}.",
            )
        )
        if self.style.random() < 0.35:
            self.lines[-1] += self.phrase(f" Check: {check}.", f" ({check})")

    def recap(self, order: list[int]) -> None:
        self.add(self.phrase("So far: ", "We have ", "In short: ") + ", ".join(map(self.ledger, order)) + ".")

    def combine(self) -> int:
        """Answers the question from the quantities."""
        p, thing = self.problem, self.thing
        values = [q.value for q in p.quantities]
        order = list(p.asked)
        if p.question == "difference":
            (a, b), (more, less) = (values[i] for i in order), map(self.ledger, order)
            d = a - b
            self.add(
                self.phrase(
                    f"{more} and {less}, so the difference is {a} - {b} = {d}.",
                    f"{less} and {more}, so the difference is {a} - {b} = {d}.",
                    f"Compare {more} with {less}: {a} - {b} = {d}.",
                )
            )
            return d
        self.style.shuffle(order)
        if len(order) > 1 and self.style.random() < 0.3:
            self.recap(order)
            self.style.shuffle(order)
        total = values[order[0]]
        for position, i in enumerate(order[1:]):
            new, previous = self.ledger(i), self.ledger(order[position])
            formula, total = self.commuted(total, "+", values[i]), total + values[i]
            if position == 0:
                line = self.phrase(
                    f"{previous} and {new} make {formula} = {total} {thing}.",
                    f"Adding {previous} and {new}, {formula} = {total}.",
                    f"{previous} together with {new} gives {formula} = {total} {thing}.",
                )
            else:
                line = self.phrase(
                    f"With {new} that makes {formula} = {total} {thing}.",
                    f"Adding {new}, {formula} = {total}.",
                    f"{new} brings it to {formula} = {total}.",
                )
            self.add(line)
        if p.question == "left":
            left = total - p.number
            start = f"{self.ledger(order[0])}. " if len(order) == 1 else ""
            self.add(
                start
                + self.phrase(
                    f"After giving away {p.number} {thing}, {total} - {p.number} = {left} are left.",
                    f"They give away {p.number}, so {total} - {p.number} = {left} {thing} are left.",
                    f"Without the {p.number} given away it is {total} - {p.number} = {left} {thing}.",
                )
            )
            return left
        return total

    def goal(self) -> str:
        """What is asked, in other words: the same place for the words that decide as for those that don't."""
        p, who = self.problem, self.listing(self.problem.asked)
        if p.question == "difference":
            more, less = (self.names[i] for i in p.asked)
            return self.phrase(
                f"how many more {self.thing} {more} has than {less}",
                f"how many fewer {self.thing} {less} has than {more}",
                f"the difference between {more} and {less}",
            )
        if p.question == "left":
            return self.phrase(f"how many {self.thing} remain for {who}", f"what {who} kept of the {self.thing}")
        return self.phrase(f"how many {self.thing} {who} have together", f"the total number of {self.thing} for {who}")

    def with_references(self, indices: set[int]) -> set[int]:
        """`indices` and every quantity that they are given relative to."""
        found: set[int] = set()
        stack = list(indices)
        while stack:
            i = stack.pop()
            if i not in found:
                found.add(i)
                if self.problem.quantities[i].kind != "given":
                    stack.append(self.problem.quantities[i].reference)
        return found

    def answer(self) -> str:
        quantities = self.problem.quantities
        opening = self.phrase(
            "", "Let us go step by step. ", "We work it out. ", "Here is how to solve it. ", "Let us see. "
        ) + self.phrase("We want to know ", "The question is ", "We need ")
        opening += self.goal() + ". "
        # A careful solver sometimes works out what nobody asked for.
        extra = {i for i in range(len(quantities)) if self.style.random() < 0.5}
        open_steps = self.with_references(extra | set(self.problem.asked))
        done: set[int] = set()
        remarks = [
            self.phrase("Never mind", "We can ignore") + f" the {short.format(n=n)}."
            for _, short, n, _ in self.asides
            if self.style.random() < 0.6
        ]
        while open_steps:
            if remarks and self.style.random() < 0.3:
                self.add(remarks.pop(self.style.randrange(len(remarks))))
            ready = [
                i
                for i in self.order
                if i in open_steps and (quantities[i].kind == "given" or quantities[i].reference in done)
            ]
            i = self.style.choice(ready)
            open_steps.remove(i)
            done.add(i)
            self.step(i)
        result = self.combine()
        unit = "" if self.style.random() < 0.3 else f" {self.thing}"
        closing = self.phrase("So the answer is ", "This gives ", "In the end we get ") + f"{result}{unit}."
        return opening + " ".join([*self.lines, closing]) + f"\n#### {result}"


def problems(split: str, seed: int, plain: bool = False) -> Iterator[dict[str, str]]:
    """Endless problems of one split, no two with the same question; `plain` answers make no free choice."""
    rng = random.Random(f"{split}-{seed}")
    seen: set[str] = set()
    while True:
        problem = draw_problem(rng)
        if problem.split() != split:
            continue
        writer = Writer(problem, rng, FirstChoices() if plain else rng)
        question = writer.question()
        if question not in seen:
            seen.add(question)
            yield {"question": question, "answer": writer.answer()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", choices=["gsm8k"], default="gsm8k")
    parser.add_argument("--split", choices=list(SPLITS), required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--n", type=int, required=True, help="number of problems")
    parser.add_argument("--out", required=True, help="JSONL file to write")
    args = parser.parse_args()
    stream = problems(args.split, args.seed)
    with open(args.out, "w", encoding="utf-8") as file:
        for _ in range(args.n):
            file.write(json.dumps(next(stream)) + "\n")


if __name__ == "__main__":
    main()
