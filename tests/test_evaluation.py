# SPDX-License-Identifier: Apache-2.0
"""Measuring: the figures against a literal count, plain greedy under any generation config, refusals."""

import copy
import functools

import numpy as np
import pytest
import reference
import torch
from conftest import random_llama, similar_model

import autojudge_hf.evaluation
from autojudge_hf import AutoJudge, JudgeConfig, calibrate_threshold, evaluate_judge
from autojudge_hf.evaluation import highlight_accepted, measure_decoding, paired_interval
from autojudge_hf.tasks import Task


class EvenLength(Task):
    """A made-up task: the answer is whether the text has an even number of characters."""

    name = "even-length"

    def prompt(self, example, tokenizer):
        return example["text"]

    def extract_answers(self, examples, texts):
        return [len(text) % 2 == 0 for text in texts]

    def is_correct(self, example, answer):
        return answer == example["even"]


EXAMPLES = [{"text": f"{word} has {n} apples.", "even": n % 2 == 0} for n, word in enumerate(("Anna", "Ben", "Ivy"))]
OPTIONS = {"num_assistant_tokens": 4, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def pair():
    model = random_llama(vocab_size=1024, eos_token_id=1)
    return model, similar_model(model)


@pytest.fixture
def top_k():
    return AutoJudge.from_config(JudgeConfig(judge_type="top_k"))


def test_rows_equal_a_literal_count(pair, tokenizer, top_k):
    model, assistant = pair
    model.generation_config.update(repetition_penalty=1.5, do_sample=True, temperature=0.3)
    try:
        lossless, judged = evaluate_judge(
            model, assistant, tokenizer, EXAMPLES, EvenLength(), top_k, thresholds=[0.8], **OPTIONS
        )
    finally:
        model.generation_config.update(repetition_penalty=None, do_sample=False, temperature=None)
    assert lossless["threshold"] is None and judged["threshold"] == 0.8
    for row, threshold in ((lossless, 0.0), (judged, 0.8)):
        texts, tokens, forwards, decided = [], [], [], [0, 0]
        for example in EXAMPLES:
            ids = tokenizer(example["text"], return_tensors="pt", add_special_tokens=False)["input_ids"]
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                assistant_model=assistant,
                judge=top_k,
                judge_threshold=threshold,
                do_sample=False,
                return_dict_in_generate=True,
                **OPTIONS,
            )
            response = output.sequences[0, ids.shape[1] :]
            if threshold == 0.0:
                assert output.sequences[0].tolist() == reference.greedy(model, ids[0].tolist(), 24, (1,))
            texts.append(tokenizer.decode(response, skip_special_tokens=True))
            tokens.append(len(response))
            forwards.append(output.num_target_forwards.item())
            decided[0] += output.num_judge_accepted.item()
            decided[1] += output.num_judge_rejected.item()
        assert row["texts"] == texts
        assert row["correct"] == [(len(t) % 2 == 0) == e["even"] for t, e in zip(texts, EXAMPLES)]
        assert row["accuracy"] == pytest.approx(sum(row["correct"]) / 3)
        assert row["mean_response_length"] == pytest.approx(sum(tokens) / 3)
        # The prefill and its token aren't a cycle.
        assert row["tokens_per_cycle"] == pytest.approx((sum(tokens) - 3) / sum(forwards))
        assert row["num_tokens"] == [n - 1 for n in tokens] and row["num_target_forwards"] == forwards
        assert row["mismatches_accepted"] == decided[0] / sum(decided) and (threshold > 0) == (decided[0] > 0)
        assert row["tokens_per_second"] > 0
    assert judged["tokens_per_cycle"] > lossless["tokens_per_cycle"]


def test_plain_generate_is_one_token_a_forward(pair, tokenizer):
    row = measure_decoding(pair[0], tokenizer, EXAMPLES, EvenLength(), "alone", do_sample=False, max_new_tokens=9)
    assert row["tokens_per_cycle"] == 1.0 and row["mean_response_length"] <= 9


def test_a_batch_is_graded_example_by_example(pair, tokenizer, top_k):
    """Batches are of prompts of similar length; the rows come back in the examples' order."""
    examples = [*EXAMPLES, {"text": "No.", "even": True}, {"text": "A long one, " * 5, "even": True}]
    measure = functools.partial(
        evaluate_judge, *pair, tokenizer, examples, EvenLength(), top_k, thresholds=[0.8], **OPTIONS
    )
    for alone, batched in zip(measure(batch_size=1), measure(batch_size=2)):
        for name in ("texts", "correct", "num_tokens", "num_target_forwards", "mismatches_accepted", "accuracy"):
            assert alone[name] == batched[name]


