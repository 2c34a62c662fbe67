# SPDX-License-Identifier: Apache-2.0
"""Where candidates come from: prompt lookup, the target's first layers, and how many of them a cycle drafts."""

import copy
import functools
import itertools
import math
import threading

import pytest
import reference
import torch
from accelerate import cpu_offload
from conftest import PROMPT, left_padded, random_llama
from transformers import (
    EpsilonLogitsWarper,
    GenerationConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TopHLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import autojudge_hf.generation
from autojudge_hf import AutoJudge, JudgeConfig, judge_decoding
from autojudge_hf.certain_drafts import PromptLookup
from autojudge_hf.draft_length import AdaptiveDraftLength, draft_schedule
from autojudge_hf.early_exit import first_layers
from autojudge_hf.rows import RowProcessors, Rows


REPETITIVE = [[3, 14, 15, 9, 3, 14, 2, 3, 14, 15, 7, 2, 3], [5, 6, 5, 6, 5], [1, 2, 3, 1, 2, 3, 4, 1, 2, 9, 2]]


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("num_assistant_tokens", [1, 5, 16, "adaptive"])
@pytest.mark.parametrize("drafter", ["prompt_lookup_num_tokens", "assistant_early_exit", "assistant_model"])
def test_lossless(random_pair, top_k, drafter, num_assistant_tokens, num_rows):
    model, assistant = random_pair
    values = {"prompt_lookup_num_tokens": 4, "assistant_early_exit": 1, "assistant_model": assistant}
    output = model.generate(
        **left_padded(REPETITIVE[:num_rows]),
        do_sample=False,
        max_new_tokens=60,
        judge=top_k,
        judge_threshold=0.0,
        num_assistant_tokens=num_assistant_tokens,
        return_dict_in_generate=True,
        **{drafter: values[drafter]},
    )
    width = max(map(len, REPETITIVE[:num_rows]))
    for row, prompt in zip(output.sequences, REPETITIVE):
        assert row[width:].tolist() == reference.greedy(model, prompt, 60, ())[len(prompt) :]
    # Sometimes right, neither never nor always.
    assert 0 < output.num_matches.sum() < output.num_candidates.sum()


def test_prompt_lookup_without_a_judge(random_pair):
    model, _ = random_pair
    prompt = torch.tensor(REPETITIVE[:1])
    options = {"do_sample": False, "max_new_tokens": 30}
    expected = model.generate(prompt, **options)
    assert torch.equal(
        model.generate(prompt, custom_generate=judge_decoding, prompt_lookup_num_tokens=5, **options), expected
    )


def test_prompt_lookup_at_threshold_one_repeats_the_prompt(random_pair, top_k):
    """Whatever the target thinks of it: every looked-up candidate stays."""
    model, _ = random_pair
    options = {"do_sample": False, "max_new_tokens": 24, "prompt_lookup_num_tokens": 3, "judge": top_k}
    output = model.generate(torch.tensor(REPETITIVE[:1]), judge_threshold=1.0, return_dict_in_generate=True, **options)
    accepted = output.num_matches + output.num_judge_accepted
    assert torch.equal(accepted, output.num_candidates) and output.num_judge_accepted > 0


def test_prompt_lookup_has_no_states_to_judge(random_pair):
    model, _ = random_pair
    judge = AutoJudge.from_config(JudgeConfig(hidden_size=32, assistant_hidden_size=32))
    with pytest.raises(ValueError, match="assistant's hidden states, of size 32, and prompt lookup has none"):
        model.generate(PROMPT, prompt_lookup_num_tokens=3, judge=judge, max_new_tokens=5)


def test_first_layers_are_a_model_of_their_own():
    """The same logits as a model that was built with so few layers; the full model is as it was."""
    model = random_llama(num_hidden_layers=4)
    before = model(PROMPT).logits
    early = first_layers(model, 3)
    literal = random_llama(num_hidden_layers=3)
    literal.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(early(PROMPT).logits, literal(PROMPT).logits)
    assert isinstance(early, LlamaForCausalLM)
    assert {id(p) for p in early.parameters()} < {id(p) for p in model.parameters()}
    assert len(early(PROMPT, output_hidden_states=True).hidden_states) == 4
    assert len(model(PROMPT, output_hidden_states=True).hidden_states) == 5
    assert torch.equal(model(PROMPT).logits, before)
    assert not torch.equal(early(PROMPT).logits, before)
    assert (model.config.num_hidden_layers, len(model.model.layers)) == (4, 4)


def test_early_exit_states_can_be_judged(random_pair):
    """A judge that reads the drafter's states reads those of the first layers."""
    model, _ = random_pair
    torch.manual_seed(0)
    judge = AutoJudge.from_config(JudgeConfig(assistant_hidden_size=32))
    judge.load_state_dict({"weight": torch.randn(32), "bias": torch.zeros(1)})
    options = {"do_sample": False, "max_new_tokens": 40, "judge": judge, "judge_threshold": 0.5}
    early = model.generate(PROMPT, assistant_early_exit=1, num_assistant_tokens=4, **options)
    twin = model.generate(PROMPT, assistant_model=first_layers(model, 1), num_assistant_tokens=4, **options)
    assert torch.equal(early, twin)


def test_early_exit_calls_the_callers_own_hooks(random_pair):
    """As in stock `generate`: they see every forward, the draft's too, and may be what can't be copied."""

    class Counter:
        def __init__(self):
            self.lock, self.count = threading.Lock(), 0

        def __call__(self, *args):
            with self.lock:
                self.count += 1

    model, _ = random_pair
    on_model, on_layer = Counter(), Counter()
    hooks = model.register_forward_pre_hook(on_model), model.model.layers[0].register_forward_hook(on_layer)
    try:
        options = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True}
        custom = functools.partial(judge_decoding, num_assistant_tokens=3)
        output = model.generate(PROMPT, assistant_early_exit=1, custom_generate=custom, **options)
    finally:
        for hook in hooks:
            hook.remove()
    # The prefill, the verifications, and one forward for each candidate.
    assert on_model.count == on_layer.count == 1 + output.num_target_forwards.item() + output.num_candidates.item()


