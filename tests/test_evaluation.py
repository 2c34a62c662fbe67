# SPDX-License-Identifier: Apache-2.0
"""Measuring: the figures against a literal count, plain greedy under any generation config, refusals."""

import ast
import copy
import functools

import numpy as np
import pytest
import reference
import torch
from conftest import random_llama, similar_model

import autojudge_hf.evaluation
from autojudge_hf import AutoJudge, JudgeConfig, evaluate_judge, evaluation_summary
from autojudge_hf.checks import NEVER_MINED
from autojudge_hf.evaluation import paired_interval
from autojudge_hf.highlighting import highlight_accepted
from autojudge_hf.measuring import _trimmed, measure_decoding
from autojudge_hf.tasks import GSM8K, Task


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


@pytest.mark.parametrize("lookup", [None, 4])
def test_rows_equal_a_literal_count(pair, tokenizer, top_k, lookup):
    model, assistant = pair
    drafter = {"prompt_lookup_num_tokens": lookup} if lookup else {"assistant_model": assistant}
    assistant = drafter.get("assistant_model")
    model.generation_config.update(repetition_penalty=1.5, do_sample=True, temperature=0.3)
    model.generation_config.prompt_lookup_num_tokens = lookup
    try:
        lossless, judged = evaluate_judge(
            model, assistant, tokenizer, EXAMPLES, EvenLength(), top_k, thresholds=[0.8], **OPTIONS
        )
    finally:
        model.generation_config.update(repetition_penalty=None, do_sample=False, temperature=None)
        model.generation_config.prompt_lookup_num_tokens = None
    assert lossless["threshold"] is None and judged["threshold"] == 0.8
    for row, threshold in ((lossless, 0.0), (judged, 0.8)):
        texts, tokens, forwards, decided = [], [], [], [0, 0]
        for example in EXAMPLES:
            ids = tokenizer(example["text"], return_tensors="pt", add_special_tokens=False)["input_ids"]
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                judge=top_k,
                judge_threshold=threshold,
                do_sample=False,
                return_dict_in_generate=True,
                **drafter,
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

    class FailingLater(EvenLength):
        def is_correct(self, example, answer):
            if answer is not None and example is EXAMPLES[1]:
                raise RuntimeError("no gold answer")
            return "yes" if super().is_correct(example, answer) else ""

    later = measure_decoding(pair[0], tokenizer, EXAMPLES, FailingLater(), "alone", do_sample=False, max_new_tokens=9)
    assert later["correct"] == measured[1]["correct"] and "RuntimeError: no gold answer" in caplog.text
    assert not pair[0]._forward_pre_hooks  # that count forwards

    class OfNumbers(EvenLength):
        """Which has no idea of an answer that isn't there."""

        def extract_answers(self, examples, texts):
            return [None if example is EXAMPLES[1] else 1 for example in examples]

        def is_correct(self, example, answer):
            return abs(answer - 1) < 0.5

    class OfNames(OfNumbers):
        def is_correct(self, example, answer):
            return {1: True}[answer]

    for task in (OfNumbers(), OfNames()):
        options = {"do_sample": False, "max_new_tokens": 3}
        row = measure_decoding(pair[0], tokenizer, EXAMPLES, task, "of numbers", **options)
        assert row["correct"] == [True, False, True] and "of numbers" not in caplog.text
    with pytest.raises(KeyError, match="even"):  # what a task needs is asked for before anything is decoded
        measure_decoding(pair[0], tokenizer, [{"text": "?"}], EvenLength(), "of numbers", **options)

    class OfLiterals(EvenLength):
        def is_correct(self, example, answer):
            return ast.literal_eval(answer) == 1

    with pytest.raises(ValueError, match=r"Example 0 can't be graded: .*`None`, which is wrong.*malformed"):
        measure_decoding(pair[0], tokenizer, EXAMPLES, OfLiterals(), "of literals", **options)


def test_prompts_are_looked_at_before_anything_is_decoded(pair, tokenizer):
    examples = [*EXAMPLES, {**EXAMPLES[0], "text": ""}]
    hook = pair[0].register_forward_pre_hook(lambda *_: pytest.fail("decoded"))
    try:
        with pytest.raises(ValueError, match="Example 3: expected a prompt of at least one token"):
            measure_decoding(pair[0], tokenizer, examples, EvenLength(), "empty", max_new_tokens=3)
    finally:
        hook.remove()


@pytest.mark.parametrize("setting", sorted({"stop_strings", *NEVER_MINED} - {"forced_bos_token_id"}))
def test_what_mining_never_has_is_left_out(pair, tokenizer, top_k, monkeypatch, caplog, setting):
    """Whatever the target's own config says, be it of a first token, of others, or of the end."""
    options = {"thresholds": [0.0], "max_new_tokens": 24, "num_assistant_tokens": np.int64(4)}  # a number is a number
    measure = functools.partial(evaluate_judge, *pair, tokenizer, EXAMPLES, EvenLength(), top_k, **options)
    own, inputs = (
        pair[0].generation_config,
        tokenizer(EXAMPLES[0]["text"], return_tensors="pt", add_special_tokens=False),
    )
    first, second, *_, last = pair[0].generate(inputs["input_ids"], do_sample=False, max_new_tokens=8)[0, -8:].tolist()
    monkeypatch.setattr(own, "eos_token_id", last)
    expected = [row["texts"] for row in measure()]
    values = {
        "stop_strings": [expected[0][0][5:7]],
        "encoder_repetition_penalty": 3.0,
        "encoder_no_repeat_ngram_size": 1,
        "sequence_bias": [[[second], -100.0]],
        "bad_words_ids": [[second]],
        "suppress_tokens": [second],
        "begin_suppress_tokens": [first],
        "forced_eos_token_id": second,
        "exponential_decay_length_penalty": (1, 50.0),
        "min_length": 30,
        "min_new_tokens": 20,
    }
    monkeypatch.setattr(own, setting, values[setting])
    caplog.clear()
    assert [row["texts"] for row in measure()] == expected
    assert not caplog.messages