def calibrated(monkeypatch, judge, correct, **options):
    """`calibrate_threshold` on made-up results: a list of bools, lossless, then for each threshold, 0.1 first."""

    def rows(*args, thresholds, **kwargs):
        for threshold, row in zip([None, *thresholds], correct):
            figures = {"tokens_per_cycle": 5.0, "tokens_per_second": 9.0, "mean_response_length": 7.0}
            yield {"threshold": threshold, "accuracy": float(np.mean(row)), "correct": row, **figures}

    monkeypatch.setattr(autojudge_hf.evaluation, "_rows", rows)
    thresholds = [0.1 * n for n in range(1, len(correct))]
    options = {"dataset_name": "made-up", "max_new_tokens": 8, **options}
    examples = [None] * len(correct[0])
    return calibrate_threshold(None, None, None, examples, None, judge, thresholds=thresholds, **options)


def test_threshold_is_the_last_before_the_first_that_costs_too_much(monkeypatch, top_k, caplog):
    right = [True] * 1000
    costs = [0, 0, 10, 30, 0, 200, 0]  # per mille, of which 30 is above the first budget, and 200 above both
    correct = [[False] * n + right[n:] for n in costs]
    top_k.config.evaluation = []
    rows = calibrated(monkeypatch, top_k, correct, max_drops={"cheap": 0.02, "dear": 0.1})
    assert len(rows) == 6  # the last threshold isn't measured any more
    assert top_k.config.thresholds == pytest.approx({"cheap": 0.2, "dear": 0.4})
    assert top_k.config.threshold == pytest.approx(0.2)
    curve = top_k.config.evaluation
    assert [row["drop"] for row in curve] == pytest.approx([n / 1000 for n in costs[:6]])
    assert {row["split"] for row in curve} == {"validation"}
    # Once more, on fewer problems: the curve is replaced, and what can't be kept is said.
    calibrated(monkeypatch, top_k, [right[:50], [False] * 9 + right[:41]], max_drops={"cheap": 0.02})
    assert top_k.config.thresholds == {"cheap": 0.0} and len(top_k.config.evaluation) == 2
    assert "isn't sure to keep to ['cheap']" in caplog.text
    # What would go wrong at the end is told at the beginning.
    of_others = {"threshold": None, "correct": right[:7]}
    for rows, options, message in (
        ([right, right], {"confidence": 0.1}, "confidence"),
        ([right], {}, "at least one of `thresholds`"),
        ([right, right], {"max_drops": {0.01: 0.01}}, "`max_drops` must map names"),
        ([right, right], {"max_drops": {"1 point": 1}}, "0.01 for 1 point; got .1."),
        ([right, right], {"max_drops": {"1 point": "0.01"}}, "0.01 for 1 point; got .'0.01'."),
        ([right, right], {"dataset_name": None}, "`dataset_name`.*None"),
        ([right, right], {"lossless": of_others}, "lossless row of these 1000 examples, got one of 7"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrated(monkeypatch, top_k, rows, **options)


def test_too_few_problems_to_be_sure(monkeypatch, top_k, caplog):
    """With a chance of more than 2.5 % none of 367 problems is lost, though one in a hundred should be."""
    assert 0.99**368 < 0.025 < 0.99**367
    for n, is_told in ((368, False), (367, True)):
        caplog.clear()
        calibrated(monkeypatch, top_k, [[True] * n] * 2, max_drops={"1 point": 0.01, "5 points": 0.05})
        assert (
            f"{n} examples are too few to be 97.5% sure of a budget: it takes {{'1 point': 368" in caplog.text
        ) == is_told


def test_a_local_file_calibrates_twice(monkeypatch, top_k, tmp_path):
    """Its folder is written nowhere, and the second curve takes the place of the first."""
    for _ in range(2):
        calibrated(monkeypatch, top_k, [[True] * 9, [True] * 9], dataset_name=str(tmp_path / "problems.jsonl"))
        top_k.save_pretrained(tmp_path / "judge")
    assert {row["dataset"] for row in top_k.config.evaluation} == {"problems.jsonl"}
    assert str(tmp_path) not in (tmp_path / "judge" / "config.json").read_text()


def test_the_budget_is_kept_as_often_as_promised(monkeypatch, top_k):
    """Eight thresholds, all of which cost exactly a little more than the budget: few samples may let one pass."""
    rng = np.random.default_rng(1)
    passed = 0
    for _ in range(200):
        lossless = rng.random(500) < 0.9
        # A mismatch that is accepted spoils an answer, or mends one.
        correct = [np.where(rng.random(500) < 0.1, rng.random(500) < 0.395, lossless) for _ in range(8)]
        calibrated(monkeypatch, top_k, [lossless, *correct], max_drops={"5 points": 0.05}, confidence=0.9)
        passed += top_k.config.threshold > 0
    assert 5 <= passed <= 32  # a tenth of 200, give or take three standard deviations


def test_refused_before_any_forward(pair, tokenizer, top_k):
    def no_forward(*args):
        raise AssertionError("a forward ran")

    misfit = AutoJudge.from_config(JudgeConfig(hidden_size=77))
    hooks = [model.register_forward_pre_hook(no_forward) for model in pair]
    for examples, judge, thresholds, message in (
        ([], top_k, [0.5], "at least one example"),
        (EXAMPLES, top_k, [0.5, 2.0], r"\[0, 1\].*2\.0"),
        (EXAMPLES, misfit, [0.5], "77.*32"),
        (EXAMPLES, "user/judge", [0.5], "must be a judge, got str"),
        (EXAMPLES, top_k, ["1 point"], "'1 point'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_judge(*pair, tokenizer, examples, EvenLength(), judge, thresholds=thresholds, **OPTIONS)
    with pytest.raises(KeyError, match="even"):
        evaluate_judge(*pair, tokenizer, [{"text": "?"}], EvenLength(), top_k, thresholds=[0.5], **OPTIONS)
    with pytest.raises(ValueError, match="batch_size.*0"):
        evaluate_judge(*pair, tokenizer, EXAMPLES, EvenLength(), top_k, thresholds=[0.5], batch_size=0, **OPTIONS)
    for hook in hooks:
        hook.remove()


def test_thresholds_by_name_and_without_a_padding_token(pair, tokenizer, top_k):
    top_k.config.thresholds = {"1 point": 0.8}
    without = copy.deepcopy(tokenizer)
    without.pad_token = None
    rows, expected = (
        evaluate_judge(*pair, t, EXAMPLES, EvenLength(), top_k, thresholds=values, batch_size=3, **OPTIONS)
        for t, values in ((without, iter(["1 point", np.float32(0.5)])), (tokenizer, [0.8, 0.5]))
    )
    assert [row["threshold"] for row in rows] == [None, 0.8, 0.5]
    assert [row["texts"] for row in rows] == [row["texts"] for row in expected]


def test_a_task_that_fails_on_an_example_costs_that_example(pair, tokenizer, top_k, caplog):
    class Failing(EvenLength):
        def extract_answers(self, examples, texts):
            if any(example is EXAMPLES[1] for example in examples):
                raise RuntimeError("no grader")
            return super().extract_answers(examples, texts)

    measured = [
        measure_decoding(pair[0], tokenizer, EXAMPLES, task, "alone", do_sample=False, max_new_tokens=9)
        for task in (EvenLength(), Failing())
    ]
    assert measured[1]["correct"] == [measured[0]["correct"][0], False, measured[0]["correct"][2]]
    assert "failed on 1 of 3 examples, which count as wrong: RuntimeError: no grader" in caplog.text


def test_paired_interval():
    rng = np.random.default_rng(3)
    first, second = rng.random(400) < 0.9, rng.random(400) < 0.85
    low, high = paired_interval(first, second)
    difference = first.astype(float) - second
    resampled = [difference[rng.integers(0, 400, 400)].mean() for _ in range(5000)]
    np.testing.assert_allclose([low, high], np.quantile(resampled, [0.025, 0.975]), atol=0.005)
    assert paired_interval(first, first) == (0.0, 0.0)
    assert paired_interval(second, first)[0] == pytest.approx(-high, abs=0.005)


def test_highlighted_are_the_accepted_mismatches(pair, tokenizer, top_k):
    model, assistant = pair
    ids = tokenizer(EXAMPLES[0]["text"], return_tensors="pt", add_special_tokens=False)["input_ids"]
    for threshold in (0.0, 0.8):
        output = model.generate(
            ids,
            do_sample=False,
            assistant_model=assistant,
            judge=top_k,
            judge_threshold=threshold,
            return_dict_in_generate=True,
            **OPTIONS,
        )
        text = highlight_accepted(model, tokenizer, output.sequences[0], ids.shape[1])
        assert text.count("\033[30;43m") == output.num_judge_accepted.item()
        assert (threshold == 0.0) == (output.num_judge_accepted.item() == 0)
