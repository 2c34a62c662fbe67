# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: lossless equality, the judged rule, stopping, settings, refusals."""

import functools
import inspect
import logging
import types

import pytest
import reference
import torch
from conftest import MAX_NEW_TOKENS, PROMPT, left_padded, random_llama, similar_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationConfig,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MaxLengthCriteria,
    MaxTimeCriteria,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
    WatermarkingConfig,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

import autojudge_hf.adapter
import autojudge_hf.model_properties
from autojudge_hf import AutoJudge, JudgeConfig, JudgeDecoderOnlyOutput, judge_decoding, supported
from autojudge_hf.caches import shrink
from autojudge_hf.features import judge_inputs
from autojudge_hf.model_properties import CACHE_NAME
from autojudge_hf.outputs import COUNTS
from autojudge_hf.tasks import GSM8K


TASK = GSM8K()
STATEFUL = SynthIDTextWatermarkLogitsProcessor(2, [1, 2], 16, 0, 8, "cpu")


def encode(tokenizer, problem):
    return tokenizer(TASK.prompt(problem, tokenizer), return_tensors="pt", add_special_tokens=False)


# Lossless


@pytest.mark.slow
def test_lossless_on_200_held_out_problems(target, draft, tokenizer, test_problems, judge):
    """Equal to plain greedy decoding token for token; a difference must be a tie of the two best logits."""
    options = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
    judged = {"assistant_model": draft, "judge": judge, "judge_threshold": 0.0, "num_assistant_tokens": 8}

    def responses(problems, **more):
        prompts = [TASK.prompt(problem, tokenizer) for problem in problems]
        inputs = tokenizer(prompts, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left")
        output = target.generate(**inputs, **options, **more)[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row for row in output]

    for start in range(0, 200, 20):
        problems = test_problems[start : start + 20]
        expected, got = responses(problems), responses(problems, **judged)
        for i, problem in enumerate(problems):
            alone = responses([problem], **judged)[0] if i < 2 else got[i]
            for response in (got[i], alone):
                if response != expected[i]:
                    first = next(n for n, (a, b) in enumerate(zip(response, expected[i])) if a != b)
                    prompt = encode(tokenizer, problem)["input_ids"][0].tolist()
                    best = reference.logits_after(target, prompt + expected[i][:first])[-1].topk(2).values
                    assert best[0] - best[1] < 1e-5, f"position {first}: {best}"


@pytest.mark.parametrize("num_assistant_tokens", [1, 5, 16])
def test_lossless_on_random_models(random_pair, num_assistant_tokens):
    model, assistant = random_pair
    expected = reference.greedy(model, PROMPT[0].tolist(), 60, eos_ids=())
    assert len(set(expected[7:])) >= 3
    decode = functools.partial(judge_decoding, assistant_model=assistant, num_assistant_tokens=num_assistant_tokens)
    output = model.generate(
        PROMPT,
        do_sample=False,
        max_new_tokens=60,
        assistant_model=assistant,
        custom_generate=decode,
        return_dict_in_generate=True,
    )
    assert output.sequences[0].tolist() == expected
    assert 0 < output.num_matches < output.num_candidates


def test_a_corrupted_cache_is_noticed(random_pair, monkeypatch):
    """A test of the tests above: keys and values of the wrong tokens must change the response."""

    model, assistant = random_pair
    expected = reference.greedy(model, PROMPT[0].tolist(), 60, eos_ids=())
    crop = DynamicLayer.crop

    def crop_the_wrong_end(layer, n):
        crop(layer, n)
        layer.keys = layer.keys.roll(-n, dims=2)

    monkeypatch.setattr(DynamicLayer, "crop", crop_the_wrong_end)
    decode = functools.partial(judge_decoding, assistant_model=assistant, num_assistant_tokens=5)
    got = model.generate(PROMPT, do_sample=False, max_new_tokens=60, assistant_model=assistant, custom_generate=decode)
    assert got[0].tolist() != expected


def test_left_padded_prompt(random_pair, top_k):
    model, assistant = random_pair
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), PROMPT], dim=1)
    mask = (torch.arange(11) >= 4).long()[None]
    options = {"do_sample": False, "max_new_tokens": 30}
    expected = model.generate(padded, attention_mask=mask, **options)
    got = model.generate(
        padded, attention_mask=mask, assistant_model=assistant, judge=top_k, judge_threshold=0.0, **options
    )
    assert torch.equal(got, expected)


def test_padded_vocabularies(top_k):
    """Same tokens, embeddings padded to different sizes: the assistant's extra entries are never proposed."""
    for sizes in ((32, 40), (40, 32)):
        model, assistant = random_llama(0, sizes[0]), random_llama(1, sizes[1])
        expected = model.generate(PROMPT, do_sample=False, max_new_tokens=30)
        options = {"assistant_model": assistant, "judge": top_k, "max_new_tokens": 30}
        assert torch.equal(model.generate(PROMPT, do_sample=False, judge_threshold=0.0, **options), expected)
        free = model.generate(PROMPT, do_sample=False, judge_threshold=1.0, **options)
        sampled = model.generate(PROMPT, do_sample=True, top_k=0, judge_threshold=1.0, **options)
        assert free.max() < sizes[0] and sampled.max() < sizes[0]


def test_repetition_penalty_and_other_processors(random_pair, top_k):
    model, assistant = random_pair

    class ForbidMultiplesOf(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, input_ids.shape[1] % 7 :: 7] = -torch.inf
            return scores

    options = {"do_sample": False, "max_new_tokens": 50, "repetition_penalty": 1.3}
    options["logits_processor"] = LogitsProcessorList([ForbidMultiplesOf()])
    expected = model.generate(PROMPT, **options)
    got = model.generate(PROMPT, assistant_model=assistant, judge=top_k, judge_threshold=0.0, **options)
    assert torch.equal(got, expected)


