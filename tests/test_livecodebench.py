# SPDX-License-Identifier: Apache-2.0
"""Rows, extraction, comparison and grading of programs."""

import ast
import base64
import json
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import autojudge_hf.tasks.livecodebench
from autojudge_hf import mine_mismatches
from autojudge_hf.tasks import LiveCodeBench
from autojudge_hf.tasks.livecodebench import SYSTEM, decode_tests, extract_code, load_problems, same_output
from autojudge_hf.tasks.livecodebench_metric import PassAtK, pass_at_k
from autojudge_hf.tasks.sandbox import Limits


DATA = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="no real rows at ../shared/data")
TASK = LiveCodeBench()


def row(tests=(("3 4", "7"),), function=None, **fields):
    cases = json.dumps([{"input": given, "output": expected} for given, expected in tests])
    metadata = json.dumps({} if function is None else {"func_name": function})
    return {"question_content": "?", "public_test_cases": cases, "metadata": metadata, **fields}


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


# Real programs

# Mutants of the reference programs that pass every test, and why.
UNNOTICED = {
    ("2832", "bound"): "`best` starts at 1 instead of 0, and every list has an equal subarray of 1: equivalent",
    ("2848", "operator"): "a smaller modulus, which no count in the tests reaches",
    ("2848", "bound"): "a larger modulus, likewise",
}


@real
def test_reference_programs_and_their_mutants():
    rows = {r["question_id"]: r for r in load_problems(DATA / "livecodebench" / "rows.jsonl")}
    solutions = json.loads((DATA / "livecodebench" / "reference_solutions.json").read_text())
    assert len(solutions) == 6
    for number, code in solutions.items():
        report = TASK.report(rows[number], code)
        assert report["passed"] and len(report["results"]) == len(decode_tests(rows[number])), (number, report)
        for kind, mutant in mutants(code):
            passed = TASK.report(rows[number], mutant)["passed"]
            assert passed == ((number, kind) in UNNOTICED), (number, kind, mutant)


@real
@pytest.mark.slow
def test_human_eval():
    """Each problem as a program that runs its own asserts; its verdict is that of the interpreter itself."""
    with open(DATA / "humaneval" / "HumanEval.jsonl", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    assert len(problems) == 164

    def program(problem, code):
        return f"{code}\n{problem['test']}\ncheck({problem['entry_point']})\nprint('passed')"

    codes, rows, names = [], [], []
    for problem in problems:
        code = problem["prompt"] + problem["canonical_solution"]
        for kind, version in [("original", code), *mutants(code, problem["entry_point"])]:
            names.append((problem["task_id"], kind))
            codes.append(f"```python\n{program(problem, version)}\n```")
            rows.append(row([("", "passed")]))
    reports = dict(zip(names, TASK.extract_answers(rows, codes)))
    assert [name for name in names if name[1] == "original" and not reports[name]["passed"]] == []
    survivors = [name for name in names if name[1] != "original" and reports[name]["passed"]]
    assert len(survivors) < 0.06 * (len(names) - 164)
    # What the grader lets pass, the problem's own asserts let pass too: run plainly, the mutant ends without an error.
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda name: interpreted(extract_code(codes[names.index(name)])), survivors))


