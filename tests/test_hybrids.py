# SPDX-License-Identifier: Apache-2.0
"""Hybrid models, whose states can't be taken back token by token: what they write is the same, and no row is lost."""

import functools
import gc
import itertools
import weakref

import pytest
import reference
import torch
from conftest import PROMPT, random_llama, scaled_up, similar_model
from drafter_oracles import check_lossless, drafts_of_a_judged_call
from test_dflash import BLOCK, WINDOW, assistant_of, stock_draft
from test_evaluation import EvenLength
from test_mining import EXAMPLES, LastTokens, NumberTokenizer, assert_same, found, mine_random
from test_ways_to_call import GoneError, Listener
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

import autojudge_hf.caches
import autojudge_hf.generation
from autojudge_hf import AutoJudge, JudgeConfig, compute_features, evaluate_judge, judge_decoding
from autojudge_hf.candidate_generator import JudgeCandidateGenerator
from autojudge_hf.dflash import DFlashCandidateGenerator
from autojudge_hf.model_properties import CACHE_NAME, WITH_STATES
from autojudge_hf.prefixes import prefixes_of
from autojudge_hf.rows import Rows
from autojudge_hf.state_copies import StateCopies


SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,  # any token may be written
    "bos_token_id": 0,
    "eos_token_id": None,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
LATENT = {
    **EXPERTS,
    "num_local_experts": 4,
    "layer_types": LINEAR["layer_types"],
    "mlp_layer_types": ["dense", "sparse", "dense"],
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
FAMILIES = {
    "qwen3_next": {**LINEAR, **EXPERTS},
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": {**LINEAR, **EXPERTS},
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": {**CONVOLUTIONS, **EXPERTS, "num_dense_layers": 1},
    "olmo_hybrid": LINEAR,
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 0,
        "shared_intermediate_size": 32,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "nemotron_h": {
        **EXPERTS,
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
        "num_hidden_layers": 4,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "mamba_n_groups": 1},
    "kimi_linear": {**LATENT, "linear_head_dim": 8, "linear_num_heads": 4},
    "bailing_hybrid": {**LATENT, "n_group": 1, "topk_group": 1},
    "lfm3": CONVOLUTIONS,
    "lara_mini": {
        **LINEAR,
        **EXPERTS,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "sliding_attention"],
        "sliding_window": 8,
    },
    "zaya": {},
    "zamba2": {
        **MAMBA,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_key_value_heads": 4,
    },
}
LOSSLESS = {"do_sample": False, "judge_threshold": 0.0, "max_new_tokens": 100, "num_assistant_tokens": 4}


def hybrid(family, seed=1, **sizes):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **sizes})
    model = scaled_up(AutoModelForCausalLM.from_config(config).eval())
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    if request.param not in CONFIG_MAPPING:
        pytest.skip("younger than the transformers installed here")
    return request.param


@pytest.fixture(scope="module")
def qwen():
    model = hybrid("qwen3_5_text")
    return model, similar_model(model)


def test_every_family_that_is_let_in_is_tested():
    assert set(FAMILIES) == set(WITH_STATES)


def test_tokens_are_those_of_greedy_decoding(family, top_k):
    """With an assistant that keeps a state, too, with one that is hardly ever right, and with one that keeps none."""
    model = hybrid(family)
    expected = reference.greedy(model, PROMPT[0].tolist(), 100, ())
    widths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    options = {"judge": top_k, "return_dict_in_generate": True, **LOSSLESS}
    for assistant in (similar_model(model), hybrid(family, seed=2), random_llama()):
        widths.clear()
        output = model.generate(PROMPT, assistant_model=assistant, **options)
        assert output.sequences[0].tolist() == expected
        assert 0 <= output.num_matches < output.num_candidates
        assert max(widths) <= autojudge_hf.generation.LONGEST_REREAD + 1 + 4
    hook.remove()
    # The last two were wrong so often that cycles without a draft had to come in between.
    assert output.num_candidates < 4 * output.num_target_forwards - 3