def test_position_limits(top_k):
    """At the assistant's or the target's last position decoding goes on without drafts."""
    model = random_llama(0, max_position_embeddings=64)
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    # Positions that are learned: one more is an error.
    assistant = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=20, bos_token_id=0, eos_token_id=None)).eval()
    with pytest.raises(IndexError):
        assistant(torch.zeros(1, 21, dtype=torch.long))
    options = {"do_sample": False, "max_new_tokens": 57}
    expected = model.generate(PROMPT, **options)
    judged = {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0, "return_dict_in_generate": True}
    for more in ({}, {"cache_implementation": "static"}):
        output = model.generate(PROMPT, **options, **judged, **more)
        assert torch.equal(output.sequences, expected) and output.num_candidates > 0
    ragged = left_padded([PROMPT[0].tolist(), [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]])
    output = model.generate(**ragged, do_sample=False, max_new_tokens=40, **judged)
    assert torch.equal(output.sequences[0, 11:], expected[0, 7:47]) and output.num_candidates.min() > 0


@pytest.mark.slow
def test_long_prompt(top_k):
    model = random_llama(0, max_position_embeddings=8192)
    assistant = similar_model(model)
    torch.manual_seed(1)
    prompt = torch.randint(0, 32, (1, 4000))
    options = {"do_sample": False, "max_new_tokens": 40}
    expected = model.generate(prompt, **options)
    assert len(set(expected[0, 4000:].tolist())) >= 3
    got = model.generate(prompt, assistant_model=assistant, judge=top_k, judge_threshold=0.0, **options)
    assert torch.equal(got, expected)


