# SPDX-License-Identifier: Apache-2.0
"""`cache_implementation="static"`: the same tokens from caches of a fixed shape, compiled once for it."""

import contextlib
import gc
import re
import threading
import weakref

import pytest
import torch
from conftest import PROMPT, left_padded, random_llama, similar_model
from test_architectures import FAMILIES, NEW_TOKENS, PROMPTS, random_model, rewind_to_wrong_keys, worth_testing
from torch._dynamo.utils import counters
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig, GenerationConfig, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from autojudge_hf import AutoJudge, JudgeConfig
from autojudge_hf.checks import warn_once
from autojudge_hf.fixed_cache import kept_caches, take_fixed_cache
from autojudge_hf.model_properties import CACHE_NAME
from autojudge_hf.tasks import GSM8K


GREEDY = {"do_sample": False, "return_dict_in_generate": True}
STATIC = {**GREEDY, "cache_implementation": "static"}


def same(one, other) -> bool:
    """Tokens, and the counts of what was matched and judged."""
    counts = ("num_target_forwards", "num_candidates", "num_matches", "num_judge_accepted", "num_judge_rejected")
    return torch.equal(one.sequences, other.sequences) and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in counts
    )


@pytest.fixture
def compiled():
    """What a graph costs to make left out: the frontend's graphs, run as they are."""
    config = CompileConfig(backend="eager", fullgraph=True, dynamic=False)
    counters.clear()
    yield {**STATIC, "compile_config": config}
    torch._dynamo.reset()


