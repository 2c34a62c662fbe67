# SPDX-License-Identifier: Apache-2.0
"""Mining against a literal transcription of Algorithm 1, on the embedded pair."""

import copy
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import reference
import torch
from conftest import MAX_NEW_TOKENS, random_llama, scaled_up, similar_model
from kill_mining import survives
from test_architectures import random_model
from tokenizers import Tokenizer, decoders, models
from transformers import BartConfig, BartForCausalLM, LogitsProcessorList, PreTrainedTokenizerFast

from autojudge_hf import (
    JudgeConfig,
    JudgeTrainer,
    JudgeTrainingArguments,
    LinearJudge,
    compute_features,
    mine_mismatches,
    select_features,
)
from autojudge_hf.early_exit import first_layers
from autojudge_hf.features import logit_features
from autojudge_hf.mined_examples import read_mismatches
from autojudge_hf.mined_rows import inner_text
from autojudge_hf.search import GumbelNoise
from autojudge_hf.tasks import GSM8K, Task


TASK = GSM8K()


def prompt_ids(tokenizer, problem):
    return tokenizer.encode(TASK.prompt(problem, tokenizer), add_special_tokens=False)


def found(rows):
    return [(r["position"], r["candidate_token_id"], r["target_token_id"], r["label"]) for r in rows]


def assert_same(rows, expected):
    """Features to rounding: it depends on what else is in the batch."""
    assert found(rows) == found(expected)
    ours, theirs = (torch.tensor([row["features"] for row in r]) for r in (rows, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_labels_equal_algorithm_1(mined, target, draft, tokenizer, train_problems):
    eos = (tokenizer.eos_token_id,)
    for i in range(3):
        expected = reference.algorithm_1(
            target, draft, tokenizer, TASK, prompt_ids(tokenizer, train_problems[i]), MAX_NEW_TOKENS, eos
        )
        assert found(mined.filter(lambda row, i=i: row["example_id"] == i)) == list(expected)


@pytest.mark.slow
def test_rows_describe_themselves(mined, tokenizer, train_problems):
    last = (-1, -1)
    for row in mined:
        assert row["input_ids"][: row["prompt_length"]] == prompt_ids(tokenizer, train_problems[row["example_id"]])
        assert len(row["input_ids"]) == row["position"] >= row["prompt_length"]
        assert row["candidate_token_id"] != row["target_token_id"]
        assert row["candidate_token"] == tokenizer.decode([row["candidate_token_id"]])
        assert row["target_token"] == tokenizer.decode([row["target_token_id"]])
        assert len(row["features"]) == 192 and row["label"] in (0, 1)
        assert (row["example_id"], row["position"]) > last
        last = row["example_id"], row["position"]
    (pair,) = mined.unique("pair")
    pair = json.loads(pair)
    assert pair["target"]["hidden_size"] == 192 and pair["target"]["dtype"] == "float32"
    assert pair["task"] == TASK.name and pair["decoding_settings"]["do_sample"] is False
    assert "/" not in pair["target"]["name"]


@pytest.mark.slow
def test_every_disagreement_has_an_important_mismatch(mined, target, draft, tokenizer, train_problems):
    """If the two models' own answers differ, the search finds at least one important mismatch."""
    differed = 0
    for i, problem in enumerate(train_problems[:12]):
        answers = []
        for model in (target, draft):
            ids = torch.tensor([prompt_ids(tokenizer, problem)])
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW_TOKENS
            )
            text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            answers += TASK.extract_answers([problem], [text])
        if answers[0] is not None and not TASK.equivalent(answers[1], answers[0]):
            differed += 1
            assert any(row["label"] for row in mined if row["example_id"] == i)
    assert differed > 0


@pytest.mark.slow
def test_features_equal_those_of_decoding(mined, target, draft):
    """fp32: what mining stored is what verification computes at the same place."""
    for row in list(mined)[::15]:
        seen = []
        judge = LinearJudge(JudgeConfig(hidden_size=192))
        judge.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0]))
        # The prefill writes the last token before the mismatch (forced), the scripted draft proposes the candidate.
        prefix = torch.tensor([row["input_ids"][:-1]])
        last, candidate = row["input_ids"][-1], row["candidate_token_id"]
        target.generate(
            prefix,
            attention_mask=torch.ones_like(prefix),
            assistant_model=Script(draft, [candidate] * 3),
            judge=judge,
            judge_threshold=0.5,
            num_assistant_tokens=3,
            logits_processor=LogitsProcessorList([Force(prefix.shape[1], last)]),
            do_sample=False,
            max_new_tokens=5,
        )
        torch.testing.assert_close(seen[0].features[0, 0], torch.tensor(row["features"]), atol=1e-5, rtol=1e-5)