def test_judged_as_the_reference_is(family, monkeypatch):
    """By the target's states, cycle by cycle; what was taken back is read again each time."""
    monkeypatch.setattr(autojudge_hf.generation, "LONGEST_REREAD", 1000)
    model = hybrid(family)
    assistant = similar_model(model, noise=0.1)
    torch.manual_seed(0)
    with torch.no_grad():
        states = model(PROMPT, output_hidden_states=True).hidden_states[-1][0]
    weight = torch.randn(32)
    tensors = {"weight": weight, "bias": -(states @ weight).median()[None]}
    judge = AutoJudge.from_config(JudgeConfig(hidden_size=32))
    judge.load_state_dict(tensors)
    output = model.generate(
        PROMPT,
        assistant_model=assistant,
        judge=judge,
        return_dict_in_generate=True,
        **{**LOSSLESS, "judge_threshold": 0.5},
    )
    expected, counts = reference.judged(model, assistant, PROMPT[0].tolist(), 100, (), 4, *tensors.values(), 0.5)
    assert output.sequences[0].tolist() == expected
    assert (output.num_matches, output.num_judge_accepted, output.num_judge_rejected) == counts
    assert output.num_judge_accepted > 0 and output.num_judge_rejected > 0


def test_a_target_without_a_state_and_an_assistant_with_one(top_k):
    model = random_llama()
    for assistant in (hybrid("qwen3_5_text"), hybrid("lfm2")):
        for more in ({}, {"cache_implementation": "static"}):
            got = model.generate(PROMPT, assistant_model=assistant, judge=top_k, **LOSSLESS, **more)
            assert got[0].tolist() == reference.greedy(model, PROMPT[0].tolist(), 100, ())


@pytest.mark.parametrize(
    "more",
    [
        {"num_assistant_tokens": 1},
        {"num_assistant_tokens": 16},
        {"num_assistant_tokens": "adaptive"},
        {"prefill_chunk_size": 2},
        {"cache_implementation": "static"},
        {"repetition_penalty": 1.3},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
    ],
)
def test_however_it_is_called(qwen, top_k, more):
    model, assistant = qwen
    options = {**LOSSLESS, **more}
    got = model.generate(PROMPT, assistant_model=assistant, judge=top_k, **options)
    plain = {name: options[name] for name in ("max_new_tokens", "repetition_penalty") if name in options}
    assert torch.equal(got, model.generate(PROMPT, do_sample=False, **plain))


def test_without_a_judge(qwen):
    """The assistant is the loop's alone: `generate` refuses it to such models."""
    model, assistant = qwen
    loop = functools.partial(judge_decoding, assistant_model=assistant)
    got = model.generate(PROMPT, custom_generate=loop, do_sample=False, max_new_tokens=50)
    assert torch.equal(got, model.generate(PROMPT, do_sample=False, max_new_tokens=50))
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(PROMPT, assistant_model=assistant, max_new_tokens=5)


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"])
@pytest.mark.parametrize("where", ["call", "config", "model", "model, beside a config"])
def test_prompt_lookup(family, where, top_k):
    """Whoever asks for it: `generate` refuses it to models that it calls stateful."""
    model, prompt = hybrid(family), PROMPT.repeat(1, 3)
    options = {**LOSSLESS, "return_dict_in_generate": True}
    expected = model.generate(prompt, do_sample=False, max_new_tokens=100)
    if where == "call":
        options["prompt_lookup_num_tokens"] = 3
    elif where == "config":
        options["generation_config"] = GenerationConfig(prompt_lookup_num_tokens=3)
    else:
        model.generation_config.prompt_lookup_num_tokens = 3
        options |= {"generation_config": GenerationConfig(use_mtp=False)} if "beside" in where else {}
    output = model.generate(prompt, judge=top_k, **options)
    assert torch.equal(output.sequences, expected)
    assert output.num_matches > 0


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "falcon_h1"])
def test_assistants_that_read_states(family, top_k, monkeypatch):
    """DFlash drafts what it does behind a plain pass over the text, be it of states that were read again."""
    monkeypatch.setattr(autojudge_hf.generation, "LONGEST_REREAD", 8)
    model = hybrid(family, vocab_size=16)
    pair = model, assistant_of()
    drafts = drafts_of_a_judged_call(monkeypatch, DFlashCandidateGenerator, pair, top_k, 1, WINDOW)
    assert {len(candidates) for _, candidates in drafts} >= {0, BLOCK - 1}
    for text, candidates in drafts:
        assert candidates == stock_draft(*pair, text, 1.0)[: len(candidates)]
    check_lossless(pair, top_k, 1)