def test_continued_from_a_cache(random_pair, top_k):
    model, assistant = random_pair
    options = {"do_sample": False, "assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0}
    whole = model.generate(PROMPT, max_new_tokens=30, **options)
    first = model.generate(PROMPT, max_new_tokens=12, return_dict_in_generate=True, **options)
    assert first[CACHE_NAME].get_seq_length() == first.sequences.shape[1] - 1
    rest = model.generate(first.sequences, **{CACHE_NAME: first[CACHE_NAME]}, max_new_tokens=18, **options)
    assert torch.equal(rest, whole)


# Batches: row i gives what it gives alone

PROMPTS = [[3, 14, 15, 9, 2, 6, 5], [8, 9], [27, 1, 8, 2], [18]]


def test_rows_give_what_they_give_alone(random_pair, linear_judge):
    """Tokens and counts, lossless and judged, with rows that end at different times."""
    model, assistant = random_pair
    free = model.generate(torch.tensor([PROMPTS[0]]), do_sample=False, max_new_tokens=50)[0, 7:].tolist()
    eos = [free[len(free) // 2], 31]
    options = {"do_sample": False, "max_new_tokens": 50, "assistant_model": assistant, "judge": linear_judge}
    options |= {"return_dict_in_generate": True, "num_assistant_tokens": 5, "eos_token_id": eos}
    lengths = set()
    for threshold in (0.0, 0.5, 0.9):
        batch = model.generate(**left_padded(PROMPTS), judge_threshold=threshold, **options)
        for row, prompt in enumerate(PROMPTS):
            alone = model.generate(torch.tensor([prompt]), judge_threshold=threshold, **options)
            response = alone.sequences[0, len(prompt) :].tolist()
            lengths.add(len(response))
            got = batch.sequences[row, 7:].tolist()
            assert got[: len(response)] == response
            assert set(got[len(response) :]) <= {0}
            for name in COUNTS:
                assert getattr(batch, name)[row] == getattr(alone, name)
    assert len(lengths) > 3


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_rows_on_the_embedded_pair(target, draft, tokenizer, test_problems, judge, threshold):
    problems = test_problems[:4]
    options = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, "assistant_model": draft, "judge": judge}
    options |= {"judge_threshold": threshold, "num_assistant_tokens": 16}
    prompts = [TASK.prompt(problem, tokenizer) for problem in problems]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    batch = target.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for row, problem in enumerate(problems):
        inputs = encode(tokenizer, problem)
        response = target.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(batch[row, : len(response)], response)


def test_processors_see_each_row_by_itself(random_pair, top_k):
    """A penalty on a row's own tokens, and a rule for each row's number; scores as stock `generate` gives them."""
    model, assistant = random_pair

    def allowed(row, tokens):
        return [t for t in range(32) if t % 4 != row]

    options = {
        "do_sample": False,
        "max_new_tokens": 30,
        "repetition_penalty": 1.3,
        "prefix_allowed_tokens_fn": allowed,
    }
    options |= {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    inputs = left_padded(PROMPTS)
    expected = model.generate(**inputs, **options)
    got = model.generate(**inputs, assistant_model=assistant, judge=top_k, judge_threshold=0.0, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(
            torch.stack(getattr(got, name)), torch.stack(getattr(expected, name)), atol=1e-4, rtol=1e-4
        )


def test_a_batch_that_isnt_realigned_is_noticed(random_pair, top_k, monkeypatch):
    """A test of the tests above: without the rotation of the shorter rows they must fail."""
    model, assistant = random_pair
    options = {"do_sample": False, "max_new_tokens": 30, "assistant_model": assistant, "judge": top_k}
    inputs = left_padded(PROMPTS)
    expected = model.generate(**inputs, judge_threshold=0.0, **options)
    monkeypatch.setattr(torch.Tensor, "index_select", lambda tensor, dim, index: tensor)
    assert not torch.equal(model.generate(**inputs, judge_threshold=0.0, **options), expected)


# Judged


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_judged_equals_the_literal_loop(random_pair, linear_judge, threshold):
    model, assistant = random_pair
    expected, counts = reference.judged(
        model, assistant, PROMPT[0].tolist(), 60, (), 5, linear_judge.weight, linear_judge.bias, threshold
    )
    output = model.generate(
        PROMPT,
        do_sample=False,
        max_new_tokens=60,
        assistant_model=assistant,
        judge=linear_judge,
        judge_threshold=threshold,
        num_assistant_tokens=5,
        return_dict_in_generate=True,
    )
    assert output.sequences[0].tolist() == expected
    assert tuple(getattr(output, name).item() for name in COUNTS[2:]) == counts


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.slow
def test_judged_equals_the_literal_loop_on_the_embedded_pair(
    target, draft, tokenizer, test_problems, judge, threshold
):
    """At batch 1 and 4, tokens and counts."""
    problems, eos = test_problems[:4], (tokenizer.eos_token_id,)
    prompts = [encode(tokenizer, problem)["input_ids"][0].tolist() for problem in problems]
    expected = [
        reference.judged(target, draft, prompt, 200, eos, 16, judge.weight, judge.bias, threshold)
        for prompt in prompts
    ]
    assert threshold < 0.9 or sum(accepted for _, (_, accepted, _) in expected) > 0
    options = {"do_sample": False, "max_new_tokens": 200, "assistant_model": draft, "num_assistant_tokens": 16}
    options |= {"judge": judge, "judge_threshold": threshold, "return_dict_in_generate": True}
    for batch_size in (1, 4):
        for start in range(0, 4, batch_size):
            inputs = left_padded(prompts[start : start + batch_size])
            output = target.generate(**inputs, **options)
            width = inputs["input_ids"].shape[1]
            for row, (prompt, (tokens, counts)) in enumerate(
                zip(prompts[start:], expected[start : start + batch_size])
            ):
                response = tokens[len(prompt) :]
                assert output.sequences[row, width : width + len(response)].tolist() == response
                assert tuple(getattr(output, name)[row].item() for name in COUNTS[2:]) == counts


def test_threshold_one_accepts_every_candidate(random_pair, linear_judge):
    model, assistant = random_pair
    untrained = AutoJudge.from_config(JudgeConfig(hidden_size=32))
    for judge, threshold, everything in ((linear_judge, 1.0, True), (untrained, 1.0, True), (untrained, 0.999, False)):
        output = model.generate(
            PROMPT,
            do_sample=False,
            max_new_tokens=41,
            assistant_model=assistant,
            judge=judge,
            judge_threshold=threshold,
            num_assistant_tokens=4,
            return_dict_in_generate=True,
        )
        accepted = output.num_matches + output.num_judge_accepted
        assert (accepted == output.num_candidates) == everything
        # A judge that was never trained has NaN scores: it accepts nothing below 1.
        assert (output.num_judge_accepted == 0) == (not everything)


def test_assistant_states(random_pair):
    """A judge on both models' states decides by them: the states are those of plain forward passes."""
    model, assistant = random_pair
    for position in ("candidate", "previous", "both"):
        seen = []
        judge = AutoJudge.from_config(
            JudgeConfig(hidden_size=32, assistant_hidden_size=32, state_position=position, threshold=0.5)
        )
        judge.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0]))
        output = model.generate(
            PROMPT, do_sample=False, max_new_tokens=30, assistant_model=assistant, judge=judge, num_assistant_tokens=4
        )[0].tolist()
        start = PROMPT.shape[1] + 1
        for inputs in seen:
            k = inputs.candidate_ids.shape[1]
            tokens = output[:start] + inputs.candidate_ids[0].tolist()
            starts = {"candidate": [start], "previous": [start - 1], "both": [start - 1, start]}[position]
            with torch.no_grad():
                expected = [
                    m(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0, at : at + k]
                    for m in (assistant, model)
                    for at in starts
                ]
            torch.testing.assert_close(inputs.features[0], torch.cat(expected, dim=-1), atol=1e-4, rtol=1e-4)
            # An untrained judge accepts nothing: the next cycle begins after the matches and the target's token.
            matches = 0
            while matches < k and output[start + matches] == tokens[start + matches]:
                matches += 1
            start += matches + 1


def test_a_batch_continues_from_a_cache(random_pair, top_k):
    """The cache of another call on the same columns; what fills prompts up is at their fronts."""
    model, assistant = random_pair
    inputs = left_padded(PROMPTS)
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    cache = DynamicCache(config=model.config)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    known = {name: tensor[:, :-2] for name, tensor in {**inputs, "position_ids": positions}.items()}
    with torch.no_grad():
        model(**known, **{CACHE_NAME: cache})
    options = {"do_sample": False, "max_new_tokens": 20, "assistant_model": assistant, "judge": top_k}
    for length in (cache.get_seq_length(), 0):  # a batch's cache is used up, and may be filled again
        assert cache.get_seq_length() == length
        got = model.generate(**inputs, **{CACHE_NAME: cache}, judge_threshold=0.0, **options)
        assert torch.equal(got, whole)
    with pytest.raises(ValueError, match="on the right or within"):
        mask = inputs["attention_mask"].clone()
        mask[0, 2] = 0
        model.generate(inputs["input_ids"], attention_mask=mask, **options)


@pytest.mark.parametrize("judge_type", ["top_k", "rule", "margin", "entropy", "kl"])
def test_training_free_judges_decode(random_pair, judge_type):
    model, _ = random_pair
    symbols = [1, 2, 3] if judge_type == "rule" else []
    judge = AutoJudge.from_config(JudgeConfig(judge_type=judge_type, important_token_ids=symbols))
    options = {
        "do_sample": False,
        "max_new_tokens": 30,
        "assistant_model": similar_model(model, noise=0.2),
        "judge": judge,
    }
    inputs = left_padded(PROMPTS)
    greedy = model.generate(**inputs, do_sample=False, max_new_tokens=30)
    assert torch.equal(model.generate(**inputs, judge_threshold=0.0, **options), greedy)
    # A random model's distributions are flat, and what a score means differs: some threshold accepts a part.
    shares = []
    for threshold in (0.05, 0.5, 0.8):
        batch = model.generate(**inputs, judge_threshold=threshold, return_dict_in_generate=True, **options)
        for i, prompt in enumerate(PROMPTS):
            alone = model.generate(torch.tensor([prompt]), judge_threshold=threshold, **options)
            assert alone[0, len(prompt) :].tolist() == batch.sequences[i, inputs["input_ids"].shape[1] :].tolist()
        shares.append((batch.num_judge_accepted.sum() / (batch.num_candidates - batch.num_matches).sum()).item())
    assert any(0 < share < 0.9 for share in shares), shares


# Its first draft has a mismatch: a judge is asked in the first cycle.
MISMATCHING = torch.tensor([[16, 14, 15, 9]])


def test_a_kl_judge_reads_what_the_draft_was_made_from(random_pair):
    model, assistant = random_pair
    judge, seen = AutoJudge.from_config(JudgeConfig(judge_type="kl")), []
    judge.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.generate(
        MISMATCHING, do_sample=False, max_new_tokens=6, assistant_model=assistant, judge=judge, num_assistant_tokens=4
    )
    first = model.generate(MISMATCHING, do_sample=False, max_new_tokens=1)[0].tolist()
    expected = reference.logits_after(assistant, first + seen[0].candidate_ids[0].tolist())[-5:-1]
    torch.testing.assert_close(seen[0].assistant_logits[0], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="'kl' judge.*prompt lookup"):
        model.generate(PROMPT, do_sample=False, max_new_tokens=6, prompt_lookup_num_tokens=3, judge=judge)


def test_a_judge_of_everything_sees_what_full_passes_see(random_pair):
    """Every feature there is, in a draft made one token after the other, compared with one pass of each model."""
    model, assistant = random_pair
    config = JudgeConfig(
        judge_type="mlp",
        hidden_size=32,
        assistant_hidden_size=32,
        state_position="both",
        logit_features=True,
        assistant_logit_features=True,
        intermediate_size=4,
    )
    judge, seen = AutoJudge.from_config(config), []
    torch.manual_seed(0)
    judge.load_state_dict({name: torch.randn_like(tensor) / 10 for name, tensor in judge.state_dict().items()})
    judge.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.generate(
        MISMATCHING, do_sample=False, max_new_tokens=9, assistant_model=assistant, judge=judge, num_assistant_tokens=4
    )
    first = model.generate(MISMATCHING, do_sample=False, max_new_tokens=1)[0].tolist()
    candidates = seen[0].candidate_ids
    passes = [x(torch.tensor([first + candidates[0].tolist()]), output_hidden_states=True) for x in random_pair]
    logits, states = zip(*((x.logits[:, -5:], x.hidden_states[-1][:, -5:]) for x in passes))
    expected = judge_inputs(candidates, logits[0], *states, logits[1][:, :-1], config)
    torch.testing.assert_close(seen[0].features, expected.features, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="'mlp' judge.*prompt lookup"):
        model.generate(PROMPT, do_sample=False, max_new_tokens=6, prompt_lookup_num_tokens=3, judge=judge)


def test_thresholds_by_name_decode(random_pair, linear_judge):
    model, assistant = random_pair
    linear_judge.config.thresholds = {"nothing": 0.0, "half": 0.5}
    options = {"do_sample": False, "max_new_tokens": 30, "assistant_model": assistant, "judge": linear_judge}
    for name, value in linear_judge.config.thresholds.items():
        named, number = (model.generate(PROMPT, judge_threshold=t, **options) for t in (name, value))
        assert torch.equal(named, number)
    with pytest.raises(ValueError, match="judge_threshold.*'nothing', 'half'.*got 'all'"):
        model.generate(PROMPT, judge_threshold="all", **options)


def test_counts_add_up(random_pair, linear_judge):
    model, assistant = random_pair
    output = model.generate(
        PROMPT,
        do_sample=False,
        max_new_tokens=50,
        assistant_model=assistant,
        judge=linear_judge,
        num_assistant_tokens=5,
        return_dict_in_generate=True,
    )
    assert isinstance(output, JudgeDecoderOnlyOutput)
    for name in COUNTS:
        value = getattr(output, name)
        assert value.shape == (1,) and value.dtype == torch.long
    # The prefill's token, and per cycle the accepted candidates and the target's own.
    committed = 1 + output.num_target_forwards + output.num_matches + output.num_judge_accepted
    assert committed == output.sequences.shape[1] - PROMPT.shape[1]
    assert output.num_candidates <= 5 * output.num_target_forwards
    cycles = output.num_target_forwards.item()
    assert output.summary().startswith(f"{(committed - 1).item() / cycles:.1f} tokens per cycle: {cycles} cycles")


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_counts_where_a_criterion_ends_a_block(random_pair, top_k, threshold):
    """What it cuts off was neither accepted nor rejected."""
    model, assistant = random_pair
    options = {"do_sample": False, "max_new_tokens": 40, "assistant_model": assistant, "judge": top_k}
    options |= {"num_assistant_tokens": 6, "return_dict_in_generate": True, "judge_threshold": threshold}
    free = model.generate(PROMPT, **options)
    seen, rejected = set(), 0
    for n in range(8, 47):
        criteria = StoppingCriteriaList([lambda ids, scores, n=n: torch.tensor([ids.shape[1] >= n])])
        output = model.generate(PROMPT, stopping_criteria=criteria, **options)
        assert torch.equal(output.sequences, free.sequences[:, :n])
        told = 1 + output.num_target_forwards + output.num_matches + output.num_judge_accepted
        # A cycle that is cut off lacks the target's own token, and the mismatch that would have ended it.
        is_cut = told.item() - (n - 7)
        seen.add(is_cut)
        assert not is_cut or output.num_judge_rejected == rejected
        rejected = output.num_judge_rejected.item()
    assert seen == {0, 1}


def test_draft_length_keyword_and_default(random_pair, top_k):
    model, assistant = random_pair
    options = {"do_sample": False, "max_new_tokens": 10, "assistant_model": assistant, "judge": top_k}
    options |= {"judge_threshold": 1.0, "return_dict_in_generate": True}
    assert model.generate(PROMPT, num_assistant_tokens=4, **options).num_candidates == 4 + 3  # the budget's rest
    assistant.generation_config.num_assistant_tokens = 2
    try:
        assert model.generate(PROMPT, **options).num_target_forwards == 3
    finally:
        assistant.generation_config.num_assistant_tokens = None


# Stopping and streaming


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_stops_where_the_sequence_first_ends(random_pair, top_k, threshold):
    """EOS lists, length, and any criterion inside a block: the result is the free text, cut at the first stop."""
    model, assistant = random_pair
    options = {"do_sample": False, "assistant_model": assistant, "judge": top_k, "judge_threshold": threshold}
    options |= {"num_assistant_tokens": 6}
    free = model.generate(PROMPT, max_new_tokens=40, **options)[0].tolist()

    class StopAt(StoppingCriteria):
        def __init__(self, token):
            self.token = token

        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == self.token

    for stop in sorted(set(free[7:]))[:6]:
        end = free.index(stop, 7) + 1
        criteria = StoppingCriteriaList([StopAt(stop)])
        assert (
            model.generate(PROMPT, max_new_tokens=40, stopping_criteria=criteria, **options)[0].tolist() == free[:end]
        )
        # The draft ends at an EOS token too, and then the target's own token follows: only lossless text is the same.
        if threshold == 0.0:
            for eos in (stop, [31, stop]):
                got = model.generate(PROMPT, max_new_tokens=40, eos_token_id=eos, **options)[0].tolist()
                cut = min(free.index(t, 7) + 1 for t in ([eos] if isinstance(eos, int) else eos) if t in free[7:])
                assert got == free[:cut]
    for length in (1, 2, 13):
        assert model.generate(PROMPT, max_new_tokens=length, **options).shape[1] == 7 + length


@pytest.mark.parametrize("num_rows", [1, 3])
def test_processors_are_not_asked_behind_an_eos_token(random_pair, top_k, num_rows):
    """Constrained decoding by a trie: behind the end nothing is allowed, and nobody may ask."""
    model, assistant = random_pair
    paths = ([4, 9, 17, 31], [4, 9, 31], [8, 31])
    trie = {}
    for path in paths:
        for i, token in enumerate(path):
            trie.setdefault(tuple(path[:i]), []).append(token)

    def allowed(row, tokens):
        new = tokens[7:].tolist()
        # Stock asks for rows that are done, too: behind their padding.
        return [0] if 0 in new or (is_plain and 31 in new) else trie[tuple(new)]

    prompts = torch.cat([PROMPT, PROMPT + 1, PROMPT + 2])[:num_rows]
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 31, "pad_token_id": 0}
    options["prefix_allowed_tokens_fn"] = allowed
    is_plain = True
    expected = model.generate(prompts, **options)
    is_plain = False
    assert [token for token in expected[0, 7:].tolist() if token] in [list(path) for path in paths]
    for k in range(1, 6):
        judged = {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0, "num_assistant_tokens": k}
        assert torch.equal(model.generate(prompts, **options, **judged), expected)