class Force:
    """A logits processor that writes one token at one place."""

    def __init__(self, position, token):
        self.position, self.token = position, token

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.position:
            scores[:] = -torch.inf
            scores[:, self.token] = 0.0
        return scores


class Script(torch.nn.Module):
    """An assistant that proposes given tokens, whatever it reads."""

    def __init__(self, model, tokens):
        super().__init__()
        self.model, self.tokens = model, tokens
        self.config, self.generation_config, self.device = model.config, model.generation_config, model.device
        self._is_stateful = False

    def forward(self, **inputs):
        outputs = self.model(**inputs)
        outputs.logits[:] = -1.0
        outputs.logits[:, -1, self.tokens[0]] = 1.0
        return outputs


@pytest.mark.slow
def test_batch_size_changes_nothing(mined, target, draft, tokenizer, train_problems):
    options = {"max_new_tokens": MAX_NEW_TOKENS, "num_assistant_tokens": 5}
    rows = [row for row in mined if row["example_id"] < 3]
    for batch_size in (1, 16):
        assert_same(
            mine_mismatches(target, draft, tokenizer, train_problems[:3], TASK, batch_size=batch_size, **options), rows
        )


@pytest.mark.slow
def test_interrupted_and_resumed(mined, target, draft, tokenizer, train_problems, tmp_path):
    """Ctrl-C loses nothing that was finished, and the same call goes on to the same dataset."""
    folder = tmp_path / "mined"

    class Interrupted(GSM8K):
        def extract_answers(self, examples, texts):
            if list(folder.glob("example-*.parquet")):
                raise KeyboardInterrupt
            return super().extract_answers(examples, texts)

    options = {"max_new_tokens": MAX_NEW_TOKENS, "num_assistant_tokens": 8, "output_dir": folder, "batch_size": 1}
    with pytest.raises(KeyboardInterrupt):
        mine_mismatches(target, draft, tokenizer, train_problems[:3], Interrupted(), **options)
    finished = sorted(folder.glob("*.parquet"))
    assert 0 < len(finished) < 3
    before = finished[0].stat().st_mtime_ns
    resumed = mine_mismatches(target, draft, tokenizer, train_problems[:3], TASK, **options)
    assert finished[0].stat().st_mtime_ns == before
    assert found(resumed) == found([row for row in mined if row["example_id"] < 3])
    with pytest.raises(ValueError, match="another example"):
        mine_mismatches(target, draft, tokenizer, train_problems[1:3], TASK, **options)
    with pytest.raises(ValueError, match="other settings"):
        mine_mismatches(target, draft, tokenizer, train_problems[:3], TASK, **{**options, "max_new_tokens": 100})


# On random models with a task of our own


class LastTokens(Task):
    """The answer is what the response ends in."""

    name = "last-tokens"

    def __init__(self, prompts, modulus=3):
        self.prompts, self.modulus = prompts, modulus

    def prompt(self, example, tokenizer):
        return example["text"]

    def extract_answers(self, examples, texts):
        return [None if "7" in text.split()[:1] else sum(map(int, text.split()[-4:])) % self.modulus for text in texts]

    def is_correct(self, example, answer):
        return True


class NumberTokenizer:
    """Token ids as text."""

    def encode(self, text, add_special_tokens):
        return [int(word) for word in text.split()]

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def random_pair():
    model = random_llama(eos_token_id=[30, 31])
    return model, similar_model(model)


EXAMPLES = [{"text": f"3 {i} 15 9 {(i * 5) % 32}"} for i in range(12)]


def mine_random(pair, examples=EXAMPLES, **options):
    return mine_mismatches(
        *pair, NumberTokenizer(), examples, LastTokens(examples), **{"max_new_tokens": 24, "batch_size": 5, **options}
    )


def test_algorithm_1_on_random_models_under_instruct_configs(random_pair):
    """Sampling, penalties and EOS ids of the assistant don't matter; the target's EOS list does."""
    model, assistant = random_pair
    plain = mine_random(random_pair)
    assert set(plain["label"]) == {0, 1}
    expected = []
    for i, example in enumerate(EXAMPLES):
        prompt = NumberTokenizer().encode(example["text"], False)
        task = LastTokens(EXAMPLES)
        rows = reference.algorithm_1(model, assistant, NumberTokenizer(), task, prompt, 24, (30, 31))
        expected += [(i, *row) for row in rows]
    assert [(r["example_id"], *f) for r, f in zip(plain, found(plain))] == expected
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.3)
    assistant.generation_config.update(do_sample=True, repetition_penalty=1.1, eos_token_id=[1, 2, 3])
    try:
        assert found(mine_random(random_pair)) == found(plain)
    finally:
        model.generation_config.update(
            do_sample=False, temperature=None, top_k=None, top_p=None, repetition_penalty=None
        )
        assistant.generation_config.update(do_sample=False, repetition_penalty=None, eos_token_id=[30, 31])