@pytest.mark.parametrize("threshold", [0.0, 0.2])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_same_tokens_on_the_embedded_pair(target, draft, tokenizer, test_problems, judge, batch_size, threshold):
    """Two calls in a row, of other prompt lengths, on one allocation."""
    options = {"assistant_model": draft, "judge": judge, "judge_threshold": threshold}
    options |= {"num_assistant_tokens": 8, "max_new_tokens": 120}
    caches = []
    for first in (0, 4):
        prompts = [GSM8K().prompt(problem, tokenizer) for problem in test_problems[first : first + batch_size]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        expected = target.generate(**inputs, **options, **GREEDY)
        output = target.generate(**inputs, **options, **STATIC)
        assert same(output, expected)
        assert (output.num_judge_accepted.sum() > 0) == (threshold > 0)
        caches.append(kept_caches[target][-1])
        if batch_size == 1:
            assert output[CACHE_NAME] is caches[-1] and isinstance(output[CACHE_NAME], StaticCache)
            assert output[CACHE_NAME].length == output.sequences.shape[1] - 1
    assert caches[0] is caches[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless(family, monkeypatch):
    """Windows shorter than the text, learned positions, ALiBi: alone and in a ragged batch; wrong keys are noticed."""
    model, assistant = worth_testing(family)
    options = {"assistant_model": assistant, "judge": AutoJudge.from_config(JudgeConfig(judge_type="top_k"))}
    options |= {"judge_threshold": 0.0, "max_new_tokens": NEW_TOKENS, "num_assistant_tokens": 5}
    for inputs in ({"input_ids": torch.tensor([PROMPTS[0]])}, left_padded(PROMPTS)):
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        output = model.generate(**inputs, **options, **STATIC)
        assert torch.equal(output.sequences, expected)
        assert 0 < output.num_matches.sum() < output.num_candidates.sum()

    rewind_to_wrong_keys(monkeypatch)
    assert not torch.equal(model.generate(**inputs, **options, **STATIC).sequences, expected)
    # These two have no forward that could be compiled whole; their caches grow, with a warning.
    assert (model in kept_caches) == (family not in ("gpt_neo", "mpt"))


def test_states_that_are_not_the_last_ones():
    """What Gemma 3n's head reads is none of the states that compiled forwards give: its judges get growing caches."""
    model = random_model("gemma3n_text", seed=0)
    judge = AutoJudge.from_config(JudgeConfig(hidden_size=32))
    torch.manual_seed(0)
    judge.load_state_dict({"weight": torch.randn(32), "bias": torch.zeros(1)})
    options = {"assistant_model": similar_model(model), "judge": judge, "max_new_tokens": 40, "judge_threshold": 0.5}
    expected, output = (model.generate(PROMPT, **options, **decoding) for decoding in (GREEDY, STATIC))
    assert same(output, expected) and 0 < output.num_judge_accepted < output.num_candidates
    assert model not in kept_caches


def test_short_budgets_compile_nothing(compiled, top_k):
    """A draft that is cut short is verified in the shape of a whole one."""
    model = random_llama()
    options = {"assistant_model": similar_model(model), "judge": top_k, "judge_threshold": 0.5}
    options["num_assistant_tokens"] = 8
    model.generate(PROMPT, max_new_tokens=40, **options, **compiled)
    graphs = counters["stats"]["unique_graphs"]
    for max_new_tokens in range(1, 12):
        expected = model.generate(PROMPT, max_new_tokens=max_new_tokens, **options, **GREEDY)
        assert same(model.generate(PROMPT, max_new_tokens=max_new_tokens, **options, **compiled), expected)
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_third_batch_size_takes_the_place_of_one(top_k):
    """Two of a model's caches are kept, and no call holds a third beside them."""
    model = random_llama()
    held, caches = [], weakref.WeakSet()

    def look(*_):
        gc.collect()
        held.append(len(caches))

    options = {"assistant_model": similar_model(model), "judge": top_k, "max_new_tokens": 8, **STATIC}
    for batch_size in (1, 2, 3, 4):
        hook = model.register_forward_pre_hook(look)
        model.generate(PROMPT.repeat(batch_size, 1), **options)
        hook.remove()
        caches.update(kept_caches[model])
    # Those of earlier calls, beside which there is this call's own.
    assert set(held) == {0, 1}


def test_calls_that_take_turns_have_their_caches_back(top_k):
    """Graphs are captured for addresses: of batches of two sizes, and of a model that is its own assistant."""
    model = random_llama()
    assistant = similar_model(model)
    options = {"judge": top_k, "judge_threshold": 0.0, "num_assistant_tokens": 4, "max_new_tokens": 12, **STATIC}
    for drafter, batches in ((assistant, [PROMPTS[:1], PROMPTS[:2]]), (model, [PROMPTS[:1]])):
        seen = []
        for _ in range(3):
            for prompts in batches:
                inputs = left_padded(prompts)
                expected = model.generate(**inputs, do_sample=False, max_new_tokens=12)
                output = model.generate(**inputs, assistant_model=drafter, **options)
                assert torch.equal(output.sequences, expected)
                seen.append([cache for m in (model, drafter) for cache in kept_caches[m]])
        # In the same order, which says whose is whose.
        assert seen[-1] == seen[-1 - len(batches)]
        assert len(kept_caches[model]) == 2


def test_a_short_call_after_a_long_one_has_its_small_cache_back(top_k):
    """Attention runs over all the positions that there are."""
    model = random_llama(max_position_embeddings=1024)
    options = {
        "assistant_model": similar_model(model),
        "judge": top_k,
        "judge_threshold": 0.0,
        "max_new_tokens": 8,
        **STATIC,
    }
    lengths = []
    for num_tokens in (10, 600, 10, 600, 10):
        prompt = torch.arange(num_tokens)[None] % 32
        output = model.generate(prompt, **options)
        assert torch.equal(output.sequences, model.generate(prompt, do_sample=False, max_new_tokens=8))
        lengths.append(output[CACHE_NAME].max_length)
    assert lengths == [256, 768, 256, 768, 256]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_compiled_once(compiled, top_k, batch_size):
    """Cycles, tails of a response and other prompt lengths make no new graph, and no graph breaks."""
    model = random_llama()
    options = {"assistant_model": similar_model(model), "judge": top_k, "judge_threshold": 0.5}
    options |= {"num_assistant_tokens": 4, "max_new_tokens": 40}
    graphs = []
    for prompts in (PROMPTS, [p[:2] for p in PROMPTS], [[5, *p] for p in PROMPTS]):
        inputs = left_padded(prompts[:batch_size])
        assert same(model.generate(**inputs, **options, **compiled), model.generate(**inputs, **options, **GREEDY))
        graphs.append(counters["stats"]["unique_graphs"])
    # The target's, and the assistant's for one token and for two.
    assert graphs == [3, 3, 3]
    assert not counters["graph_break"]


def test_hooks_on_the_target_run_and_compile_nothing(compiled, top_k):
    """One that counts would be another graph at every forward, were it compiled in."""
    model = random_llama()
    options = {"assistant_model": similar_model(model), "judge": top_k, "judge_threshold": 0.5}
    options |= {"num_assistant_tokens": 4, "max_new_tokens": 40, **compiled}
    output = model.generate(PROMPT, **options)
    graphs, calls = counters["stats"]["unique_graphs"], []
    model.register_forward_pre_hook(lambda *_: calls.append(len(calls)))
    assert same(model.generate(PROMPT, **options), output)
    assert len(calls) == 1 + output.num_target_forwards > 3
    assert counters["stats"]["unique_graphs"] == graphs


def test_one_token_is_compiled_for_itself(monkeypatch, top_k):
    """By kernels that are tuned for it, unless the caller says how to compile, or there are more rows."""
    steps = set()

    def compile(function, mode=None, options=None, **config):
        if function.__name__ == "_greedy_step":
            steps.add((mode, bool(options and options["coordinate_descent_tuning"])))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    model = random_llama()
    options = {"assistant_model": similar_model(model), "judge": top_k, "max_new_tokens": 20, **STATIC}
    # All candidates are accepted, and so the next draft begins with two tokens.
    options |= {"judge_threshold": 1.0, "num_assistant_tokens": 4}
    one, two = {"input_ids": PROMPT}, left_padded(PROMPTS[:2])
    for inputs, config, expected in (
        (one, CompileConfig(dynamic=False), {("reduce-overhead", False), (None, True)}),
        (two, CompileConfig(dynamic=False), {("reduce-overhead", False)}),
        (one, CompileConfig(mode="default"), {("default", False)}),
    ):
        model.generate(**inputs, compile_config=config, **options)
        assert steps == expected
        steps.clear()


@pytest.mark.slow
def test_compiled_for_real(target, draft, tokenizer, test_problems, judge):
    """On a CPU too, since somebody asks for it: kernels of other rounding, and the same tokens."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except RuntimeError as error:
        pytest.skip(f"no compiler: {error}")
    counters.clear()
    options = {"assistant_model": draft, "judge": judge, "num_assistant_tokens": 8, "max_new_tokens": 200}
    for problem in test_problems[:4]:
        inputs = tokenizer(GSM8K().prompt(problem, tokenizer), return_tensors="pt", add_special_tokens=False)
        for threshold in (0.0, 0.2):
            expected = target.generate(**inputs, **options, judge_threshold=threshold, **GREEDY)
            compiled = target.generate(
                **inputs, **options, judge_threshold=threshold, compile_config=CompileConfig(dynamic=False), **STATIC
            )
            assert same(compiled, expected)
    # The target's, with hidden states and without, and the draft's for one token and for two.
    assert counters["stats"]["unique_graphs"] == 4
    torch._dynamo.reset()


def test_a_judge_of_states_reads_the_same_ones_compiled(compiled, linear_judge):
    """Of models that never gave any: what collects states is installed by the first pass that does, uncompiled."""
    both = AutoJudge.from_config(
        JudgeConfig(hidden_size=32, assistant_hidden_size=32, state_position="both", logit_features=True)
    )
    torch.manual_seed(1)
    both.load_state_dict({"weight": torch.randn(132) / 8, "bias": torch.zeros(1)})
    for judge in (linear_judge, both):
        model = random_llama(0)
        options = {"assistant_model": similar_model(model), "judge": judge, "judge_threshold": 0.5}
        options |= {**left_padded(PROMPTS), "max_new_tokens": 40}
        output, expected = (model.generate(**options, **decoding) for decoding in (compiled, GREEDY))
        assert expected.num_judge_accepted.sum() > 0 and expected.num_judge_rejected.sum() > 0
        assert same(output, expected)


def test_hidden_states_are_returned_compiled(compiled, top_k):
    """Of a model that never gave any, behind a call that has compiled it without."""
    model = random_llama(0)
    options = {"assistant_model": similar_model(model), "judge": top_k, "judge_threshold": 0.2, "max_new_tokens": 20}
    model.generate(PROMPT, **options, **compiled)
    options["output_hidden_states"] = True
    output, expected = (model.generate(PROMPT, **options, **decoding) for decoding in (compiled, GREEDY))
    assert same(output, expected) and len(output.hidden_states) == 20
    for one, other in zip(output.hidden_states, expected.hidden_states):
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(one, other))


def test_adaptive_lengths_have_few_shapes(compiled, top_k):
    model = random_llama(max_position_embeddings=1024)
    options = {"assistant_model": similar_model(model), "judge": top_k, "judge_threshold": 0.0}
    options |= {"num_assistant_tokens": "adaptive", "max_new_tokens": 200}
    output = model.generate(PROMPT, **options, **compiled)
    assert torch.equal(output.sequences, model.generate(PROMPT, do_sample=False, max_new_tokens=200))
    assert counters["stats"]["unique_graphs"] <= 2 + 6


@pytest.mark.parametrize("length", [1, 200, 223, 224, 255, 256, 257])
def test_room_for_the_widest_forward_behind_the_longest_text(length):
    model = random_llama(0)
    cache = take_fixed_cache(1, GenerationConfig(), model, length, [2, 9, 33])
    assert length + 33 <= cache.max_length < length + 33 + 256


def test_room_for_the_longest_call_that_is_to_come(compiled, top_k):
    """`max_cache_len` is the length of a text, and no text up to it is compiled anew."""
    model = random_llama(max_position_embeddings=1024)
    options = {"assistant_model": similar_model(model), "judge": top_k, "judge_threshold": 0.0, **compiled}
    for longest in (None, 511):
        options["max_cache_len"] = longest
        first = model.generate(PROMPT, max_new_tokens=60, **options)
        graphs = counters["stats"]["unique_graphs"]
        second = model.generate(PROMPT, max_new_tokens=511 - PROMPT.shape[1], **options)
        assert (second[CACHE_NAME] is first[CACHE_NAME]) == (longest is not None)
        assert (counters["stats"]["unique_graphs"] == graphs) == (longest is not None)
        kept_caches.clear()
        torch._dynamo.reset()


def test_up_to_the_edge_of_the_allocation(random_pair, top_k):
    """Every length around the one that the allocation was made for, of a model with positions for no more."""
    model = random_llama(max_position_embeddings=252)
    options = {"assistant_model": similar_model(model), "judge": top_k, "judge_threshold": 0.0}
    lengths = []
    for num_tokens in (210, 238, 245, 251, 252):
        prompt = torch.arange(num_tokens - 8)[None] % 32
        expected = model.generate(prompt, do_sample=False, max_new_tokens=8)
        output = model.generate(prompt, **options, num_assistant_tokens=4, max_new_tokens=8, **STATIC)
        assert torch.equal(output.sequences, expected)
        lengths.append(kept_caches[model][-1].max_length)
    assert lengths == [256, 256, 256, 256, 512]


@pytest.mark.parametrize(
    "positions, assistant_positions, lengths, max_new_tokens",
    [(252, 252, [244], 16), (2048, 200, [190], 100), (200, 200, [7, 150], 70), (2048, 2048, [194, 6, 50], 60)],
    ids=["past the positions", "past the assistant's", "padding past the positions", "rows far apart"],
)
def test_room_for_every_text(top_k, positions, assistant_positions, lengths, max_new_tokens):
    """Behind its last position a model goes on, without drafts; a row with no room drafts as far as the others."""
    model = random_llama(max_position_embeddings=positions)
    assistant = similar_model(model)
    assistant.config.max_position_embeddings = assistant_positions
    torch.manual_seed(2)
    inputs = left_padded([torch.randint(1, 32, (n,)).tolist() for n in lengths])
    options = {"assistant_model": assistant, "judge": top_k, "max_new_tokens": max_new_tokens}
    options["num_assistant_tokens"] = 24
    for threshold in (0.0, 0.3, 0.6):
        expected = model.generate(**inputs, **options, judge_threshold=threshold, **GREEDY)
        assert same(model.generate(**inputs, **options, judge_threshold=threshold, **STATIC), expected)


@pytest.mark.parametrize("assistant_size", [24, 40])
def test_vocabularies_padded_to_other_sizes(top_k, compiled, assistant_size):
    """Tokens that the assistant lacks, and ones that only it has: drafts are the same as with growing caches."""
    model = random_llama()
    assistant = similar_model(model)
    assistant.resize_token_embeddings(assistant_size, mean_resizing=False)
    if assistant_size > 32:  # what the target lacks would be the assistant's choice, again and again
        assistant.get_output_embeddings().weight.data[32:] = 50.0 * assistant.get_output_embeddings().weight.data[:8]
    options = {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.3, "max_new_tokens": 40}
    for inputs in ({"input_ids": PROMPT}, left_padded(PROMPTS)):
        expected = model.generate(**inputs, **options, **GREEDY)
        assert 0 < expected.num_matches.sum() < expected.num_candidates.sum()
        assert same(model.generate(**inputs, **options, **compiled), expected)


def test_what_surrounds_a_call_may_change(random_pair, top_k):
    model, assistant = random_pair
    options = {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0, "max_new_tokens": 20}
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=20)
    for surroundings in (
        torch.inference_mode(),
        contextlib.nullcontext(),
        torch.autocast("cpu", torch.bfloat16),
        contextlib.nullcontext(),
    ):
        with surroundings:
            output = model.generate(PROMPT, **options, **STATIC)
        if not isinstance(surroundings, torch.autocast):
            assert torch.equal(output.sequences, expected)


def test_sampling_draws_the_same(random_pair, top_k):
    model, assistant = random_pair
    options = {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.6, "max_new_tokens": 40}
    texts = []
    for decoding in (GREEDY, STATIC):
        torch.manual_seed(3)
        texts.append(model.generate(**left_padded(PROMPTS), **options, **{**decoding, "do_sample": True}))
    assert same(*texts)


def test_what_a_former_call_left_is_gone(random_pair, top_k):
    """Even what isn't finite, which no mask hides: nothing times NaN is NaN."""
    model, assistant = random_pair
    options = {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0, "max_new_tokens": 20}
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=20)
    model.generate(PROMPT, **options, **STATIC)
    for layer in kept_caches[model][-1].layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    assert torch.equal(model.generate(PROMPT, **options, **STATIC).sequences, expected)


def test_prompt_lookup_and_kept_outputs(random_pair, top_k):
    model, _ = random_pair
    prompt = torch.tensor([[3, 14, 15, 9, 3, 14, 15, 9, 3, 14]])
    options = {"judge": top_k, "judge_threshold": 0.0, "max_new_tokens": 30, "prompt_lookup_num_tokens": 4}
    options |= {"output_scores": True, "output_hidden_states": True}
    expected, output = (model.generate(prompt, **options, **decoding) for decoding in (GREEDY, STATIC))
    assert same(output, expected) and output.num_candidates > 0
    for name in ("scores", "hidden_states"):
        for one, other in zip(getattr(output, name), getattr(expected, name)):
            one, other = (x if isinstance(x, tuple) else (x,) for x in (one, other))
            assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(one, other))


