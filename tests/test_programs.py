# SPDX-License-Identifier: Apache-2.0
"""The embedded pair's programming problems: right, disjoint, and decided by what should decide."""

import ast
import contextlib
import io
import itertools
import json
import re
import sys

import pytest
from conftest import PAIR
from test_livecodebench import mutants

from autojudge_hf.tasks import LiveCodeBench
from autojudge_hf.tasks.livecodebench import decode_tests, extract_code


sys.path.insert(0, str(PAIR))
from make_problems import SPLITS
from make_programs import programs


def rows(n, split="train", seed=7, **options):
    return [*itertools.islice(programs(split, seed, **options), n)]


def passes(row, code):
    """Runs a program in this process: quick, and independent of the grader."""
    for test in decode_tests(row):
        printed, names = io.StringIO(), {"List": list, "input": lambda given=test["input"]: given.rstrip("\n")}
        try:
            with contextlib.redirect_stdout(printed):
                exec(code, names)
                if row["starter_code"]:
                    print(names["Solution"]().solve(json.loads(test["input"])))
        except Exception:
            return False
        if printed.getvalue().strip() != test["output"]:
            return False
    return True


def test_rows_have_the_official_fields():
    fields = (
        "question_title question_content platform question_id contest_id contest_date starter_code difficulty "
        "public_test_cases private_test_cases metadata"
    ).split()
    for row in rows(20):
        assert set(row) == {*fields, "answer"}
        assert len(json.loads(row["public_test_cases"])) == 2 and len(decode_tests(row)) == 10


@pytest.mark.parametrize("plain", [False, True])
def test_answers_solve_their_problems(plain):
    found = rows(300, plain=plain)
    assert all(passes(row, extract_code(row["answer"])) for row in found)
    reports = LiveCodeBench().extract_answers(found[:20], [row["answer"] for row in found[:20]])
    assert all(report["passed"] for report in reports)
    assert {bool(row["starter_code"]) for row in found[:20]} == {False, True}


def test_operators_and_bounds_decide():
    total = unnoticed = 0
    for row in rows(200):
        for kind, mutant in mutants(extract_code(row["answer"])):
            total += 1
            unnoticed += kind != "early_return" and passes(row, mutant)
    # Those that remain are equivalent, such as adding an odd number for subtracting it before parity is asked for.
    assert total > 500 and unnoticed <= 0.01 * total


def test_names_and_comments_do_not_decide():
    known = set("list map int input print sum max min len sorted filter reversed List".split())

    class Renamed(ast.NodeTransformer):
        def visit_Name(self, node):
            return node if node.id in known else ast.Name(node.id + "_", node.ctx)

        def visit_arg(self, node):
            return node if node.arg == "self" else ast.arg(node.arg + "_", self.generic_visit(node).annotation)

    for row in rows(50):
        assert passes(row, ast.unparse(Renamed().visit(ast.parse(extract_code(row["answer"])))))


def test_splits_share_no_program():
    """No two statements of different splits ask for the same steps, whatever their wording."""
    seen = {split: {steps(row) for row in rows(500, split)} for split in SPLITS}
    assert all(len(found) > 300 for found in seen.values())
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one & other


def steps(row):
    """The steps' kinds, the numbers in the statement, and what is asked for: read from the text."""
    *words, end = re.findall(r"[^.]+[.]", row["question_content"].replace(" The input is one line of integers.", ""))
    numbers = [n for sentence in words for n in re.findall(r"\d+", sentence) or "1"]
    kinds = {"sum|add up": "+", "how many|number of numbers": "#", "largest|maximum": ">", "smallest|minimum": "<"}
    kinds |= {"first|in front": "0", "last|at the end": "-1"}
    return row["question_title"], *numbers, next(kind for words, kind in kinds.items() if re.search(words, end))


def test_seeds_repeat_and_differ():
    assert rows(20) == rows(20)
    assert rows(20) != rows(20, seed=8)