def test_a_candidate_may_end_the_response():
    """Then nothing follows it, and the answer is that of the text so far."""
    candidates = []
    for eos in (7, 12, 21, 28):
        model = random_llama(eos_token_id=[eos])
        pair = model, similar_model(model)
        rows = mine_random(pair, EXAMPLES[:6])
        expected = []
        for i, example in enumerate(EXAMPLES[:6]):
            prompt, task = NumberTokenizer().encode(example["text"], False), LastTokens(EXAMPLES)
            of_example = reference.algorithm_1(*pair, NumberTokenizer(), task, prompt, 24, (eos,))
            expected += [(i, *row) for row in of_example]
        assert [(r["example_id"], *f) for r, f in zip(rows, found(rows))] == expected
        candidates += [row["candidate_token_id"] == eos for row in rows]
    assert any(candidates)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_algorithm_1_behind_sliding_windows(family):
    """Windows of 8 over prompts and responses of 29, and soft-capped logits: the kept prefixes lose nothing."""
    model = random_model(family, seed=0)
    assistant, task, expected = similar_model(model), LastTokens(EXAMPLES), []
    for i, example in enumerate(EXAMPLES[:6]):
        prompt = NumberTokenizer().encode(example["text"], False)
        rows = reference.algorithm_1(model, assistant, NumberTokenizer(), task, prompt, 24, ())
        expected += [(i, *row) for row in rows]
    mined = mine_random((model, assistant), EXAMPLES[:6])
    assert len(expected) > 10 and [(r["example_id"], *f) for r, f in zip(mined, found(mined))] == expected