def test_hidden_states_are_those_of_plain_decoding(qwen, top_k):
    model, assistant = qwen
    options = {"max_new_tokens": 40, "do_sample": False, "output_hidden_states": True, "return_dict_in_generate": True}
    plain = model.generate(PROMPT, **options)
    ours = model.generate(PROMPT, assistant_model=assistant, judge=top_k, **{**LOSSLESS, **options})
    assert torch.equal(ours.sequences, plain.sequences) and ours.num_matches < ours.num_candidates
    for at_token, expected in zip(ours.hidden_states, plain.hidden_states, strict=True):
        for layer, of_plain in zip(at_token, expected, strict=True):
            torch.testing.assert_close(layer, of_plain, atol=1e-3, rtol=1e-3)


def test_sampling_draws_from_the_target(qwen, top_k):
    model, assistant = qwen
    options = {"do_sample": True, "top_k": 0, "temperature": 2.0, "max_new_tokens": 3, "num_assistant_tokens": 2}
    torch.manual_seed(0)
    drawn = torch.zeros(32, dtype=torch.long)
    for _ in range(800):
        text = model.generate(PROMPT, assistant_model=assistant, judge=top_k, judge_threshold=0.0, **options)
        drawn[text[0, 8]] += 1
    with torch.no_grad():
        p_first = (model(PROMPT).logits[0, -1] / 2).softmax(-1)
        texts = torch.cat([PROMPT.repeat(32, 1), torch.arange(32)[:, None]], dim=1)
        p_second = (model(texts).logits[:, -1] / 2).softmax(-1)
    assert reference.chi_square_p(drawn, p_first @ p_second) > reference.NOT_CHANCE


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "falcon_h1", "lara_mini"], indirect=True)
@pytest.mark.parametrize("judge_threshold", [0.0, 0.8])
def test_a_cache_can_be_gone_on_with(family, top_k, judge_threshold):
    """By us, and by `generate` itself; it holds the whole text but the newest token, or less."""
    model = hybrid(family)
    options = {"assistant_model": similar_model(model), "judge": top_k, **LOSSLESS, "max_new_tokens": 20}
    options |= {"judge_threshold": judge_threshold, "return_dict_in_generate": True}
    first = model.generate(PROMPT, **options)
    text = torch.cat([first.sequences, PROMPT], dim=1)
    expected = model.generate(text, do_sample=False, max_new_tokens=20)
    cache = first[CACHE_NAME]
    assert type(cache) is DynamicCache and PROMPT.shape[1] <= cache.get_seq_length() < first.sequences.shape[1]
    assert "_state_copies" not in vars(cache)
    options["judge_threshold"] = 0.0
    second = model.generate(text, **{CACHE_NAME: cache}, **options)
    assert torch.equal(second.sequences, expected)
    text = torch.cat([expected, PROMPT], dim=1)
    expected = model.generate(text, do_sample=False, max_new_tokens=20)
    cache = second[CACHE_NAME]
    assert torch.equal(model.generate(text, do_sample=False, max_new_tokens=20, **{CACHE_NAME: cache}), expected)


@pytest.mark.parametrize("leaves_at", [2, 3, 4, 6])
def test_a_call_that_is_broken_off_leaves_what_was_heard(qwen, top_k, leaves_at):
    model, assistant = qwen
    cache, listener = DynamicCache(config=model.config), Listener(leaves_at)
    options = {"assistant_model": assistant, "judge": top_k, **LOSSLESS, "max_new_tokens": 40}
    with pytest.raises(GoneError):
        model.generate(PROMPT, streamer=listener, **{CACHE_NAME: cache}, **options)
    assert cache.get_seq_length() <= 7 + len(listener.heard)
    text = torch.cat([PROMPT, torch.tensor([[*listener.heard, 7, 8, 9, 1, 2]])], dim=1)
    expected = model.generate(text, do_sample=False, max_new_tokens=40)
    assert torch.equal(model.generate(text, **{CACHE_NAME: cache}, **options), expected)


