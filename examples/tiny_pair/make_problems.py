# SPDX-License-Identifier: Apache-2.0
"""Word problems for the embedded pair, in GSM8K's schema.

    python examples/tiny_pair/make_problems.py --task gsm8k --split test --seed 1 --n 500 --out problems.jsonl

A problem is a story: somebody has a number of things, four to six events change it, and there is one question. Its
solution says the same in one of very many ways: events one by one or two of them joined first, commuted terms,
optional step numbers, optional checks, optional remarks on numbers that don't matter, a dozen wordings. So most
differences between two solutions are harmless, digits included, and a few decide.

The four splits never share a problem, whatever the seeds: the split is a hash of the problem's arithmetic (start,
events, question; names, things and wording left out).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import astuple, dataclass


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
# Words that a line may begin with, and that are written small behind "First,". Others are names.
BEGINNINGS = {"We", "Never", "With", "That", "There", "Half", "Two", "The", "Adding", "Taking"}

# Shares of the hash space, in percent. Language-model training takes most of it.
SPLITS = {"lm": range(76), "train": range(76, 84), "validation": range(84, 92), "test": range(92, 100)}
LARGEST_VALUE = 60


@dataclass
class Event:
    """`kind` is more, fewer, times or half; `number` what it changes by; `value` what there is afterwards."""

    kind: str
    number: int
    value: int


@dataclass
class Problem:
    """The arithmetic of a problem: `question` is now, change or shared (among `number`)."""

    start: int
    events: list[Event]
    question: str
    number: int

    def split(self) -> str:
        canonical = json.dumps([self.start, [astuple(event) for event in self.events], self.question, self.number])
        bucket = int(hashlib.sha256(canonical.encode()).hexdigest(), 16) % 100
        return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def draw_event(rng: random.Random, value: int) -> Event:
    kind = rng.choice(("more", "more", "fewer", "fewer", "times", "half"))
    if kind == "times" and 3 <= value <= LARGEST_VALUE // 2:
        k = rng.choice((2, 2, 3)) if value <= LARGEST_VALUE // 3 else 2
        return Event(kind, k, value * k)
    if kind == "half" and value % 2 == 0 and value >= 8:
        return Event(kind, 2, value // 2)
    if (kind == "fewer" and value >= 6) or value > LARGEST_VALUE - 15:
        k = rng.randint(2, min(15, value - 3))
        return Event("fewer", k, value - k)
    k = rng.randint(2, 15)
    return Event("more", k, value + k)


def draw_problem(rng: random.Random) -> Problem:
    start = value = rng.randint(3, 20)
    events: list[Event] = []
    for _ in range(rng.randint(4, 6)):
        events.append(draw_event(rng, value))
        value = events[-1].value
    question = rng.choice(("now", "now", "now", "change", "shared"))
    if question == "change" and value != start:
        return Problem(start, events, question, 0)
    divisors = [n for n in (2, 3, 4) if value % n == 0 and value > n]
    if question == "shared" and divisors:
        return Problem(start, events, question, rng.choice(divisors))
    return Problem(start, events, "now", 0)


class FirstChoices(random.Random):
    """Decides every free choice in the plainest way: the first of the choices, and no extras."""

    def choice(self, seq):
        return seq[0]

    def random(self) -> float:
        return 1.0

    def randrange(self, *args) -> int:
        return 0


class Writer:
    """Puts one problem into words. The question's choices are drawn from `rng`, the answer's from `style`."""

    def __init__(self, problem: Problem, rng: random.Random, style: random.Random):
        self.problem = problem
        self.rng = rng
        self.style = style
        self.name, *self.others = rng.sample(NAMES, 4)
        self.thing = rng.choice(THINGS)
        asides = rng.sample(DISTRACTIONS, rng.choice((0, 1, 1, 2)))
        self.asides = [(text, short, rng.randint(3, 40), rng.choice(NAMES)) for text, short in asides]
        self.label_style = style.choice(("none", "number", "step", "word", "word"))
        self.lines: list[str] = []

    # The question

    def pick(self, *choices: str) -> str:
        return self.rng.choice(choices)

    def event(self, event: Event) -> str:
        name, thing, k = self.name, self.thing, event.number
        other = self.rng.choice(self.others)
        if event.kind == "more":
            return self.pick(
                f"{name} buys {k} more {thing}.",
                f"{name} finds {k} {thing}.",
                f"{other} gives {name} {k} {thing}.",
                f"Then {name} wins {k} {thing}.",
            )
        if event.kind == "fewer":
            return self.pick(
                f"{name} loses {k} {thing}.",
                f"{name} gives {k} {thing} to {other}.",
                f"{other} borrows {k} {thing}.",
                f"Then {name} sells {k} {thing}.",
            )
        if event.kind == "times":
            word = {2: "twice", 3: "three times"}[k]
            return self.pick(
                f"By trading {name} comes to {word} as many {thing}.",
                f"After a sale {name} has {word} as many {thing}.",
            )
        return self.pick(f"{name} gives away half of the {thing}.", f"Half of the {thing} get lost.")

    def question(self) -> str:
        p, name, thing = self.problem, self.name, self.thing
        sentences = [self.pick(f"{name} has {p.start} {thing}.", f"At first {name} has {p.start} {thing}.")]
        sentences += [self.event(event) for event in p.events]
        for text, _, n, who in self.asides:
            sentences.insert(self.rng.randint(0, len(sentences)), text.format(n=n, name=who))
        value = p.events[-1].value
        if p.question == "now":
            ask = self.pick(f"How many {thing} does {name} have now?", f"How many {thing} are there in the end?")
        elif p.question == "change":
            which = "more" if value > p.start else "fewer"
            ask = f"How many {which} {thing} does {name} have now than at first?"
        else:
            sentences.append(f"{name} shares them equally among {p.number} children.")
            ask = self.pick(f"How many {thing} does each child get?", f"How many {thing} are there for each child?")
        return " ".join([*sentences, ask])

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
            ("We ", "Never ", "With ", "That ", "There ", "Half ", "Two ", "The ", "Adding ", "Taking ")
        ):
            line = line[0].lower() + line[1:]
        self.lines.append(label + line)

    def commuted(self, a: int, sign: str, b: int) -> str:
        return self.phrase(f"{a} {sign} {b}", f"{b} {sign} {a}")

    def step(self, before: int, event: Event) -> None:
        """One event by itself."""
        name, thing, k, value = self.name, self.thing, event.number, event.value
        if event.kind == "more":
            formula = self.commuted(before, "+", k)
            line = self.phrase(
                f"{name} gets {k} more, {formula} = {value} {thing}.",
                f"With {k} more {thing} that makes {formula} = {value}.",
                f"There are {k} more, so {formula} = {value}.",
                f"We add {k}, which gives {formula} = {value} {thing}.",
                f"The number of {thing} goes up by {k}: {formula} = {value}.",
                f"Adding {k} to {before} we get {formula} = {value}.",
            )
            check = self.phrase(f"{value} - {k} = {before}", f"{value} - {before} = {k}")
        elif event.kind == "fewer":
            formula = f"{before} - {k}"
            line = self.phrase(
                f"{name} has {k} fewer, {formula} = {value} {thing}.",
                f"Without {k} {thing} that makes {formula} = {value}.",
                f"There are {k} fewer, so {formula} = {value}.",
                f"We take {k} away, which gives {formula} = {value} {thing}.",
                f"The number of {thing} goes down by {k}: {formula} = {value}.",
                f"Taking {k} from {before} we get {formula} = {value}.",
            )
            check = self.commuted(value, "+", k) + f" = {before}"
        elif event.kind == "times":
            formula = self.commuted(before, "*", k)
            if self.style.random() < 0.4:
                formula = " + ".join([str(before)] * k)
            line = self.phrase(
                f"{name} has {k} times as many, {formula} = {value} {thing}.",
                f"That is {k} times as many {thing}: {formula} = {value}.",
                f"The number of {thing} goes up {k} times: {formula} = {value}.",
                f"{k} times {before} is what {name} has, so {formula} = {value}.",
            )
            check = self.phrase(f"{value} / {k} = {before}", f"{value} / {before} = {k}")
        else:
            line = self.phrase(
                f"{name} keeps half, {before} / 2 = {value} {thing}.",
                f"Half of the {thing} are left: {before} / 2 = {value}.",
                f"We take half of {before}, which gives {before} / 2 = {value}.",
                f"The number of {thing} goes down to half: {before} / 2 = {value}.",
            )
            check = self.phrase(f"{value} + {value}", f"2 * {value}", f"{value} * 2") + f" = {before}"
        self.add(line)
        if self.style.random() < 0.4:
            self.lines[-1] += self.phrase(f" Check: {check}.", f" ({check})", f" That is right, as {check}.")

    def joined(self, before: int, first: Event, second: Event) -> None:
        """Two events that both add, or both take away, as one."""
        k, value = first.number + second.number, second.value
        total = self.commuted(first.number, "+", second.number)
        if first.kind == "more":
            formula, direction = self.commuted(before, "+", k), "more"
        else:
            formula, direction = f"{before} - {k}", "fewer"
        self.add(
            self.phrase(
                f"Two changes at once, {total} = {k} {direction}: {formula} = {value} {self.thing}.",
                f"That is {total} = {k} {direction} in all, so {formula} = {value}.",
                f"We take the next two changes as one, {total} = {k} {direction}, and get {formula} = {value}.",
            )
        )

    def goal(self) -> str:
        p, name, thing = self.problem, self.name, self.thing
        if p.question == "now":
            return self.phrase(f"how many {thing} {name} has in the end", f"the number of {thing} now")
        if p.question == "change":
            return self.phrase(f"how much the number of {thing} changed", f"now and at first for {name}, compared")
        return self.phrase(f"how many {thing} each child gets", f"one share of the {thing}")

    def answer(self) -> str:
        p, thing = self.problem, self.thing
        opening = self.phrase(
            "", "Let us go step by step. ", "We work it out. ", "Here is how to solve it. ", "Let us see. "
        ) + self.phrase("We want to know ", "The question is ", "We need ")
        opening += self.goal() + ". "
        self.add(self.phrase(f"{self.name} has {p.start} {thing} at first.", f"There are {p.start} {thing} at first."))
        remarks = [
            self.phrase("Never mind", "We can ignore") + f" the {short.format(n=n)}."
            for _, short, n, _ in self.asides
            if self.style.random() < 0.6
        ]
        value, i = p.start, 0
        while i < len(p.events):
            if remarks and self.style.random() < 0.3:
                self.add(remarks.pop(self.style.randrange(len(remarks))))
            start, pair = value, p.events[i : i + 2]
            kinds = {event.kind for event in pair}
            joinable = len(pair) == 2 and len(kinds) == 1 and kinds <= {"more", "fewer"}
            if joinable and self.style.random() < 0.5:
                self.joined(value, *pair)
            else:
                pair = pair[:1]
                self.step(value, *pair)
            i += len(pair)
            value = pair[-1].value
            if i < len(p.events) and self.style.random() < 0.4:
                self.lines[-1] += self.phrase(
                    f" So far {value}.",
                    f" Now we are at {value}.",
                    f" This leaves us with {value} {thing}.",
                    f" From {start} it went to {value}.",
                    f" {self.name} has {value} at this point.",
                )
        result = value
        if p.question == "change":
            high, low = max(value, p.start), min(value, p.start)
            result = high - low
            self.add(
                self.phrase(
                    f"It was {p.start} and is {value}, and {high} - {low} = {result}.",
                    f"Compared with {p.start} at first, {high} - {low} = {result}.",
                    f"From {p.start} to {value} that is {high} - {low} = {result}.",
                )
            )
        elif p.question == "shared":
            result = value // p.number
            self.add(
                self.phrase(
                    f"Among {p.number} children, {value} / {p.number} = {result} each.",
                    f"Each of {p.number} gets {value} / {p.number} = {result}.",
                    f"We divide {value} by {p.number}, so {value} / {p.number} = {result}.",
                )
            )
        unit = "" if self.style.random() < 0.3 else f" {thing}"
        closing = (
            self.phrase("So the answer is ", "This gives ", "In the end we get ", "The result is ")
            + f"{result}{unit}."
        )
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
    parser.add_argument("--task", choices=["gsm8k", "livecodebench"], default="gsm8k")
    parser.add_argument("--split", choices=list(SPLITS), required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--n", type=int, required=True, help="number of problems")
    parser.add_argument("--out", required=True, help="JSONL file to write")
    args = parser.parse_args()
    stream = problems(args.split, args.seed)
    if args.task == "livecodebench":
        from make_programs import programs

        stream = programs(args.split, args.seed)
    with open(args.out, "w", encoding="utf-8") as file:
        for _ in range(args.n):
            file.write(json.dumps(next(stream)) + "\n")


if __name__ == "__main__":
    main()