def test_threads_have_allocations_of_their_own(random_pair, top_k):
    model, assistant = random_pair
    options = {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0, "max_new_tokens": 60}
    prompts = [torch.tensor([prompt]) for prompt in PROMPTS]
    expected = [model.generate(prompt, do_sample=False, max_new_tokens=60) for prompt in prompts]
    results = [None] * len(prompts)

    def decode(i):
        results[i] = model.generate(prompts[i], **options, **STATIC).sequences

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, text) for result, text in zip(results, expected))


def test_a_model_that_has_changed_its_dtype(top_k):
    """The former allocation isn't for it."""
    model = random_llama()
    for dtype in (torch.float32, torch.float64, torch.float32):
        model = model.to(dtype)
        options = {"assistant_model": similar_model(model), "judge": top_k, "judge_threshold": 0.0}
        expected = model.generate(PROMPT, **options, max_new_tokens=20, **GREEDY)
        assert same(model.generate(PROMPT, **options, max_new_tokens=20, **STATIC), expected)
        assert [cache.layers[0].keys.dtype for cache in kept_caches[model]] == [dtype]


def test_kept_memory_goes_with_the_model(top_k):
    model = random_llama()
    model.generate(PROMPT, assistant_model=similar_model(model), judge=top_k, max_new_tokens=4, **STATIC)
    kept, model = weakref.ref(kept_caches[model][-1]), None
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("reason", ["'mine' kernels", "several devices"])
def test_whose_forwards_have_no_fixed_shape(top_k, caplog, reason):
    """Kernels that may take a mask to end with the newest token, and parts whose tensors lie elsewhere."""
    model = random_llama(0)
    assistant = similar_model(model)
    if reason == "several devices":
        model.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    else:
        AttentionInterface.register("mine", sdpa_attention_forward)
        AttentionMaskInterface.register("mine", sdpa_mask)
        model.set_attn_implementation("mine")
    warn_once.cache_clear()
    options = {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.2, "max_new_tokens": 20}
    expected = model.generate(PROMPT, **options, **GREEDY)
    assert same(model.generate(PROMPT, **options, **STATIC), expected)
    assert model not in kept_caches and assistant in kept_caches
    assert len(caplog.records) == 1 and re.search(f"LlamaForCausalLM .*{reason}.* gets a growing one", caplog.text)


def test_refused(random_pair, top_k):
    model, assistant = random_pair
    with pytest.raises(ValueError, match="cache_implementation='static'. with .assistant_early_exit"):
        model.generate(PROMPT, judge=top_k, assistant_early_exit=1, max_new_tokens=4, **STATIC)
    output = model.generate(PROMPT, judge=top_k, assistant_model=assistant, max_new_tokens=4, **STATIC)
    # The next call writes into it. Without a judge, stock `generate` would read nonsense.
    with pytest.raises(ValueError, match="can't be continued from"):
        model.generate(output.sequences, max_new_tokens=4, do_sample=False, **{CACHE_NAME: output[CACHE_NAME]})
    with pytest.raises(ValueError, match="the cache FixedCache"):
        model.generate(
            output.sequences,
            judge=top_k,
            assistant_model=assistant,
            max_new_tokens=4,
            do_sample=False,
            **{CACHE_NAME: output[CACHE_NAME]},
        )
