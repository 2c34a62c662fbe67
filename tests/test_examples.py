# SPDX-License-Identifier: Apache-2.0
"""The examples as a user runs them, and the promises of the problem generator."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import PAIR, ROOT, SHARED_DATA, read_jsonl


sys.path.insert(0, str(PAIR))

from make_problems import SPLITS, problems


GSM8K_DATA = SHARED_DATA / "gsm8k"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def run(*arguments, timeout=300):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=ENVIRONMENT,
    )


@pytest.mark.parametrize("script", ["mine", "train", "generate"])
def test_help_is_fast(script):
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        result = run(f"examples/gsm8k/{script}.py", "--help")
        best = min(best, time.perf_counter() - started)
        assert result.returncode == 0 and ("--output_dir" in result.stdout or "--judge" in result.stdout)
    assert best < 3


@pytest.mark.skipif(not GSM8K_DATA.is_dir(), reason="no real GSM8K rows at ../shared/data/gsm8k")
@pytest.mark.slow
def test_mine_train_generate_on_real_questions(tmp_path):
    """The embedded pair writes nonsense here, and the whole way works all the same."""
    pair = ["--model_name_or_path", PAIR / "target", "--assistant_model_name_or_path", PAIR / "draft"]
    pair += ["--dtype", "float32", "--device_map", "cpu", "--max_new_tokens", "60"]
    mine = ["examples/gsm8k/mine.py", *pair, "--data_file", GSM8K_DATA / "train.jsonl"]
    mine += ["--max_examples", "12", "--output_dir", tmp_path / "mined", "--extraction", "flexible"]
    result = run(*mine)
    assert result.returncode == 0, result.stderr
    assert "mismatches" in result.stdout
    data = tmp_path / "mined" / "mismatches.parquet"
    result = run(
        "examples/gsm8k/train.py", "--data_file", data, "--output_dir", tmp_path / "judge", "--validation_size", "0.4"
    )
    assert result.returncode == 0, result.stderr
    assert "eval_auc" in result.stdout
    generate = ["examples/gsm8k/generate.py", *pair, "--judge", tmp_path / "judge", "--max_examples", "1"]
    result = run(*generate, "--data_file", GSM8K_DATA / "test.jsonl")
    assert result.returncode == 0, result.stderr
    assert "tokens per cycle" in result.stdout and "Janet" in result.stdout


def test_splits_never_share_a_problem():
    """For any seeds, and without regard to names, wording and order: the numbers of a question decide its split."""
    seen = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in (0, 1, 99):
            stream = problems(split, seed)
            seen[split] |= {numbers(next(stream)["question"]) for _ in range(400)}
    names = list(SPLITS)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not seen[a] & seen[b]


def numbers(question):
    """What a question says about its people, read from the text: names replaced by the order of the first facts."""
    import re

    facts = re.findall(r"[A-Z][a-z]+ (?:has|owns) [^.?]*[.?]|(?:Then|How many) [^.?]*[.?]", question)
    facts = [fact for fact in facts if "years old" not in fact]
    people: dict[str, str] = {}
    for name in re.findall(r"\b(?!How|Then)[A-Z][a-z]+", " ".join(facts)):
        people.setdefault(name, f"P{len(people)}")
    text = " ".join(facts)
    for name, label in people.items():
        text = re.sub(rf"\b{name}\b", label, text)
    return re.sub(
        r"apples|books|cards|coins|marbles|pens|shells|stamps|stickers|pears|plums|beads|buttons|candles"
        r"|cookies|ribbons",
        "things",
        text,
    ).replace("owns", "has")


def test_same_arithmetic_has_one_split():
    from make_problems import Problem, Quantity

    given, more = Quantity("given", 5, 0, 5), Quantity("more", 3, 0, 8)
    other = Quantity("given", 9, 0, 9)
    a = Problem([given, more, other], "total", (0, 1, 2), 0)
    b = Problem([other, given, Quantity("more", 3, 1, 8)], "total", (2, 0, 1), 0)
    assert a.split() == b.split()


def test_answers_are_right():
    """Every line's arithmetic holds, and the last number is the answer."""
    import re

    stream = problems("lm", 5)
    for _ in range(300):
        answer = next(stream)["answer"]
        for formula, value in re.findall(r"([\d+*/ -]+) = (\d+)", answer):
            formula = re.sub(r"^\d+\. (?=\d)", "", formula.strip())
            assert eval(formula) == int(value), answer
        assert re.search(r"(\d+)\D*\n#### (\d+)$", answer).group(1) == answer.rpartition("#### ")[2]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_committed_problems_are_what_the_script_makes(split, tmp_path):
    out = tmp_path / "problems.jsonl"
    arguments = ["--task", "gsm8k", "--split", split, "--seed", "0", "--n", "500", "--out", out]
    result = run("examples/tiny_pair/make_problems.py", *arguments)
    assert result.returncode == 0, result.stderr
    rows = read_jsonl(PAIR / f"gsm8k_{split}.jsonl")
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["question"] for row in rows}) == 500
    assert all(set(row) == {"question", "answer"} and "#### " in row["answer"] for row in rows)


def test_embedded_pair_is_small_and_shares_one_tokenizer():
    folders = [PAIR / "target", PAIR / "draft"]
    assert sum(p.stat().st_size for folder in folders for p in folder.iterdir()) <= 16 * 2**20
    tokenizers = [(folder / "tokenizer.json").read_bytes() for folder in folders]
    assert tokenizers[0] == tokenizers[1]


def test_tokenizer_covers_python_and_any_text(tokenizer):
    for text in ("def f(a: int) -> list[str]:\n\treturn [x**2 for x in range(10)]  # ok\n", "naïve 日本 🙂\r\n  end"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    code = "for i in range(len(numbers)):\n    if numbers[i] > 0:\n        return True\n"
    assert len(tokenizer.encode(code, add_special_tokens=False)) < len(code) / 2