def broken_at(last, method):
    calls = itertools.count(1)

    def broken(*args):
        if next(calls) == last:
            raise GoneError
        return method(*args)

    return broken


@pytest.mark.parametrize("name", ["rewind", "keep"])
@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"])
def test_a_call_that_is_broken_off_while_it_copies(family, name, top_k, monkeypatch):
    """What it leaves is of one piece, for stock `generate` as well, wherever that was."""
    model = hybrid(family)
    owner = {"rewind": JudgeCandidateGenerator, "keep": StateCopies}[name]
    options = {"assistant_model": similar_model(model), "judge": top_k, **LOSSLESS, "max_new_tokens": 40}
    plain = {"do_sample": False, "max_new_tokens": 20}
    # The cache has some of what is written here, or nothing.
    text = model.generate(PROMPT, do_sample=False, max_new_tokens=45)
    expected, lengths = model.generate(text, **plain), set()
    for last in range(1, 9):
        for more in (plain, {**options, **plain}):
            cache = DynamicCache(config=model.config)
            with monkeypatch.context() as patch, pytest.raises(GoneError):
                patch.setattr(owner, name, broken_at(last, getattr(owner, name)))
                model.generate(PROMPT, **{CACHE_NAME: cache}, **options)
            assert {type(layer) for layer in cache.layers} == {DynamicLayer, LinearAttentionLayer}
            lengths.add(cache.get_seq_length())
            assert torch.equal(model.generate(text, **{CACHE_NAME: cache}, **more), expected), last
    assert len(lengths) > 1


@pytest.mark.parametrize("drafter", ["assistant", "prompt"])
@pytest.mark.parametrize("prompt", [PROMPT.repeat(1, 2), PROMPT[:, :1]])
def test_a_cache_that_stock_assisted_generation_returned(drafter, prompt, top_k):
    """Its convolutions hold more than they need, or less."""
    model = hybrid("lfm2")
    assistant = similar_model(model)
    options = {"prompt_lookup_num_tokens": 3} if drafter == "prompt" else {"assistant_model": assistant}
    options["max_new_tokens"] = 20 if prompt.shape[1] > 1 else 1
    first = model.generate(prompt, do_sample=False, return_dict_in_generate=True, **options)
    text = torch.cat([first.sequences, PROMPT], dim=1)
    expected = model.generate(text, do_sample=False, max_new_tokens=100)
    cache = {CACHE_NAME: first[CACHE_NAME]}
    assert torch.equal(model.generate(text, assistant_model=assistant, judge=top_k, **cache, **LOSSLESS), expected)


def test_a_call_that_is_broken_off_within_a_copy(qwen, top_k, monkeypatch):
    """Some states are the newer ones then."""
    model, assistant = qwen
    options = {"assistant_model": assistant, "judge": top_k, **LOSSLESS, "max_new_tokens": 40}
    text = model.generate(PROMPT, do_sample=False, max_new_tokens=45)
    expected = model.generate(text, do_sample=False, max_new_tokens=20)
    states = StateCopies._states
    for last in range(1, 8):
        points = iter([False] * last + [True])

        def broken(self, points=points):
            for n, of_layer in enumerate(states(self)):
                if n == 1 and next(points, False):
                    raise GoneError
                yield of_layer

        cache = DynamicCache(config=model.config)
        with monkeypatch.context() as patch, pytest.raises(GoneError):
            patch.setattr(StateCopies, "_states", broken)
            model.generate(PROMPT, **{CACHE_NAME: cache}, **options)
        got = model.generate(text, do_sample=False, max_new_tokens=20, **{CACHE_NAME: cache})
        assert torch.equal(got, expected)