def interpreted(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return result.stdout.strip().endswith("passed")


def mutants(code, name=None):
    """An operator changed, a bound moved, an early return: the first place of each kind, where there is one."""
    swaps = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.Add, ast.FloorDiv: ast.Mult}
    swaps |= {ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
    swaps |= {ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.NotIn: ast.In}

    def operator(node):
        if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in swaps:
            node.op = swaps[type(node.op)]()
            return True
        if isinstance(node, ast.Compare) and type(node.ops[0]) in swaps:
            node.ops[0] = swaps[type(node.ops[0])]()
            return True
        return False

    def bound(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            node.value += 1
            return True
        return False

    def early_return(node):
        if isinstance(node, ast.FunctionDef) and name in (None, node.name):
            node.body.insert(0, ast.parse("return None").body[0])
            return True
        return False

    for change in (operator, bound, early_return):
        tree = ast.parse(code)
        if any(change(node) for node in ast.walk(tree)):
            yield change.__name__, ast.unparse(ast.fix_missing_locations(tree))


# Comparison


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("1.0 2", "1 2.00", True),
        ("7  \n", "7", True),
        ("  7\n8\t\n\n", "7\n8", True),
        ("Yes", "YES", False),
        ("1\n\n2", "1\n2", False),
        ("1\n2", "1 2", False),
        ("0.1", "0.10000000000000001", False),
        ("1e3", "1000", True),
        ("nan", "nan", True),
        ("a b", "a  b", False),
        ("1  2", "1 2", True),
        ("", "0", False),
        ("", "", True),
    ],
)
def test_outputs(printed, expected, same):
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    ("returned", "expected", "passes"),
    [
        ("(1, 2)", "[1, 2]", True),
        ("[(1, 2)]", "[[1, 2]]", False),
        ("[[1, 2]]", "[[1, 2]]", True),
        ("{1, 2}", "[1, 2]", False),
        ("1.0", "1", True),
        ("True", "1", True),
        ("'1'", "1", False),
        ("1", '"1"', False),
        ("None", "null", True),
        ("0.1 + 0.2", "0.3", False),
        ("{'a': [1]}", '{"a": [1]}', True),
        ("{1: 2}", '{"1": 2}', False),
        ("{1: 2, '1': 2}", '{"1": 2}', False),
        ("defaultdict(int, a=1)", '{"a": 1}', True),
        ("deque([1])", "[1]", False),
        ("range(2)", "[0, 1]", False),
        ("float('nan')", "NaN", False),
        ("10 ** 30", str(10**30), True),
        ("'é\\ud800'", '"é"', False),
        ("[]", "{}", False),
    ],
)
def test_values(returned, expected, passes):
    report = TASK.report(row([("1", expected)], "f"), f"def f(x):\n    return {returned}")
    assert report["passed"] is passes, report


@pytest.mark.parametrize("sign", ["", "-"])
def test_integers_past_the_interpreters_own_limit(sign):
    limit, digits = sys.get_int_max_str_digits(), sign + "123456789" * 5_000
    example = row([("1", digits)], "f")
    assert TASK.report(example, f"def f(x):\n    return int('{digits}')")["passed"]
    assert TASK.report(example, f"def f(x):\n    return int('{digits}') + 1")["reason"] == "test 1: wrong value"
    assert sys.get_int_max_str_digits() == limit


def test_values_nested_deeper_than_a_comparison_by_recursion_goes():
    example = row([("1", "[" * 500 + "2" + "]" * 500)], "f")
    code = "def f(x):\n    x = 2\n    for _ in range(500): x = [x]\n    return x"
    assert TASK.report(example, code)["passed"]
    assert TASK.report(example, code.replace("2", "3"))["reason"] == "test 1: wrong value"


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
        "import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))",  # fails in the official checker
        "print(sum(map(int, open(0).read().split())))",
        "import os\nos.write(1, b'%d' % sum(map(int, os.read(0, 100).split())))",
        "n = 0\ndef add(x):\n    global n\n    n += int(x)\nfor x in input().split(): add(x)\nprint(n)",
        "print(sum(map(int, input().split())))\nexit()",
        "print(sum(map(int, input().split())))\nimport os\nexit(1)",
        "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
        "import threading\ndef main():\n    print(sum(map(int, input().split())))\n"
        "threading.Thread(target=main).start()",
        "from dataclasses import dataclass\n@dataclass\nclass Pair:\n    a: int\n    b: int\n"
        "pair = Pair(*map(int, input().split()))\nprint(pair.a + pair.b)",
        "a, b = map(int, input().split())\nprint(reduce(lambda x, y: x + y, [a, b]), flush=True)",
    ],
)
def test_ways_to_read_and_write(code):
    report = TASK.report(row([("3 4", "7")] * 2), code)
    assert report == {"passed": True, "results": [True, True], "reason": ""}