def test_early_exit_copies_no_weights_of_an_offloaded_model(random_pair, top_k):
    """They are on the meta device, and what accelerate brings them in from is as large as the model."""
    model, _ = random_pair
    options = {"do_sample": False, "max_new_tokens": 20, "assistant_early_exit": 1, "judge": top_k}
    expected = model.generate(PROMPT, **options)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    weights = {x.data_ptr() for x in weights_held_by_hooks(offloaded)}
    assert weights and {x.data_ptr() for x in weights_held_by_hooks(first_layers(offloaded, 1))} <= weights
    assert torch.equal(offloaded.generate(PROMPT, **options), expected)


def weights_held_by_hooks(model):
    hooks = [module._hf_hook for module in model.modules() if hasattr(module, "_hf_hook")]
    maps = [hook.weights_map for one in hooks for hook in getattr(one, "hooks", [one]) if hasattr(hook, "weights_map")]
    return [x for of_map in maps if of_map is not None for x in of_map.dataset.values()]


def test_early_exit_drafts_what_the_models_config_says(random_pair, top_k, monkeypatch):
    model, _ = random_pair
    monkeypatch.setattr(model.generation_config, "num_assistant_tokens", 3)
    options = {"max_new_tokens": 30, "return_dict_in_generate": True, "judge_threshold": 1.0}
    output = model.generate(PROMPT, assistant_early_exit=1, judge=top_k, **options)
    assert output.num_candidates.item() == 29 - output.num_target_forwards.item()
    assert output.num_target_forwards.item() == math.ceil(29 / 4)


# Adaptive draft length


def learned(acceptance, draft, verify, start=8, cycles=400):
    """What the schedule settles on if candidates are accepted with a fixed probability, at fixed costs in seconds."""
    generator = torch.Generator().manual_seed(0)
    schedule, chosen = AdaptiveDraftLength(start), []
    for _ in range(cycles):
        k = schedule.value
        hits = torch.rand(k, generator=generator) < acceptance
        schedule.update([k], [int(hits.long().cumprod(0).sum())], k * draft, verify)
        chosen.append(schedule.value)
    return sum(chosen[cycles // 2 :]) / (cycles - cycles // 2)


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.9])
@pytest.mark.parametrize("cost", [0.05, 0.2, 0.5])
def test_adaptive_length_is_within_a_few_percent_of_the_best(acceptance, cost):
    def speed(k):
        return (1 - acceptance ** (k + 1)) / (1 - acceptance) / (k * cost + 1)

    best = max(speed(k) for k in range(1, 33))
    assert speed(learned(acceptance, cost, 1.0)) > 0.95 * best


def test_adaptive_length_learns_nothing_from_an_empty_draft():
    schedule = AdaptiveDraftLength(8)
    schedule.update([0, 0], [0, 0], 0.0, 1.0)
    assert schedule.value == 8


def test_adaptive_length_forgets():
    """Of a text that the drafter knows by heart, behind a long one that it doesn't know."""
    schedule = AdaptiveDraftLength(8)
    for accepted, num_cycles, length in ((0, 2_000, 1), (8, 250, 32)):
        for _ in range(num_cycles):
            schedule.update([8], [accepted], 1.0, 2.0)
        assert schedule.value == length