def test_algorithm_1_on_a_model_that_lacks_layers():
    """BART's config counts its encoder's."""
    sizes = {"d_model": 32, "decoder_layers": 2, "encoder_layers": 5, "decoder_attention_heads": 2, "vocab_size": 32}
    sizes |= {"decoder_ffn_dim": 64, "is_encoder_decoder": False, "is_decoder": True, "forced_eos_token_id": None}
    config = BartConfig(**sizes, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    model, assistant = (scaled_up(BartForCausalLM(config).eval()) for _ in range(2))
    task, expected = LastTokens(EXAMPLES), []
    for example in EXAMPLES[:3]:
        prompt = NumberTokenizer().encode(example["text"], False)
        expected += reference.algorithm_1(model, assistant, NumberTokenizer(), task, prompt, 24, ())
    mined = mine_random((model, assistant), EXAMPLES[:3], batch_size=1)
    assert len(expected) > 5 and found(mined) == [tuple(row) for row in expected]


def test_early_exit_is_mined_as_the_model_it_is():
    model = random_llama(num_hidden_layers=3, eos_token_id=[30, 31])
    expected = mine_random((model, first_layers(model, 2)))
    model.generation_config.assistant_early_exit = 2
    mined = mine_random((model, None))
    assert len(mined) > 10
    assert_same(mined, expected)
    assert mined.unique("pair") == expected.unique("pair")


def test_examples_in_flight_change_nothing(random_pair):
    examples = [{"text": f"3 {i} 15 {i // 2} {(i * 5) % 32}"} for i in range(30)]
    rows = [mine_random(random_pair, examples, batch_size=batch_size) for batch_size in (1, 4, 16)]
    assert len(rows[0]) > 50
    for several in rows[1:]:
        assert_same(several, rows[0])


def test_one_batch_is_graded_while_another_is_decoded(random_pair):
    """The first grading ends only when the target has run again, which it can't while someone waits for the grades."""
    grading, ran = threading.Event(), threading.Event()

    class Waiting(LastTokens):
        def extract_answers(self, examples, texts):
            grading.set()
            assert ran.wait(timeout=30), "nothing was decoded meanwhile"
            return super().extract_answers(examples, texts)

    hook = random_pair[0].register_forward_pre_hook(lambda *_: ran.set() if grading.is_set() else None)
    try:
        options = {"max_new_tokens": 24, "batch_size": 5}
        rows = mine_mismatches(*random_pair, NumberTokenizer(), EXAMPLES, Waiting(EXAMPLES), **options)
    finally:
        hook.remove()
    assert_same(rows, mine_random(random_pair))


def test_sampled_mining_is_algorithm_1_under_one_noise(random_pair):
    noise, expected = GumbelNoise(temperature=0.7, seed=5), []
    for i, example in enumerate(EXAMPLES):
        prompt = NumberTokenizer().encode(example["text"], False)
        task = LastTokens(EXAMPLES)
        rows = reference.algorithm_1(*random_pair, NumberTokenizer(), task, prompt, 24, (30, 31), noise)
        expected += [(i, *row) for row in rows]
    for batch_size in (1, 5):
        mined = mine_random(random_pair, temperature=0.7, seed=5, batch_size=batch_size)
        assert [(r["example_id"], *f) for r, f in zip(mined, found(mined))] == expected
    settings = json.loads(mined[0]["pair"])["decoding_settings"]
    assert settings["do_sample"] and settings["temperature"] == 0.7
    assert found(mine_random(random_pair, temperature=0.7, seed=6)) != found(mined)


def test_gumbel_noise_of_a_prompt_that_looks_like_padding():
    noise, logits = GumbelNoise(temperature=0.7, seed=5), torch.zeros(1, 32)
    alone = noise(torch.tensor([[0]]), logits)
    assert torch.equal(noise(torch.tensor([[0, 0, 0]]), logits), alone)
    assert not torch.equal(noise(torch.tensor([[0, 3]]), logits), alone)


def test_gumbel_noise_draws_from_the_softmax():
    logits = torch.tensor([[2.0, 0.5, 1.0, -1.0, -torch.inf]])
    tokens = torch.tensor([[4, 1, 7]])
    draws = torch.stack([GumbelNoise(0.8, seed)(tokens, logits)[0].argmax() for seed in range(13_000)])
    p = reference.chi_square_p(draws.bincount(minlength=5), (logits[0].double() / 0.8).softmax(0))
    assert p > reference.NOT_CHANCE


def test_seeds_that_no_noise_follows_from(random_pair):
    mine_random(random_pair, EXAMPLES[:1], temperature=0.7, seed=2**63 - 1)
    for seed in (2**63, 1.5):
        with pytest.raises(ValueError, match="`seed` must be an int of 64 bits"):
            mine_random(random_pair, EXAMPLES[:1], temperature=0.7, seed=seed)


def test_gumbel_noise_knows_the_tokens_and_no_padding():
    logits = torch.zeros(2, 9)
    noise = GumbelNoise(1.0, seed=0)
    one, other = noise(torch.tensor([[0, 0, 4, 0, 7], [0, 4, 0, 0, 7]]), logits)
    assert torch.equal(one, noise(torch.tensor([[4, 0, 7]]), logits[:1])[0])
    assert not torch.equal(one, other)
    # A model with fewer tokens sees the same noise on those it has.
    assert torch.equal(noise(torch.tensor([[4, 0, 7]]), logits[:1, :5])[0], one[:5])


def test_assistant_states_come_first(random_pair):
    both, target_only = mine_random(random_pair, assistant_states=True), mine_random(random_pair)
    features = torch.tensor(both["features"][:])
    assert features.shape[1] == 64
    torch.testing.assert_close(features[:, 32:], torch.tensor(target_only["features"][:]), atol=1e-5, rtol=1e-5)
    row = both[0]
    with torch.no_grad():
        tokens = torch.tensor([[*row["input_ids"], row["candidate_token_id"]]])
        states = random_pair[1](tokens, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(features[0, :32], states[0, -1], atol=1e-4, rtol=1e-4)


def test_logit_features_equal_those_of_full_passes(random_pair):
    model, _ = random_pair
    rows = mine_random(random_pair, logit_features=True)
    assert json.loads(rows[0]["pair"])["features"]["logit_features"]
    for row in rows:
        logits = reference.logits_after(model, row["input_ids"])[-1]
        expected = logit_features(torch.tensor([[row["candidate_token_id"]]]), logits[None, None])[0, 0]
        torch.testing.assert_close(torch.tensor(row["features"][32:]), expected, atol=1e-4, rtol=1e-4)


def test_assistant_logit_features_equal_those_of_full_passes(random_pair):
    rows = mine_random(random_pair, assistant_logit_features=True)
    assert json.loads(rows[0]["pair"])["features"]["assistant_logit_features"]
    for row in rows:
        target, assistant = (reference.logits_after(model, row["input_ids"])[-1] for model in random_pair)
        p, q = target.double().softmax(0), assistant.double().softmax(0)
        expected = [q[row["candidate_token_id"]].log().item(), (p * (p / q).log()).sum().item()]
        assert row["features"][32:] == pytest.approx(expected, abs=1e-4)


def test_fewer_features_of_the_same_mining(random_pair):
    everything = {"assistant_states": True, "logit_features": True, "assistant_logit_features": True}
    mined = mine_random(random_pair, state_position="both", **everything)
    for position, assistant, logits in (("candidate", False, False), ("previous", True, False), ("both", False, True)):
        options = {"state_position": position, "logit_features": logits}
        alone = mine_random(random_pair, assistant_states=assistant, **options)
        layout = {**options, "assistant_logit_features": False}
        fewer = select_features(mined, **layout, **({} if assistant else {"assistant_hidden_size": None}))
        assert_same(fewer, alone)
        assert json.loads(fewer[0]["pair"]) == json.loads(alone[0]["pair"]) and fewer.features == alone.features
        if position != "both":
            with pytest.raises(ValueError, match="target state.*compute_features"):
                select_features(alone, state_position="both")


@pytest.mark.parametrize("assistant_states", [False, True])
@pytest.mark.parametrize("state_position", ["candidate", "both"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_features_are_found_again_from_tokens(random_pair, assistant_states, state_position, temperature):
    layout = {"state_position": state_position, "logit_features": True, "assistant_states": assistant_states}
    layout["assistant_logit_features"] = state_position == "both"
    options = {"temperature": temperature, **layout}
    mined, tokens = mine_random(random_pair, **options), mine_random(random_pair, features_dtype=None, **options)
    assert found(tokens) == found(mined) and not any(tokens["features"])
    with pytest.raises(ValueError, match="tokens only.*compute_features"):
        JudgeTrainer(JudgeTrainingArguments(output_dir="unused"), tokens)
    model, assistant = random_pair
    again = compute_features(tokens, model, assistant, **layout)
    assert_same(again, mined)
    assert json.loads(again[0]["pair"]) == json.loads(mined[0]["pair"]) and again.features == mined.features
    mine = tokens.add_column("mine", list(range(len(tokens)))).with_format("numpy", columns=["label"])
    kept = compute_features(mine, model, assistant, **layout)
    assert kept.with_format(None)["mine"][:] == list(range(len(tokens)))
    assert_same(kept.with_format(None).remove_columns("mine"), mined)


def test_half_the_space(random_pair, tmp_path):
    whole = mine_random(random_pair)
    half = mine_random(random_pair, features_dtype="float16", output_dir=tmp_path / "mined")
    for rows in (half, compute_features(whole, random_pair[0], features_dtype="float16")):
        assert rows.features["features"].feature.dtype == "float16" and found(rows) == found(whole)
        ours, theirs = torch.tensor(rows["features"][:]), torch.tensor(whole["features"][:])
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


def test_layouts_that_were_not_mined(random_pair):
    rows = mine_random(random_pair)
    for wrong, message in (
        ({"hidden_size": 5}, "`hidden_size` was mined as 32: leave it, or pass None, got 5"),
        ({"judge_type": "mlp"}, "no 'judge_type'"),
        ({"hidden_size": None}, "Nothing is left of the features"),
    ):
        with pytest.raises(ValueError, match=message):
            select_features(rows, **wrong)
    two = datasets.concatenate_datasets([rows, mine_random(random_pair, max_new_tokens=24, state_position="previous")])
    with pytest.raises(ValueError, match="come from 2 different minings, expected one"):
        select_features(two, state_position="candidate")
    with pytest.raises(ValueError, match="tokens only.*compute_features"):
        select_features(mine_random(random_pair, features_dtype=None), state_position="candidate")


def test_features_of_another_pair_are_refused(random_pair):
    mined = mine_random(random_pair)
    with pytest.raises(ValueError, match="target .* of width 32, got .* of width 48"):
        compute_features(mined, random_llama(hidden_size=48))
    for wanted in ("assistant_states", "assistant_logit_features"):
        with pytest.raises(ValueError, match="need one that reads the text"):
            compute_features(mined, random_pair[0], **{wanted: True})
    other = copy.deepcopy(random_pair[0]).double()
    assert json.loads(compute_features(mined, other)[0]["pair"])["target"]["dtype"] == "float64"
    other.config.name_or_path = "org/other"
    with pytest.raises(ValueError, match="got org/other of width 32"):
        compute_features(mined, other)
    # From a folder it's the same model.
    from_hub = mine_random((other, random_pair[1]), EXAMPLES[:2], features_dtype=None)
    other.config.name_or_path = "/models/other"
    assert json.loads(compute_features(from_hub, other)[0]["pair"])["target"]["name"] == "org/other"
    other.config.name_or_path = "stranger/other"
    with pytest.raises(ValueError, match="got stranger/other"):
        compute_features(from_hub, other)
    with pytest.raises(ValueError, match="features_dtype.*int8"):
        compute_features(mined, random_pair[0], features_dtype="int8")


def test_response_without_answer_is_skipped_and_counted(random_pair, caplog):
    class Silent(LastTokens):
        def extract_answers(self, examples, texts):
            return [None] * len(texts)

    rows = mine_mismatches(*random_pair, NumberTokenizer(), EXAMPLES[:3], Silent(EXAMPLES), max_new_tokens=8)
    assert len(rows) == 0 and "3 of 3" in caplog.text
    assert isinstance(rows, datasets.Dataset) and "label" in rows.column_names


class Bare:
    """What a task has to have, and no more: of an answer that isn't there, it can say nothing."""

    prompt, extract_answers = LastTokens.prompt, LastTokens.extract_answers
    modulus = 3

    def equivalent(self, answer, reference):
        return abs(answer - reference) < 1e-6

    def is_correct(self, example, answer):
        return abs(answer - 1) < 1e-6


def test_no_answer_is_equivalent_to_nothing(random_pair):
    """A task needn't say so, nor have a name or a base class: the labels are those of one that does."""
    options = {"max_new_tokens": 24, "batch_size": 5}
    rows = mine_mismatches(*random_pair, NumberTokenizer(), EXAMPLES, Bare(), **options)
    assert found(rows) == found(mine_random(random_pair))
    assert {json.loads(row["pair"])["task"] for row in rows} == {"Bare"}


def test_a_task_that_loses_answers(random_pair, caplog):
    class Losing(LastTokens):
        def extract_answers(self, examples, texts):
            return super().extract_answers(examples, texts)[:-1]

    rows = mine_mismatches(*random_pair, NumberTokenizer(), EXAMPLES[:3], Losing(EXAMPLES), max_new_tokens=8)
    assert len(rows) == 0 and "3 x ValueError: `extract_answers` gave 0 answers for 1 texts" in caplog.text


def test_a_task_that_fails_on_an_example_doesnt_stop_the_run(random_pair, tmp_path, caplog, capsys):
    """It is recorded with its error, in the folder too; the others are mined as ever, and a line sums up."""

    class Failing(LastTokens):
        def extract_answers(self, examples, texts):
            if any(example is EXAMPLES[2] for example in examples):
                raise RuntimeError("no grader")
            return super().extract_answers(examples, texts)

    options = {"max_new_tokens": 24, "batch_size": 5, "output_dir": tmp_path / "mined"}
    rows = mine_mismatches(*random_pair, NumberTokenizer(), EXAMPLES, Failing(EXAMPLES), **options)
    assert found(rows) == found([row for row in mine_random(random_pair) if row["example_id"] != 2])
    assert "1 of 12 examples were skipped: 1 x RuntimeError: no grader" in caplog.text
    share = sum(row["label"] for row in rows) / len(rows)
    summary = f"mined 12 examples (1 skipped): {len(rows)} mismatches, {share:.1%} important; "
    assert re.search(re.escape(summary) + r"\d+ target forwards .* GiB of memory\n", capsys.readouterr().err)
    again = mine_mismatches(*random_pair, NumberTokenizer(), EXAMPLES, Failing(EXAMPLES), **options)
    assert found(again) == found(rows)
    # Once the grader works, the same call mines what it had failed on.
    mended = mine_mismatches(*random_pair, NumberTokenizer(), EXAMPLES, LastTokens(EXAMPLES), **options)
    assert found(mended) == found(mine_random(random_pair))


def test_answers_that_cannot_be_compared_are_skipped(random_pair, caplog):
    """Arrays, say, whose `==` is neither true nor false."""

    class Arrays(LastTokens):
        def extract_answers(self, examples, texts):
            answers = super().extract_answers(examples, texts)
            odd = [np.array([1, 2]) if example is EXAMPLES[2] else None for example in examples]
            return [answer if array is None else array for answer, array in zip(answers, odd)]

    mined = mine_mismatches(*random_pair, NumberTokenizer(), EXAMPLES, Arrays(EXAMPLES), max_new_tokens=24)
    assert found(mined) == found([row for row in mine_random(random_pair) if row["example_id"] != 2])
    assert "1 x ValueError: The truth value" in caplog.text


def test_reading_what_a_miner_left(random_pair, tmp_path):
    """From its folder, an example without mismatches among them, or from one file."""

    class Silent(LastTokens):
        def extract_answers(self, examples, texts):
            answers = super().extract_answers(examples, texts)
            return [None if example is EXAMPLES[2] else answer for example, answer in zip(examples, answers)]

    options = {"max_new_tokens": 24, "batch_size": 5, "output_dir": tmp_path / "mined"}
    mined = mine_mismatches(*random_pair, NumberTokenizer(), EXAMPLES, Silent(EXAMPLES), **options)
    mined.to_parquet(tmp_path / "mined.parquet")
    for path in (tmp_path / "mined", tmp_path / "mined.parquet"):
        assert read_mismatches(path).to_list() == mined.to_list()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="mined mismatches in empty, found none in 0"):
        read_mismatches(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="There is no absent: expected a folder that mining wrote"):
        read_mismatches(tmp_path / "absent")
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(ValueError, match="mismatches in rows.jsonl, got what isn't Parquet"):
        read_mismatches(tmp_path / "rows.jsonl")


def test_a_damaged_file_is_mined_again(random_pair, tmp_path, caplog):
    whole = mine_random(random_pair, output_dir=tmp_path / "mined")
    for number, cut in ((1, 0.5), (4, 0.0)):
        path = tmp_path / "mined" / f"example-{number:06d}.parquet"
        content = path.read_bytes()
        path.write_bytes(content[: int(cut * len(content))])
    again = mine_random(random_pair, output_dir=tmp_path / "mined")
    assert_same(again, whole)
    assert caplog.text.count("is damaged and will be mined again") == 2


def test_what_others_put_into_a_folder_is_none_of_it(random_pair, tmp_path, caplog):
    """Copies of a file, as programs that synchronise folders leave them, and Parquet of another kind."""
    whole = mine_random(random_pair, output_dir=tmp_path / "mined")
    first, second = (tmp_path / "mined" / f"example-{number:06d}.parquet" for number in (0, 1))
    for name in ("example-000000 (1).parquet", "example-000000-copy.parquet"):
        (tmp_path / "mined" / name).write_bytes(first.read_bytes())
    datasets.Dataset.from_dict({"answer": [1]}).to_parquet(second)
    assert_same(mine_random(random_pair, output_dir=tmp_path / "mined"), whole)
    assert caplog.text.count("example-000001.parquet is damaged and will be mined again") == 1
    assert len(read_mismatches(tmp_path / "mined")) == len(whole)
    (tmp_path / "mined" / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match="settings.json in mined is damaged"):
        mine_random(random_pair, output_dir=tmp_path / "mined")


def test_pages_that_cannot_be_read_are_named(random_pair, tmp_path):
    mine_random(random_pair, output_dir=tmp_path / "mined")
    path = max((tmp_path / "mined").glob("example-*.parquet"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    path.write_bytes(content[:4] + bytes(footer - 4) + content[footer:])
    with pytest.raises(OSError, match=f"delete {path.name}, which can't be read, and the same call goes on"):
        mine_random(random_pair, output_dir=tmp_path / "mined")
    path.unlink()
    assert_same(mine_random(random_pair, output_dir=tmp_path / "mined"), mine_random(random_pair))


@pytest.mark.parametrize("name", ["judge[1]", "run*", "what?"])
def test_names_of_folders_are_no_patterns(random_pair, tmp_path, name):
    """`datasets` takes paths for patterns, and these for the names of siblings, too."""
    for sibling in ("judge1", "runs", "whats"):
        mine_random(random_pair, EXAMPLES[:2], output_dir=tmp_path / sibling)
    expected = mine_random(random_pair, EXAMPLES[2:], output_dir=tmp_path / name)
    assert found(expected) == found(mine_random(random_pair, EXAMPLES[2:]))
    assert read_mismatches(tmp_path / name).to_list() == expected.to_list()
    with pytest.raises(ValueError, match="can't have '::' in its path"):
        mine_random(random_pair, EXAMPLES[:1], output_dir=tmp_path / "a::b")


def test_fewer_examples_than_a_folder_has(random_pair, tmp_path):
    mine_random(random_pair, EXAMPLES[:4], output_dir=tmp_path / "mined")
    fewer = mine_random(random_pair, EXAMPLES[:2], output_dir=tmp_path / "mined")
    assert found(fewer) == found(mine_random(random_pair, EXAMPLES[:2])) and len(fewer) > 0


def test_other_settings_are_refused_with_the_differences(random_pair, tmp_path):
    mine_random(random_pair, EXAMPLES[:1], output_dir=tmp_path / "mined")
    with pytest.raises(ValueError, match="other settings: features: .*; max_new_tokens: 24 there, 12 now"):
        mine_random(
            random_pair, EXAMPLES[:1], output_dir=tmp_path / "mined", max_new_tokens=12, state_position="previous"
        )


def test_a_folder_without_examples_belongs_to_nobody(random_pair, tmp_path):
    """A pair that can't be mined, or a call that ends before its first example, doesn't keep the right one out."""
    model, _ = random_pair
    folder = tmp_path / "mined"
    with pytest.raises(ValueError, match="different vocabularies: 32 tokens.*1100"):
        mine_random((model, random_llama(vocab_size=1100)), output_dir=folder)
    for assistant, message in (
        (None, "Mining needs a model to ask"),
        ("draft", "`assistant_model` must be a model, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            mine_random((model, assistant), output_dir=folder)
    assert not folder.exists()

    class Interrupted(LastTokens):
        def extract_answers(self, examples, texts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine_mismatches(
            *random_pair, NumberTokenizer(), EXAMPLES[:2], Interrupted(EXAMPLES), max_new_tokens=9, output_dir=folder
        )
    assert_same(mine_random(random_pair, EXAMPLES[:2], output_dir=folder), mine_random(random_pair, EXAMPLES[:2]))


def test_a_folder_has_one_miner(random_pair, tmp_path):
    class Meanwhile(LastTokens):
        def extract_answers(self, examples, texts):
            with pytest.raises(ValueError, match="Another process is mining into"):
                mine_random(random_pair, output_dir=tmp_path / "mined")
            return super().extract_answers(examples, texts)

    task = Meanwhile(EXAMPLES)
    options = {"max_new_tokens": 8, "output_dir": tmp_path / "mined"}
    mine_mismatches(*random_pair, NumberTokenizer(), EXAMPLES[:2], task, **options)
    # And is free again afterwards. A run that was killed at its very start leaves a folder like this.
    (tmp_path / "new").mkdir()
    for name in (".lock", "settings.part"):
        (tmp_path / "new" / name).touch()
    mine_random(random_pair, EXAMPLES[:2], output_dir=tmp_path / "new")
    mine_mismatches(*random_pair, NumberTokenizer(), EXAMPLES[:2], LastTokens(EXAMPLES), **options)


@pytest.mark.slow
def test_kills_lose_nothing():
    """`python tests/kill_mining.py` does twenty, over more examples."""
    same, left = survives(kills=3, num_examples=60)
    assert same
    assert left == sorted(left) and left[0] < 60


@pytest.mark.slow
def test_memory_doesnt_grow_with_the_number_of_examples():
    """Six times the rows, 150 MB more of them; `python tests/stream_mined.py` does it at the paper's size."""
    code = "from stream_mined import stream; print(*stream({}, 6144))"
    peaks = []
    for num_rows in (1_200, 7_200):
        result = subprocess.run(
            [sys.executable, "-c", code.format(num_rows)], capture_output=True, text=True, cwd=Path(__file__).parent
        )
        same, peak = result.stdout.split()[-2:]
        assert same == "True"
        peaks.append(int(peak))
    assert peaks[1] - peaks[0] < 75, peaks


def test_a_full_disk_loses_nothing(random_pair, tmp_path, monkeypatch):
    import pyarrow.parquet

    real, calls = pyarrow.parquet.write_table, []

    def write(table, path):
        calls.append(path)
        if len(calls) == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(table, path)

    monkeypatch.setattr(pyarrow.parquet, "write_table", write)
    with pytest.raises(OSError, match="No space left.*finished before are safe.*make room"):
        mine_random(random_pair, output_dir=tmp_path / "mined")
    names = {path.name for path in (tmp_path / "mined").glob("example-*")}
    assert len(names) == 3 and not any(name.endswith(".part") for name in names)
    assert found(mine_random(random_pair, output_dir=tmp_path / "mined")) == found(mine_random(random_pair))


def test_bad_input(random_pair, tmp_path):
    with pytest.raises(ValueError, match=r"Example 1:.*300 tokens.*256 positions"):
        mine_random(random_pair, [EXAMPLES[0], {"text": " ".join(["1"] * 300)}])
    (tmp_path / "something.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and wasn't written by mining"):
        mine_random(random_pair, output_dir=tmp_path)
    with pytest.raises(ValueError, match="max_new_tokens"):
        mine_random(random_pair, max_new_tokens=0)
    with pytest.raises(ValueError, match="state_position"):
        mine_random(random_pair, state_position="next")
    with pytest.raises(ValueError, match="num_assistant_tokens.*adaptive"):
        mine_random(random_pair, num_assistant_tokens="adaptive")
    with pytest.raises(ValueError, match="temperature.*-0.1"):
        mine_random(random_pair, temperature=-0.1)
    with pytest.raises(ValueError, match="features_dtype.*int8"):
        mine_random(random_pair, features_dtype="int8")
    with pytest.raises(ValueError, match="Example 1: expected a prompt of at least one token, got none"):
        mine_random(random_pair, [EXAMPLES[0], {"text": ""}])
    with pytest.raises(ValueError, match="question"):
        mine_mismatches(*random_pair, NumberTokenizer(), [{"text": "?"}], GSM8K(), max_new_tokens=5)


@pytest.mark.parametrize("scheme", ["llama", "always", "first"])
def test_tokens_are_told_with_their_leading_blanks(scheme):
    """A SentencePiece tokenizer's decoder takes the blank from whatever it finds first."""
    vocabulary = ["<unk>", "\u2581so", "so", "\u2581", ".", "\u2581.", "<0xE2>", "<0x82>", "<0xAC>"]
    model = models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], unk_token="<unk>")
    backend = Tokenizer(model)
    blanks = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(blanks) if scheme == "llama" else decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer.decode([1]) == "so"
    told = [inner_text(tokenizer, [token]) for token in range(1, 6)]
    assert told == [" so", "so", " ", ".", " ."]
    assert inner_text(tokenizer, [1, 2, 5]) == " soso ." and inner_text(tokenizer, []) == ""
    if scheme == "llama":
        assert inner_text(tokenizer, [6, 7, 8, 1]) == "\u20ac so"