def test_strangers_may_go_by_the_number_of_a_row(random_pair, top_k):
    """As stock `generate` shows them the batch: a limit of each row, and logits that each row prefers."""
    model, assistant = random_pair

    class Limits(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if scores is not None:
                assert all(of_token.shape == (3, 32) for of_token in scores)
            return torch.tensor([input_ids.shape[1] >= limit for limit in (12, 16, 22)])

    class Preferences(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores + 2 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    prompts = torch.cat([PROMPT, PROMPT + 1, PROMPT + 2])
    options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": 31}
    options |= {"logits_processor": [Preferences()], "return_dict_in_generate": True}
    options["stopping_criteria"] = [Limits(), MaxTimeCriteria(1e9)]  # the latter no stranger
    for more in ({}, {"output_scores": True}):
        expected = model.generate(prompts, **options, **more).sequences
        judged = {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0, "num_assistant_tokens": 4}
        assert torch.equal(model.generate(prompts, **options, **judged, **more).sequences, expected)
    # Rows that end apart: stock pads them.
    assert [(row != 0).sum() for row in expected] == [12, 16, 22]


def test_criteria_see_the_scores_that_are_kept(random_pair, top_k):
    model, assistant = random_pair

    class Unsure(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            assert len(scores) == input_ids.shape[1] - 7
            return scores[-1].softmax(dim=-1).amax(dim=-1) < 0.12

    options = {"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True, "output_scores": True}
    options["stopping_criteria"] = StoppingCriteriaList([Unsure()])
    expected = model.generate(PROMPT, **options).sequences
    assert 8 < expected.shape[1] < 47
    output = model.generate(PROMPT, assistant_model=assistant, judge=top_k, judge_threshold=0.0, **options)
    assert torch.equal(output.sequences, expected)


def test_a_processor_may_write_in_place(random_pair, top_k):
    model, assistant = random_pair

    class InPlace(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 3] = -50.0
            return scores

    options = {"do_sample": False, "max_new_tokens": 20, "logits_processor": LogitsProcessorList([InPlace()])}
    expected = model.generate(PROMPT, **options)
    judged = {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0}
    output = model.generate(PROMPT, return_dict_in_generate=True, output_logits=True, **options, **judged)
    assert torch.equal(output.sequences, expected)
    assert all(logits[0, 3] > -50 for logits in output.logits)  # these are as they came


def test_a_users_own_length_criterion(random_pair, top_k):
    model, assistant = random_pair
    options = {"do_sample": False, "max_new_tokens": 30, "stopping_criteria": StoppingCriteriaList([])}
    options["stopping_criteria"].append(MaxLengthCriteria(max_length=18))
    output = model.generate(PROMPT, assistant_model=assistant, judge=top_k, judge_threshold=1.0, **options)
    assert output.shape[1] == 18


@pytest.mark.slow
def test_stop_strings_inside_a_block(target, draft, tokenizer, test_problems, top_k, monkeypatch):
    """Also where the response would be drafted past them, from a `GenerationConfig`, and from the model's own."""
    inputs = encode(tokenizer, test_problems[0])
    free = target.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)[0].tolist()
    text = tokenizer.decode(free[inputs["input_ids"].shape[1] :])
    stop = text.split(". ")[1][-5:] + "."
    options = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, "tokenizer": tokenizer}
    expected = target.generate(**inputs, stop_strings=[stop], **options)
    assert expected.shape[1] < len(free)
    judged = {"assistant_model": draft, "judge": top_k, "judge_threshold": 0.0}
    assert torch.equal(target.generate(**inputs, stop_strings=[stop], **judged, **options), expected)
    config = GenerationConfig(stop_strings=stop, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    got = target.generate(**inputs, generation_config=config, tokenizer=tokenizer, **judged)
    assert torch.equal(got, expected) and config.stop_strings == stop
    with pytest.raises(ValueError, match="stop_strings.*tokenizer"):
        target.generate(**inputs, stop_strings=[stop], max_new_tokens=5, **judged)
    monkeypatch.setattr(target.generation_config, "stop_strings", [stop])
    # The model's own apply beside a config that has none, and not where the call says none.
    config = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    tokens = {"tokenizer": tokenizer, "generation_config": config}
    assert torch.equal(target.generate(**inputs, **judged, **tokens), expected)
    assert target.generate(**inputs, stop_strings=None, **judged, **tokens).shape[1] > expected.shape[1]
    assert torch.equal(target.generate(**inputs, **judged, **options), expected)


def test_min_new_tokens(random_pair, top_k):
    model, assistant = random_pair
    first = model.generate(PROMPT, do_sample=False, max_new_tokens=1)[0, -1].item()
    options = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 8, "eos_token_id": first}
    got = model.generate(PROMPT, assistant_model=assistant, judge=top_k, judge_threshold=0.0, **options)
    assert torch.equal(got, model.generate(PROMPT, **options))


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], 0

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


def test_streamer_and_scores(random_pair, top_k):
    model, assistant = random_pair

    streamer = Collect()
    options = {"do_sample": False, "max_new_tokens": 20, "repetition_penalty": 1.2, "return_dict_in_generate": True}
    options |= {"output_scores": True, "output_logits": True}
    expected = model.generate(PROMPT, **options)
    output = model.generate(
        PROMPT, assistant_model=assistant, judge=top_k, judge_threshold=0.0, streamer=streamer, **options
    )
    assert streamer.tokens == output.sequences[0].tolist() and streamer.ended == 1
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(getattr(output, name)), torch.cat(getattr(expected, name)))


