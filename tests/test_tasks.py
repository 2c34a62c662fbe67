# SPDX-License-Identifier: Apache-2.0
"""GSM8K on all of its real rows, and extraction against a table written by hand."""

import copy
import re
import sys

import pytest
from conftest import ROOT, SHARED_DATA, read_jsonl

from autojudge_hf.tasks import GSM8K
from autojudge_hf.tasks.gsm8k import normalize
from autojudge_hf.tasks.task import answers_or_errors


GSM8K_DATA = SHARED_DATA / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K_DATA.is_dir(), reason="no real GSM8K rows at ../shared/data/gsm8k")


@needs_gsm8k
def test_gold_numbers_of_all_real_rows():
    task = GSM8K()
    rows = read_jsonl(GSM8K_DATA / "train.jsonl") + read_jsonl(GSM8K_DATA / "test.jsonl")
    assert len(rows) == 8792
    for row in rows:
        gold = task.gold_answer(row)
        assert re.fullmatch(r"-?\d+", gold)
        # An independent reading: the last line, without its marker and commas.
        assert int(gold) == int(row["answer"].splitlines()[-1].removeprefix("#### ").replace(",", ""))
        assert task.is_correct(row, task.extract_answers([row], [f"So.\nThe final answer is {gold}."])[0])


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("The final answer is 18", "18", "18"),
        ("The final answer is $1,234.", "1234", "1234"),
        ("The final answer is 5\nThe final answer is 7", "7", "7"),
        ("The final answer is -3", "-3", "-3"),
        ("The final answer is 18.00", "18.00", "18.00"),
        ("It is 12, and then 40 in all", None, "40"),
        ("The final answer is [answer]", None, None),
        ("", None, None),
        ("The final answer is $$", None, None),
        ("The final answer is 7. There were 9 at first.", "7", "9"),
    ],
)
def test_extraction(text, strict, flexible):
    assert GSM8K().extract_answers([{}], [text]) == [strict]
    assert GSM8K(extraction="flexible").extract_answers([{}], [text]) == [flexible]


def test_equality_is_numeric_and_none_equals_nothing():
    task = GSM8K()
    assert task.equivalent("18.00", "18")
    assert not task.equivalent("18.01", "18")
    assert not task.equivalent(None, None)
    assert not task.equivalent("1.2.3", "1.23") and task.equivalent("1.2.3", "1.2.3")  # no number
    assert not task.equivalent("18", None)
    assert task.is_correct({"answer": "so\n#### 1,200"}, "1200")
    assert not task.is_correct({"answer": "so\n#### 1,200"}, None)
    # One trailing dot is dropped, as the harness does.
    assert normalize("18.") == "18" and normalize("18..") == "18."
    assert len({GSM8K().name, GSM8K(8).name, GSM8K(extraction="flexible").name}) == 3


def test_prompt_is_the_harness_prompt_in_a_chat(tokenizer):
    prompt = GSM8K().prompt({"question": "How many?"}, tokenizer)
    assert prompt == (
        "<|begin|><|user|>Given the following problem, reason and give a final answer to the problem.\n"
        "Problem: How many?\n"
        'Your response should end with "The final answer is [answer]" where [answer] is the response to the problem.'
        "<|end|><|assistant|>"
    )


def test_a_base_model_gets_a_text(tokenizer):
    """Who has no chat template: the same words, question and answer in turn, behind its BOS token."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    for task in (GSM8K(), GSM8K(num_fewshot=2)):
        chat = task.prompt({"question": "How many?"}, tokenizer)
        words = re.sub(r"<\|(end|user|assistant|begin)\|>", " ", chat).split()
        text = task.prompt({"question": "How many?"}, plain)
        assert text.removeprefix(tokenizer.bos_token).split() == words and text.startswith(tokenizer.bos_token)


def test_few_shot_prompt_holds_eight_right_answers(tokenizer):
    task = GSM8K(num_fewshot=8)
    prompt = task.prompt({"question": "How many?"}, tokenizer)
    assert prompt.count("<|assistant|>") == 9
    shots = re.findall(r"<\|assistant\|>(.+?)<\|end\|>", prompt, flags=re.S)
    answers = task.extract_answers([{}] * 8, shots)
    # Worked out apart from the shots' own text.
    assert [int(a) for a in answers] == [
        48 + 17 - 29,
        6 * 8 // 3 * 2,
        90 // 3,
        12 * 5 + 20,
        120 * 3 // 4 - 10,
        14,
        20,
        14,
    ]


def test_bad_arguments_and_fields():
    for wrong in (9, -1, 2.0, True, "2"):
        with pytest.raises(ValueError, match="an int between 0 and 8"):
            GSM8K(num_fewshot=wrong)
    for wrong in ("loose", ["strict"], None):
        with pytest.raises(ValueError, match="extraction"):
            GSM8K(extraction=wrong)
    with pytest.raises(ValueError, match=r"question.*got \['text'\]"):
        GSM8K().instruction({"text": "?"})
    for answer in ({}, {"answer": None}, {"answer": 18}, {"answer": "18"}, {"answer": ["#### "]}):
        with pytest.raises(ValueError, match=f"needs the field `answer`.*got {re.escape(repr(answer.get('answer')))}"):
            GSM8K().gold_answer({"question": "?", **answer})


def test_a_task_that_exits_fails_on_that_example_alone():
    class Exits(GSM8K):
        def extract_answers(self, examples, texts):
            if "exit" in texts:
                sys.exit(2)
            if "Ctrl-C" in texts:
                raise KeyboardInterrupt
            return texts

    one, error, three = answers_or_errors(Exits(), [{}] * 3, ["1", "exit", "3"])
    assert (one, three) == ("1", "3") and isinstance(error, Exception) and "SystemExit(2)" in str(error)
    with pytest.raises(KeyboardInterrupt):
        answers_or_errors(Exits(), [{}] * 2, ["1", "Ctrl-C"])


def test_metric_runs_without_network():
    from autojudge_hf.tasks.gsm8k_metric import GSM8KAccuracy

    result = GSM8KAccuracy().compute(
        predictions=["The final answer is 18.00", "The final answer is 3", "no idea"],
        references=["a\n#### 18", "b\n#### 4", "c\n#### 5"],
    )
    assert result == {"accuracy": pytest.approx(1 / 3), "answered": pytest.approx(2 / 3)}


def test_the_readmes_own_task(tokenizer):
    (block,) = (b for b in re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.S) if "(Task)" in b)
    names = {}
    exec(block, names)
    task = names["Capitals"]()
    assert "the capital of France" in task.prompt({"country": "France"}, tokenizer)
    texts = ["Answer: Lyon? No. Answer: Paris.", "Paris"]
    assert task.extract_answers([{}] * 2, texts) == ["paris", None]
    assert task.is_correct({"capital": "Paris"}, "paris") and not task.equivalent(None, "paris")