def test_a_response_ends_at_its_first_eos_token():
    """Where padding is the EOS token, it isn't counted."""
    assert _trimmed([5, 1, 1, 1], {1}) == [5, 1] and _trimmed([5, 6], {1}) == [5, 6]


def test_what_is_no_dataset_and_no_task(pair, tokenizer, top_k):
    measure = functools.partial(evaluate_judge, *pair, tokenizer, judge=top_k, thresholds=[0.5], **OPTIONS)
    for dataset in ({"train": EXAMPLES}, EXAMPLES[0], ["How many?"]):
        with pytest.raises(ValueError, match="must hold examples, mappings of fields, got '"):
            measure(dataset=dataset, task=EvenLength())
    promptless = type("Promptless", (), {})()
    for no_task, name in ((EvenLength, "<class"), ("gsm8k", "'gsm8k'"), (promptless, "<.*Promptless")):
        with pytest.raises(ValueError, match=f"`task` must be a task, such as `GSM8K.*'is_correct'.*got {name}"):
            measure(dataset=EXAMPLES, task=no_task)
    for wrong in (0.5, "5 points"):
        with pytest.raises(ValueError, match=rf"`thresholds` must be a list, such as .*got {wrong!r}"):
            measure(dataset=EXAMPLES, task=EvenLength(), thresholds=wrong)
    rows = measure(dataset=EXAMPLES, task=EvenLength())
    named = {"dataset": "made-up", "split": "test"}
    for wrong in (*({**named, "dataset": name} for name in (None, "/", "..", " ")), {**named, "split": 3}):
        with pytest.raises(ValueError, match="must be a name, for the judge's card"):
            evaluation_summary(rows, **wrong)


def test_paired_interval():
    rng = np.random.default_rng(3)
    first, second = rng.random(400) < 0.9, rng.random(400) < 0.85
    low, high = paired_interval(first, second)
    difference = first.astype(float) - second
    resampled = [difference[rng.integers(0, 400, 400)].mean() for _ in range(5000)]
    np.testing.assert_allclose([low, high], np.quantile(resampled, [0.025, 0.975]), atol=0.005)
    assert paired_interval(first, first) == (0.0, 0.0)
    assert paired_interval(second, first)[0] == pytest.approx(-high, abs=0.005)


def test_highlighted_are_the_accepted_mismatches(target, draft, tokenizer, test_problems, top_k):
    prompt = GSM8K().prompt(test_problems[0], tokenizer)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    for threshold in (0.0, 0.8):
        output = target.generate(
            ids,
            do_sample=False,
            assistant_model=draft,
            judge=top_k,
            judge_threshold=threshold,
            return_dict_in_generate=True,
            **OPTIONS,
        )
        text = highlight_accepted(target, tokenizer, output.sequences[0], ids.shape[1])
        assert text.count("\033[30;43m") == output.num_judge_accepted.item()
        plain = text.replace("\033[30;43m", "").replace("\033[0m", "")
        assert plain == tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        assert (threshold == 0.0) == (output.num_judge_accepted.item() == 0)


def test_ties_of_half_precision_are_not_highlighted(target, draft, tokenizer, test_problems, top_k):
    """What the target wrote itself is its own, though a pass of another shape would have chosen the other token."""
    model, assistant = (copy.deepcopy(m).to(torch.bfloat16) for m in (target, draft))
    num_ties = 0
    for problem in test_problems[:12]:
        ids = tokenizer(GSM8K().prompt(problem, tokenizer), return_tensors="pt", add_special_tokens=False)["input_ids"]
        options = {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0, "max_new_tokens": 120}
        sequence = model.generate(ids, do_sample=False, **options)[0]
        with torch.no_grad():
            choices = model(sequence[None, :-1]).logits[0, ids.shape[1] - 1 :].argmax(dim=-1)
        num_ties += int((choices != sequence[ids.shape[1] :]).sum())
        assert "\033" not in highlight_accepted(model, tokenizer, sequence, ids.shape[1])
    assert num_ties > 0


def test_the_models_config_may_name_the_drafter(pair, tokenizer, monkeypatch):
    """And then a judge may read what that one thought; without any, nothing is decoded."""
    model, _ = pair
    kl = AutoJudge.from_config(JudgeConfig(judge_type="kl"))
    options = {"thresholds": [1.0], "max_new_tokens": 21, "num_assistant_tokens": 4}
    measure = functools.partial(evaluate_judge, model, None, tokenizer, EXAMPLES, EvenLength(), kl, **options)
    monkeypatch.setattr(model.generation_config, "assistant_early_exit", 1)
    _, judged = measure()
    assert judged["num_target_forwards"] == [4, 4, 4]
    monkeypatch.setattr(model.generation_config, "assistant_early_exit", None)
    monkeypatch.setattr(autojudge_hf.evaluation, "measure_decoding", lambda *args, **kw: pytest.fail("decoding"))
    with pytest.raises(ValueError, match="needs a drafter: expected"):
        measure()