def test_adaptive_lengths_are_learned_for_a_pair(random_pair, top_k, monkeypatch):
    """The next call goes on where the last one ended; another model begins anew, and so does another judge."""
    model, assistant = random_pair
    other = random_llama(3)

    def schedule(target, drafter, *circumstances):
        return draft_schedule("adaptive", target, drafter, GenerationConfig(), circumstances)

    def learns(lengths, accepted):
        schedule = AdaptiveDraftLength(8)
        schedule.update(lengths, accepted, draft=8.0, verify=2.0)
        return vars(schedule)

    assert learns([8] * 4, [3] * 4) == learns([8], [3])  # rows of a batch are averaged
    for drafter in (assistant, None):
        learned = schedule(model, drafter, "kl", 0.1)
        assert schedule(model, drafter, "kl", 0.1) is learned
        assert schedule(other, drafter, "kl", 0.1) is not learned
        assert schedule(model, other, "kl", 0.1) is not learned
        assert schedule(model, drafter, "margin", 0.1) is not learned

    used = []
    monkeypatch.setattr(
        autojudge_hf.generation, "draft_schedule", lambda *a, **kw: used.append(draft_schedule(*a, **kw)) or used[-1]
    )
    options = {"do_sample": False, "max_new_tokens": 9, "num_assistant_tokens": "adaptive", "judge": top_k}
    for more in ({"assistant_early_exit": 1}, {"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        for _ in range(2):
            model.generate(PROMPT, **options, **more)
    assert [used.index(schedule) for schedule in used] == [0, 0, 2, 2, 4, 4]
    for prompts, more in ((PROMPT, {"judge_threshold": 0.9}), (PROMPT.repeat(2, 1), {})):
        model.generate(prompts, prompt_lookup_num_tokens=3, **options, **more)
    assert [used.index(schedule) for schedule in used][6:] == [6, 7]


def test_adaptive_length_is_told_which_part_took_how_long(random_pair, top_k, monkeypatch):
    model, assistant = random_pair
    told, ticks = [], itertools.accumulate(itertools.cycle([0.0, 1.0, 10.0, 100.0]))
    monkeypatch.setattr(AdaptiveDraftLength, "now", lambda *_: next(ticks))
    monkeypatch.setattr(AdaptiveDraftLength, "update", lambda self, *args: told.append(args))
    options = {"do_sample": False, "max_new_tokens": 9, "num_assistant_tokens": "adaptive", "judge": top_k}
    model.generate(PROMPT, assistant_model=assistant, **options)
    # Each cycle reads the clock before its draft, behind it, and at its end.
    steps = itertools.cycle([0.0, 1.0, 10.0, 100.0])
    next(steps)
    for *_, draft, verify in told:
        assert (draft, verify) == (next(steps), next(steps))
        next(steps)


def test_a_lookup_never_offers_what_is_forbidden(random_pair):
    """Its candidates are what the prompt says, and a learned judge could find them harmless."""
    model, _ = random_pair
    judge = AutoJudge.from_config(JudgeConfig(hidden_size=32))
    judge.load_state_dict({"weight": torch.zeros(32), "bias": torch.tensor([-9.0])})
    options = {"do_sample": False, "max_new_tokens": 24, "prompt_lookup_num_tokens": 3, "judge": judge}
    # Whatever comes, 7 has followed it.
    prompt = torch.tensor([[token for other in range(1, 32) if other != 7 for token in (other, 7)]])
    options["max_matching_ngram_size"] = 1
    for suppressed, comes in (([8], True), ([7], False)):
        output = model.generate(prompt, suppress_tokens=suppressed, **options)
        assert (7 in output[0, prompt.shape[1] :].tolist()) == comes


def test_a_lookup_drafts_whatever_cuts_a_tail(random_pair):
    """What is forbidden is asked of logits that are all alike, of which a warper would cut some at random."""
    model, _ = random_pair
    prompt = torch.tensor([[11, 21, 31, 1, 11, 21]])
    config = GenerationConfig(max_matching_ngram_size=2, max_length=99)
    config._eos_token_tensor = None
    warpers = [TopPLogitsWarper(0.1), TopHLogitsWarper(0.1), TypicalLogitsWarper(0.1), EpsilonLogitsWarper(0.1)]
    for more, length in (([], 3), ([SuppressTokensLogitsProcessor([1])], 1)):
        processors = RowProcessors(LogitsProcessorList(warpers + more), 1)
        drafter = PromptLookup(model, config)
        drafter.get_candidates(prompt, None, [3], functools.partial(processors, Rows(prompt, None), [3]))
        assert drafter.lengths == [length]


def test_adaptive_length_reacts_to_a_judge(random_pair, top_k):
    """Where everything is accepted, drafts grow; where hardly anything is, they shrink."""
    model, assistant = random_pair
    decode = functools.partial(
        model.generate,
        PROMPT,
        do_sample=False,
        max_new_tokens=150,
        assistant_model=assistant,
        judge=top_k,
        num_assistant_tokens="adaptive",
        return_dict_in_generate=True,
    )
    means = []
    for threshold in (0.0, 1.0):
        output = decode(judge_threshold=threshold)
        means.append((output.num_candidates / output.num_target_forwards).item())
    assert means[0] < means[1]