# Generation configs as instruct models ship them


@pytest.fixture
def instruct_pair(random_pair):
    """Sampling on, a repetition penalty, lists of EOS ids, different between the two."""
    model, assistant = random_pair
    before = model.generation_config, assistant.generation_config
    import copy

    model.generation_config, assistant.generation_config = map(copy.deepcopy, before)
    model.generation_config.update(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05, eos_token_id=[30, 31]
    )
    assistant.generation_config.update(do_sample=True, temperature=0.6, repetition_penalty=1.1, eos_token_id=[29, 31])
    yield model, assistant
    model.generation_config, assistant.generation_config = before


def test_instruct_configs_warn_once_with_the_difference(instruct_pair, linear_judge, caplog):
    model, assistant = instruct_pair
    autojudge_hf.checks.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="autojudge_hf.checks"):
        for _ in range(2):
            model.generate(PROMPT, max_new_tokens=8, assistant_model=assistant, judge=linear_judge)
    assert len(caplog.messages) == 1
    for part in ("do_sample=True (mined: False)", "temperature=0.7", "repetition_penalty=1.05 (mined: 1.0)"):
        assert part in caplog.messages[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="autojudge_hf.checks"):
        options = {"do_sample": False, "repetition_penalty": 1.0, "max_new_tokens": 8}
        model.generate(PROMPT, assistant_model=assistant, judge=linear_judge, **options)
    assert not caplog.messages
    for name, value in (
        ("bad_words_ids", [[3]]),
        ("suppress_tokens", [4]),
        ("min_new_tokens", 2),
        ("exponential_decay_length_penalty", (5, 1.1)),
        ("sequence_bias", {(5,): 1.0}),
        ("encoder_repetition_penalty", 1.2),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="autojudge_hf.checks"):
            model.generate(PROMPT, assistant_model=assistant, judge=linear_judge, **options, **{name: value})
        assert len(caplog.messages) == 1 and f"{name}=" in caplog.messages[0]