def test_one_solution_for_all_tests():
    code = "class Solution:\n    n = 0\n    def count(self, x):\n        self.n += x\n        return self.n"
    assert TASK.report(row([("1", "1"), ("1", "2"), ("5", "7")], "count"), code)["passed"]


# Reports


def test_stops_at_the_first_failure_or_compares_all_tests():
    example = row([("1", "1"), ("2", "4"), ("3", "9"), ("4", "16")], "square")
    code = "def square(x):\n    if x == 3: raise ValueError\n    return x * x if x != 2 else 5"
    report = TASK.report(example, code)
    assert report == {"passed": False, "results": [True, False], "reason": "test 2: wrong value"}
    every = LiveCodeBench(compare="tests")
    assert every.report(example, code)["results"] == [True, False, False, True]
    other = "def square(x):\n    return x * x if x in (1, 4) else 0"
    assert every.equivalent(every.report(example, code), every.report(example, other))
    one = every.report(example, "def square(x):\n    return x * x if x != 3 else 0")
    assert not every.equivalent(every.report(example, code), one)
    assert TASK.equivalent(TASK.report(example, code), TASK.report(example, "def square(x): return 0"))
    assert not TASK.equivalent(None, None)


DEEP = """def deep(x):
    for _ in range(5_000): x = [x]
    return x"""


def forged(line):
    """A program that writes a line where results are expected: each is JSON on some descriptor."""
    return f"""import os
def forged(x):
    for fd in range(3, 64):
        try: os.write(fd, {line.encode()!r} + bytes([10]))
        except OSError: pass
forged(3)"""


EMPTY = json.dumps({"value": []})


@pytest.mark.parametrize(
    ("example", "text", "reason"),
    [
        (row([]), "```\nprint(7)\n```", "without tests"),
        ({"question_content": "?"}, "```\nprint(7)\n```", "without tests"),
        (row(private_test_cases="no base64!"), "```\nprint(7)\n```", "can't be decoded"),
        (row(private_test_cases="AAAA"), "```\nprint(7)\n```", "can't be decoded"),
        (row(private_test_cases=packed(["no JSON"])), "```\nprint(7)\n```", "can't be decoded"),
        (row(private_test_cases=packed('[{"input": 1}]')), "```\nprint(7)\n```", "can't be decoded"),
        (row(private_test_cases=packed(print)), "```\nprint(7)\n```", "builtins.print"),
        (row([("3 4", "no JSON")], "add"), "```\ndef add(x): return 7\n```", "Expecting value"),
        (row([("3 4", "1" * 50_001)], "add"), "```\ndef add(x): return 7\n```", "50001 digits, where 50000 are"),
        (row([("3 4", "[" * 100_000)], "add"), "```\ndef add(x): return 7\n```", "recursion|Stack overflow"),
        (row(metadata="no JSON"), "```\nprint(7)\n```", "Expecting value"),
        (row([("3", "7")], "add"), "```\ndef sub(x): return 7\n```", "no function add"),
        (row([("3", "7")], metadata={"func_name": "add"}), "```\ndef add(x): return 8\n```", "wrong value"),
        (row(), "```\nprint('snan')\n```", "wrong output"),
        (row([("3", "[]")], "deep"), f"```\n{DEEP}\n```", "wrong value|wrote among the results|RecursionError"),
        (row([("3", "[]")], "forged"), f"```\n{forged(EMPTY)}\n```", "wrote among the results"),
        (row(), f"```\n{forged('[' * 100_000)}\n```", "wrote among the results"),
        (row(), "print(7)", "no code"),
        (row(), "", "no code"),
        (row(), "```\nprint(7)", "no code"),
        (row(), "```\nprint(7)\n```\ntext\n```\nprint(8)\n```", "wrong output"),
        (row(), "```\nprint(7)\n```\n```\nprint(8)", "wrong output"),
        (row(), "```\nprint('\ud800')\n```", "isn't Unicode"),
    ],
)
def test_nonsense_gets_a_verdict(example, text, reason):
    (report,) = TASK.extract_answers([example], [text])
    assert not report["passed"] and re.search(reason, report["reason"])
    assert json.loads(json.dumps(report)) == report and not TASK.is_correct(example, report)