@pytest.mark.parametrize("judge_threshold", [0.0, 0.9])
def test_a_cache_never_holds_what_was_not_committed(qwen, top_k, judge_threshold, monkeypatch):
    """Broken off right behind a whole draft, when the copies are of more than the text."""
    model, assistant = qwen
    options = {**LOSSLESS, "assistant_model": assistant, "judge": top_k, "judge_threshold": judge_threshold}
    for last in range(1, 6):
        cache, heard = DynamicCache(config=model.config), Listener(leaves_at=100)
        with monkeypatch.context() as patch, pytest.raises(GoneError):
            patch.setattr(Rows, "commit", broken_at(last, Rows.commit))
            model.generate(PROMPT, streamer=heard, **{CACHE_NAME: cache}, **options)
        committed = PROMPT.shape[1] + len(heard.heard)
        assert cache.get_seq_length() < committed
        assert cache.get_seq_length() == 0 or last > 1


def test_caches_are_freed_at_once(qwen, top_k):
    """They hold a model's largest tensors but weights: nobody should have to wait for Python's collector."""
    model, assistant = qwen
    alive, rewindable = [], autojudge_hf.caches.make_rewindable

    def make_rewindable(cache):
        alive.append(weakref.ref(cache))
        rewindable(cache)

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(autojudge_hf.caches, "make_rewindable", make_rewindable)
            patch.setattr(autojudge_hf.generation, "make_rewindable", make_rewindable)
            model.generate(PROMPT, assistant_model=assistant, judge=top_k, **LOSSLESS)
            prefixes = prefixes_of(model)
            for length in range(20, 30):
                prefixes.run({0: draw(length)}, num_last=2)
        assert len(alive) >= 12 and sum(cache() is not None for cache in alive) <= 1
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1"])
def test_a_call_that_fails_at_once_leaves_nothing(family, top_k):
    model = hybrid(family)
    assistant = similar_model(model)
    cache = DynamicCache(config=model.config)
    options = {"assistant_model": assistant, "judge": top_k, **LOSSLESS}

    def fail(*_):
        raise GoneError

    hook = model.model.layers[-1].register_forward_hook(fail)
    with pytest.raises(GoneError):
        model.generate(PROMPT, **{CACHE_NAME: cache}, **options)
    hook.remove()
    assert cache.get_seq_length() == 0
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=100)
    assert torch.equal(model.generate(PROMPT, **{CACHE_NAME: cache}, **options), expected)


def test_judges_are_measured(tokenizer, top_k):
    model = hybrid("qwen3_5_text", vocab_size=len(tokenizer))
    examples = [{"text": "A farmer has 12 cows.", "even": True}, {"text": "Four boxes hold", "even": False}]
    options = {"thresholds": [1.0], "max_new_tokens": 21, "num_assistant_tokens": 4}
    lossless, judged = evaluate_judge(model, similar_model(model), tokenizer, examples, EvenLength(), top_k, **options)
    for example, text in zip(examples, lossless["texts"]):
        ids = tokenizer(example["text"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        expected = model.generate(ids, do_sample=False, max_new_tokens=21)[0, ids.shape[1] :]
        assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert judged["num_target_forwards"] == [4, 4]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"input_ids": PROMPT.repeat(2, 1)}, "several prompts, or padding, for a model that keeps a state"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]])}, "several prompts, or padding, for a model that"),
        ({CACHE_NAME: DynamicCache()}, "a cache without the states that the model keeps"),
        ({"assistant_model": None, "assistant_early_exit": 1}, "`assistant_early_exit` for a model that keeps a"),
    ],
)
def test_what_is_refused(qwen, top_k, more, message):
    model, assistant = qwen
    call = {"input_ids": PROMPT, "assistant_model": assistant, "judge": top_k, **LOSSLESS, **more}
    hook = model.register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    with pytest.raises(ValueError, match=message):
        model.generate(**call)
    hook.remove()


MINED = EXAMPLES[:2]