def test_instruct_configs_lossless_follows_the_targets_config(instruct_pair, top_k):
    model, assistant = instruct_pair
    options = {"do_sample": False, "max_new_tokens": 60}
    expected = model.generate(PROMPT, **options)
    got = model.generate(PROMPT, assistant_model=assistant, judge=top_k, judge_threshold=0.0, **options)
    assert torch.equal(got, expected)


# The adapter


def test_wrapped_once_and_signature_kept():
    wrapped = GenerationMixin.generate
    autojudge_hf.adapter.install_judge_argument()
    assert GenerationMixin.generate is wrapped
    original = wrapped.__wrapped__
    assert inspect.signature(wrapped) == inspect.signature(original)
    assert wrapped.__doc__ == original.__doc__


def test_other_wrappers_around_generate(random_pair, top_k, monkeypatch):
    """Of other libraries, with their own names or none, before and behind ours; and ours of an import before."""
    model, assistant = random_pair
    options = {"do_sample": False, "max_new_tokens": 20, "assistant_model": assistant, "judge_threshold": 0.0}
    original = GenerationMixin.generate.__wrapped__
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=20)

    def nameless(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    @functools.wraps(original)
    def named(*args, **kwargs):
        return original(*args, **kwargs)

    for inner in (nameless, named, original):
        monkeypatch.setattr(GenerationMixin, "generate", inner)
        autojudge_hf.adapter.install_judge_argument()
        ours = GenerationMixin.generate
        assert ours is not inner and ours.__wrapped__ is inner
        assert torch.equal(model.generate(PROMPT, judge=top_k, **options), expected)
    with pytest.raises(TypeError, match="multiple values for argument 'inputs'"):
        model.generate(PROMPT, inputs=PROMPT, judge=top_k, **options)

    @functools.wraps(ours)
    def outer(*args, **kwargs):
        return ours(*args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", outer)
    autojudge_hf.adapter.install_judge_argument()
    assert GenerationMixin.generate is outer
    of_before = types.FunctionType(ours.__code__, {**ours.__globals__}, closure=ours.__closure__)
    of_before.__wrapped__, of_before._wraps_judge = original, of_before
    monkeypatch.setattr(GenerationMixin, "generate", of_before)
    autojudge_hf.adapter.install_judge_argument()
    assert GenerationMixin.generate is not of_before and GenerationMixin.generate.__wrapped__ is original


class Stubborn(RepetitionPenaltyLogitsProcessor):
    """A user's own, of a class that is known."""

    def __call__(self, input_ids, scores):
        return super().__call__(input_ids, scores).index_fill(1, torch.tensor([3, 5, 9]), -1e4)


def test_subclasses_of_processors_stay_what_they_are(random_pair, top_k):
    model, assistant = random_pair
    options = {"max_new_tokens": 30, "do_sample": False, "logits_processor": LogitsProcessorList([Stubborn(1.3)])}
    expected = model.generate(**left_padded([[3, 4, 5], [6]]), **options)
    options |= {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0}
    assert torch.equal(model.generate(**left_padded([[3, 4, 5], [6]]), **options), expected)
    assert not torch.isin(expected[:, 3:], torch.tensor([3, 5, 9])).any()


def test_without_judge_the_original_runs(random_pair, monkeypatch):
    model, assistant = random_pair
    monkeypatch.setattr(autojudge_hf.adapter, "judge_decoding", None)
    model.generate(PROMPT, max_new_tokens=3, do_sample=False, assistant_model=assistant)
    with pytest.raises(ValueError, match="judge_threshold"):
        model.generate(PROMPT, max_new_tokens=3, judge_threshold=0.5)


def test_a_threshold_needs_a_judge(random_pair):
    model, assistant = random_pair
    loop = functools.partial(judge_decoding, assistant_model=assistant, judge_threshold=0.5)
    with pytest.raises(ValueError, match="`judge_threshold=0.5` needs a `judge`, got None"):
        model.generate(PROMPT, max_new_tokens=3, assistant_model=assistant, custom_generate=loop)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": None}, "assistant_model"),
        ({"judge_threshold": 1.5}, r"judge_threshold.*\[0, 1\].*1\.5"),
        ({"judge_threshold": "high"}, r"judge_threshold.*'high'"),
        ({"judge_threshold": float("nan")}, "judge_threshold"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens.*at least 1.*0"),
        ({"num_assistant_tokens": 2.5}, r"num_assistant_tokens.*2\.5"),
        ({"judge": "user/judge"}, r"judge.*str.*AutoJudge\.from_pretrained"),
        ({"num_beams": 2}, "beam search"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences|batches"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "low"}, "dola_layers"),
        ({"watermarking_config": WatermarkingConfig()}, "watermarks"),
        ({"assistant_model": "org/small"}, "assistant_model.*must be a model, got str"),
        ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight"),
        ({"inputs_embeds": torch.zeros(1, 7, 32)}, "inputs_embeds"),
        ({"inputs_embeds": torch.zeros(1, 7, 32), "inputs": None}, "inputs_embeds"),
        ({"logits_processor": LogitsProcessorList([STATEFUL])}, "SynthIDTextWatermark"),
        ({"use_cache": False}, "use_cache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"prompt_lookup_num_tokens": 3}, "two drafters.*assistant_model, prompt_lookup_num_tokens"),
        ({"assistant_model": None, "assistant_early_exit": 2}, "assistant_early_exit.*1 to 1.*got 2"),
        ({"num_assistant_tokens": "many"}, "num_assistant_tokens.*'adaptive'.*'many'"),
        ({"custom_generate": lambda *args, **kwargs: None}, "custom_generate"),
        ({"position_ids": 3 * torch.arange(7)[None]}, "position_ids.*of your own"),
        ({"synced_gpus": True}, "synced_gpus"),
    ],
)
def test_bad_calls_fail_before_any_forward(random_pair, linear_judge, options, message):
    model, assistant = random_pair
    calls = []
    hooks = [m.register_forward_pre_hook(lambda *args: calls.append(1)) for m in (model, assistant)]
    with pytest.raises(ValueError, match=message):
        call = {"inputs": PROMPT, "max_new_tokens": 5, "assistant_model": assistant, "judge": linear_judge, **options}
        model.generate(**call)
    for hook in hooks:
        hook.remove()
    assert not calls


def test_models_that_are_refused(random_pair, top_k, monkeypatch):
    """Encoder-decoder and stateful ones, and hybrids of families that are not let in, before they run."""
    model, _ = random_pair
    monkeypatch.setattr(autojudge_hf.model_properties, "WITH_STATES", ("qwen3_next",))
    size = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
    mamba = MambaForCausalLM(MambaConfig(**size, state_size=4))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    kinds = {"layer_types": ["conv", "full_attention"], "num_attention_heads": 2, "num_key_value_heads": 2}
    lfm2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **size, **kinds, intermediate_size=16))
    for target, assistant, message in (
        (lfm2, model, "the cache's LinearAttentionLayer"),
        (model, lfm2, r"Lfm2ForCausalLM can't take tokens back.*\['LinearAttentionLayer'\]"),
        (t5, model, "encoder-decoder"),
        (mamba, model, "stateful"),
        (model, mamba, "stateful"),
        (model, t5, "encoder-decoder"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr(torch.nn.Module, "__call__", lambda *args, **kwargs: pytest.fail("a module ran"))
            target.generate(PROMPT, max_new_tokens=5, assistant_model=assistant, judge=top_k)


def test_sharded_models_are_refused(random_pair, top_k, monkeypatch):
    """Every forward would wait for the other processes', which need another number of them."""
    model, assistant = random_pair
    monkeypatch.setattr(supported, "is_fsdp_managed_module", lambda m: m is assistant)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="FSDP or ZeRO-3"):
        model.generate(PROMPT, max_new_tokens=5, assistant_model=assistant, judge=top_k)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    model.generate(PROMPT, max_new_tokens=5, assistant_model=assistant, judge=top_k)


def test_caches_that_are_refused(random_pair, top_k):
    """A user's own static cache, and layers from whose rows nothing can be taken back."""
    model, assistant = random_pair
    odd = DynamicCache(config=model.config)
    odd.layers[0] = type("ConvolutionLayer", (DynamicLayer,), {})()
    for cache, message in ((StaticCache(config=model.config, max_cache_len=64), "StaticCache"), (odd, "Convolution")):
        options = {CACHE_NAME: cache, "max_new_tokens": 5, "assistant_model": assistant}
        with pytest.raises(ValueError, match=message):
            model.generate(PROMPT, judge=top_k, **options)
        assert cache.get_seq_length() == 0


def test_a_cache_wants_the_whole_text(random_pair, top_k):
    """Not the new tokens alone, as plain `generate` takes them: the drafter has to see what came before."""
    model, assistant = random_pair
    text, new = PROMPT[:, :4], PROMPT[:, 4:]
    for tokens, mask in ((new, torch.ones_like(PROMPT)), (text, None)):
        cache = DynamicCache(config=model.config)
        model(text, **{CACHE_NAME: cache})
        with pytest.raises(ValueError, match="pass the whole text"):
            model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=5,
                assistant_model=assistant,
                judge=top_k,
                **{CACHE_NAME: cache},
            )


def test_a_cache_that_lags_behind_its_shrunken_rows():
    """A drafter that skipped cycles may hold less than what is dropped at the front: then nothing is left."""
    for kept in (2, 1, 0, -3):
        cache = DynamicCache()
        cache.update(*torch.randn(2, 2, 1, 4, 8), layer_idx=0)
        expected = cache.layers[0].keys[1:, :, 4 - max(0, kept) :]
        shrink(cache, [1], kept)
        assert torch.equal(cache.layers[0].keys, expected) and cache.get_seq_length() == max(0, kept)


def test_what_batches_refuse(random_pair, top_k):
    model, assistant = random_pair
    options = {"max_new_tokens": 5, "assistant_model": assistant, "judge": top_k}
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, -2:] = 0
    with pytest.raises(ValueError, match="padded on the right.*padding_side"):
        model.generate(PROMPT.repeat(2, 1), attention_mask=mask, **options)
    with pytest.raises(ValueError, match="streamers with several prompts"):
        model.generate(PROMPT.repeat(2, 1), streamer=Collect(), **options)
    for processor in (
        EncoderNoRepeatNGramLogitsProcessor(2, PROMPT.repeat(2, 1)),
        EncoderRepetitionPenaltyLogitsProcessor(1.2, PROMPT.repeat(2, 1)),
    ):
        with pytest.raises(ValueError, match=f"logits processors.*{type(processor).__name__}"):
            model.generate(PROMPT.repeat(2, 1), logits_processor=LogitsProcessorList([processor]), **options)


def test_judge_for_other_sizes_names_both_numbers(random_pair):
    model, assistant = random_pair
    for sizes, role in (
        ({"hidden_size": 64}, "target"),
        ({"hidden_size": 32, "assistant_hidden_size": 48}, "assistant"),
    ):
        judge = AutoJudge.from_config(JudgeConfig(base_model_name_or_path="some/model", **sizes))
        with pytest.raises(ValueError, match=rf"doesn't fit this {role}.*(64|48).*32.*some/model"):
            model.generate(PROMPT, max_new_tokens=5, assistant_model=assistant, judge=judge)