@pytest.fixture
def ctrl_c_raises():
    """Also where the tests run as a shell's background job, which is started deaf to it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize("mines", [True, False])
@pytest.mark.usefixtures("ctrl_c_raises")
def test_an_interruption_ends_within_a_test(mines, random_pair):
    """Ctrl-C, while programs are graded that would take thirty seconds each: in mining by another thread."""

    class Interrupted(LiveCodeBench):
        def prompt(self, example, tokenizer):
            return "3 1 15"

        def extract_answers(self, examples, texts):
            ctrl_c = threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
            ctrl_c.start()
            try:
                return super().extract_answers(examples, texts)
            finally:
                ctrl_c.cancel()

    task, rows, text = Interrupted("tests"), [row([("", "7")] * 30)] * 2, "```\nimport time; time.sleep(1)\n```"
    tokenizer = SimpleNamespace(encode=lambda *_, **__: [3, 1, 15], decode=lambda *_, **__: text)
    threads, started = set(threading.enumerate()), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        if mines:
            mine_mismatches(*random_pair, tokenizer, rows, task, max_new_tokens=4, batch_size=1)
        else:
            task.extract_answers(rows, [text] * 2)
    assert time.monotonic() - started < 10
    left = set(threading.enumerate()) - threads
    assert not [thread for thread in left if thread.name.startswith("ThreadPoolExecutor")]


def test_what_a_plain_interpreter_accepts_passes():
    """`quit` of an interactive Python, numbers of thousands of digits, numpy where few threads may start."""
    product = "import numpy as np\nprint(int(np.ones((200, 200)).dot(np.ones((200, 7))).sum() / 40_000))"
    programs = [("7", "print(7)\nquit()"), ("1" + "0" * 5_000, "print(10**5_000)"), ("7", product)]
    few = LiveCodeBench(limits=Limits(num_processes=2))
    for wanted, code in programs:
        report = few.report(row([("", wanted)]), code)
        assert report["passed"], report


def test_limits_on_files_and_output_are_each_tests_own():
    """Forty tests of two MB each come and go, beneath a limit of eight."""
    task = LiveCodeBench(limits=Limits(disk_bytes=8 << 20, output_bytes=4 << 20))
    numbers = " ".join(["1234567"] * 250_000)
    assert task.report(row([(numbers, str(1234567 * 250_000))] * 10), "print(sum(map(int, input().split())))")[
        "passed"
    ]
    assert task.report(row([("250000", "1234567\n" * 250_000)] * 10), "print('1234567\\n' * int(input()))")["passed"]
    pair = row([("125000", json.dumps([1234567] * 125_000))] * 10, "many")
    assert task.report(pair, "def many(n): return [1234567] * n")["passed"]


def test_extraction():
    assert extract_code("a\n```python\nx = 1\n```\nb\n```\ny = 2\nz = 3\n``` end") == "y = 2\nz = 3"
    assert extract_code("```python\nx\n```\n```python\ny") == ""
    assert extract_code("no") is None


def test_packed_tests_cannot_run_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path / "written"), "w")

    with pytest.raises(ValueError, match="can't be decoded"):
        decode_tests(row(private_test_cases=packed(Attack())))
    with pytest.raises(ValueError, match="can't be decoded .*must be strings"):
        decode_tests(row([(1, "1")]))
    assert not (tmp_path / "written").exists()


def test_packed_tests_have_a_largest_size(monkeypatch):
    tests = [{"input": "1" * 1000, "output": "1", "testtype": "stdin"}]
    assert len(decode_tests(row(private_test_cases=packed(json.dumps(tests))))[-1]["input"]) == 1000
    monkeypatch.setattr(autojudge_hf.tasks.livecodebench, "LARGEST_TESTS", 100)
    with pytest.raises(ValueError, match="can't be decoded"):
        decode_tests(row(private_test_cases=packed(json.dumps(tests))))


def test_load_problems(tmp_path):
    dates = ("2024-01-05T00:00:00", "2024-06-01T00:00:00", "2025-01-01T00:00:00")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(contest_date=date)) + "\n" for date in dates))
    assert len(load_problems(tmp_path / "rows.jsonl")) == 3
    (one,) = load_problems(tmp_path / "rows.jsonl", since="2024-06-01", until="2024-06-01")
    assert one["contest_date"] == dates[1]
    for since in ("2024-6-1", "2024-06", "", "last year", 20240601):
        with pytest.raises(ValueError, match='`since` must be a date, such as "2024-08-01", got '):
            load_problems(tmp_path / "rows.jsonl", since=since)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(contest_date=date)) + "\n" for date in (None, *dates)))
    assert len(load_problems(tmp_path / "rows.jsonl")) == 4
    assert len(load_problems(tmp_path / "rows.jsonl", until="2024-12-31")) == 2
    with pytest.raises(ValueError, match="from 1 to 6, got 9"):
        load_problems(release=9)


def test_a_release_has_the_files_of_those_before(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "rows.jsonl").write_text(json.dumps(row()) + "\n")
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *args, **kw: asked.append((*args, kw)) or tmp_path / "rows.jsonl"
    )
    assert load_problems(release=3, revision="abc") == [row()] * 3
    options = {"repo_type": "dataset", "revision": "abc"}
    names = ("test.jsonl", "test2.jsonl", "test3.jsonl")
    assert asked == [("livecodebench/code_generation_lite", name, options) for name in names]


def test_prompt(tokenizer):
    example = row(question_content="Add two numbers.", starter_code="class Solution:\n    pass")
    text = TASK.prompt(example, tokenizer)
    assert "### Question:\nAdd two numbers.\n\n### Format: You will use the following starter code" in text
    assert "```python\nclass Solution:\n    pass\n```" in text and "### Answer: (use the provided format" in text
    assert "Read the inputs from stdin" in TASK.prompt(row(), tokenizer)
    plain = SimpleNamespace(chat_template=None, bos_token=None)
    assert TASK.prompt(example, plain) == f"{SYSTEM}\n\n{TASK.instruction(example)}"
    with pytest.raises(ValueError, match="needs the field `question_content`"):
        TASK.prompt({"question": "?"}, tokenizer)


def test_arguments():
    with pytest.raises(ValueError, match="'verdict' or 'tests', got 'x'"):
        LiveCodeBench(compare="x")


# Metric


def test_pass_at_k_is_unbiased():
    """Over all draws of samples, the mean is the true chance that one of k passes."""
    from itertools import product

    n, k, p = 6, 3, 0.3
    mean = sum(
        p ** sum(drawn) * (1 - p) ** (n - sum(drawn)) * pass_at_k(n, sum(drawn), k)
        for drawn in product((0, 1), repeat=n)
    )
    assert mean == pytest.approx(1 - (1 - p) ** k)
    with pytest.raises(ValueError, match="at least 3 samples a problem, got 2"):
        pass_at_k(2, 1, 3)
    with pytest.raises(ValueError, match="`k` must be at least 1, got 0"):
        pass_at_k(2, 1, 0)


def test_metric():
    right, wrong = "```\nprint(7)\n```", "```\nprint(8)\n```"
    references = [row()] * 2
    scores = PassAtK().compute(predictions=[[right, wrong], [wrong, wrong]], references=references, k=(1, 2))
    assert scores == {"pass@1": 0.25, "pass@2": 0.5}
    assert PassAtK().compute(predictions=[[right, wrong]], references=[row()], k=np.int64(1)) == {"pass@1": 0.5}
    metric = PassAtK()
    metric.add(prediction=[right], reference=row())
    metric.add(prediction=[wrong], reference=row())
    assert metric.compute() == {"pass@1": 0.5}