def test_early_exit_is_not_mined_either(tmp_path):
    model = hybrid("qwen3_5_text")
    model.generation_config.assistant_early_exit = 2
    with pytest.raises(ValueError, match="`assistant_early_exit` for a model that keeps a state"):
        mine_random((model, None), MINED, output_dir=tmp_path / "mined")
    assert not (tmp_path / "mined").exists()


def assert_algorithm_1(pair, assert_features=True, **options):
    mined, task, expected = mine_random(pair, MINED, **options), LastTokens(MINED), []
    for i, example in enumerate(MINED):
        prompt = NumberTokenizer().encode(example["text"], False)
        rows = reference.algorithm_1(*pair, NumberTokenizer(), task, prompt, 24, ())
        expected += [(i, *row) for row in rows]
    assert [(row["example_id"], *f) for row, f in zip(mined, found(mined))] == expected
    assert len(expected) > 4
    for row in mined:
        text = torch.tensor([[*row["input_ids"], row["candidate_token_id"]]])
        with torch.no_grad():
            state = pair[0](text, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(torch.tensor(row["features"]), state, atol=1e-3, rtol=1e-3)
    return mined


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1"])
def test_algorithm_1(family):
    """With an assistant that keeps a state, too; features are those of a pass over the whole text."""
    model = hybrid(family)
    assert set(assert_algorithm_1((model, similar_model(model, noise=0.1)))["label"]) == {0, 1}


@pytest.mark.parametrize("which", [0, 1])
def test_algorithm_1_where_one_of_both_keeps_a_state(qwen, which):
    others = random_llama(), random_llama(seed=2)
    assert_algorithm_1((qwen[0], others[1]) if which == 0 else (others[0], qwen[1]))


def test_mining_is_the_same_whatever_is_in_flight_and_found_again(qwen):
    """Sampled at a temperature, with all features; then from tokens alone."""
    layout = {"assistant_states": True, "logit_features": True, "assistant_logit_features": True}
    options = {"temperature": 0.7, "state_position": "both", **layout}
    mined = mine_random(qwen, MINED, batch_size=5, **options)
    assert_same(mine_random(qwen, MINED, batch_size=1, **options), mined)
    tokens = mine_random(qwen, MINED, features_dtype=None, **options)
    assert_same(compute_features(tokens, *qwen, state_position="both", **layout), mined)


def draw(n, high=32):
    return torch.randint(high, (n,)).tolist()


def test_texts_go_on_from_copies(family):
    """Whatever becomes of a text: what a run returns is what a pass over the whole text does."""
    model = hybrid(family)  # and its seed
    prefixes, texts = prefixes_of(model), {0: draw(40), 1: draw(30)}
    for _ in range(12):
        for name, text in texts.items():
            cut, num_more, num_last = draw(3, high=8)
            texts[name] = [*text[: len(text) - cut], *draw(num_more + 1)]
        # The last one is shorter than what is asked for.
        wanted, num_last = {**texts, 2: draw(num_last + 1)}, num_last + 2
        outputs = prefixes.run(wanted, num_last, output_states=True)
        for row, text in enumerate(wanted.values()):
            with torch.no_grad():
                whole = model(torch.tensor([text]), output_hidden_states=True)
            for ours, theirs in ((outputs.logits, whole.logits), (outputs.states, whole.hidden_states[-1])):
                n = min(num_last, len(text))
                torch.testing.assert_close(ours[row, -n:], theirs[0, -n:], atol=1e-3, rtol=1e-3)


def test_what_did_not_change_is_not_read_again(qwen):
    """Where it changed in no more than the last tokens of the run before; a text that is shared stays what it was."""
    model, _ = qwen
    prefixes, widths = prefixes_of(model), []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    text, asked_before = draw(40), 40
    for asked in (3, 5, 1, 7, 7, 2):
        for name in (0, 1):
            prefixes.run({name: text}, num_last=asked)
            assert sum(widths) <= asked_before + 6
            widths.clear()
            prefixes.share(0, 1)
        text, asked_before = [*text[:-asked], *draw(asked + 6)], asked
    hook.remove()
