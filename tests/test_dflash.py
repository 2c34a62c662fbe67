# SPDX-License-Identifier: Apache-2.0
"""Assistants that draft a block at once from the target's states (DFlash): stock's drafts, and the target's tokens."""

import copy
import functools

import pytest
import torch
from accelerate import cpu_offload
from conftest import random_llama, scaled_up
from drafter_oracles import (
    MINED,
    OPTIONS,
    PROMPTS,
    check_lossless,
    check_mining,
    check_rows_alone,
    check_sampling,
    drafts_of_a_judged_call,
    drafts_of_stock,
)
from test_mining import assert_same, mine_random
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GenerationConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LogitsProcessorList,
    MuseGlimmerAssistantConfig,
    MuseGlimmerAssistantModel,
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)

from autojudge_hf import AutoJudge, JudgeConfig, compute_features, judge_decoding
from autojudge_hf.dflash import DFlashCandidateGenerator
from autojudge_hf.draft_length import AdaptiveDraftLength
from autojudge_hf.fixed_cache import FixedCache
from autojudge_hf.model_properties import CACHE_NAME, behind_head
from autojudge_hf.search import GumbelNoise


WINDOW = 8
BLOCK = 6


def assistant_of(seed=0, **overrides):
    torch.manual_seed(seed)
    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
        "block_size": BLOCK,
        "target_layer_ids": [0, 1],
        "mask_token_id": 2,
        **overrides,
    }
    return scaled_up(MuseGlimmerAssistantModel(MuseGlimmerAssistantConfig(**config)).eval())


def glimmer():
    """The family these assistants are made for, whose embeddings have a norm behind them that they go without."""
    torch.manual_seed(3)
    text = {
        "vocab_size": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": WINDOW,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": None,
    }
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MuseGlimmerConfig(text_config=text, vision_config=vision, image_token_id=15, video_token_id=15)
    model = MuseGlimmerForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return scaled_up(model)


@pytest.fixture(scope="module", params=["llama", "glimmer"])
def pair(request):
    return (random_llama(0, 16) if request.param == "llama" else glimmer()), assistant_of()


def stock_draft(model, assistant, tokens, penalty):
    """What transformers' own generator drafts behind a text, from one forward over all of it."""
    text = torch.tensor([tokens])
    generator = model._get_candidate_generator(
        generation_config=GenerationConfig(max_length=500, speculation_type="dflash"),
        input_ids=text,
        inputs_tensor=text,
        logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)]),
        model_kwargs={},
        assistant_model=assistant,
    )
    return drafts_of_stock(model, generator, tokens)


@pytest.mark.parametrize(
    ("num_rows", "more", "penalty"),
    [
        (1, {}, 1.0),
        (3, {}, 1.0),
        (3, {"num_assistant_tokens": "adaptive"}, 1.0),
        (1, {"repetition_penalty": 1.5}, 1.5),
    ],
)
def test_drafts_are_those_of_stock(pair, top_k, num_rows, more, penalty, monkeypatch):
    drafts = drafts_of_a_judged_call(monkeypatch, DFlashCandidateGenerator, pair, top_k, num_rows, WINDOW, **more)
    assert max(len(candidates) for _, candidates in drafts) == BLOCK - 1
    for text, candidates in drafts:
        assert candidates == stock_draft(*pair, text, penalty)[: len(candidates)]


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("num_assistant_tokens", [None, 1, 3, "adaptive"])
def test_lossless(pair, top_k, num_assistant_tokens, cache, num_rows):
    output = check_lossless(pair, top_k, num_rows, num_assistant_tokens=num_assistant_tokens, **cache)
    if num_rows == 1:
        assert isinstance(output[CACHE_NAME], FixedCache) == bool(cache)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("more", [{"repetition_penalty": 1.3}, {"output_hidden_states": True}])
def test_the_same_as_plain_decoding(pair, top_k, more, cache):
    target, assistant = pair
    options = {**OPTIONS, "assistant_model": assistant, "speculation_type": "dflash", "return_dict_in_generate": True}
    got = target.generate(torch.tensor(PROMPTS[:1]), judge=top_k, judge_threshold=0.0, **options, **more, **cache)
    options = {**OPTIONS, "return_dict_in_generate": True}
    expected = target.generate(torch.tensor(PROMPTS[:1]), **options, **more)
    assert torch.equal(got.sequences, expected.sequences)
    if "output_hidden_states" in more:
        for ours, its in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-4)


def test_a_block_costs_the_same_whatever_its_length(pair, top_k, monkeypatch):
    """So an adaptive length is told of no draft, only of cycles."""
    target, assistant = pair
    told = []
    monkeypatch.setattr(AdaptiveDraftLength, "update", lambda self, *args: told.append(args))
    options = {**OPTIONS, "assistant_model": assistant, "judge": top_k, "num_assistant_tokens": "adaptive"}
    target.generate(torch.tensor(PROMPTS[:1]), **options)
    assert all(draft == 0.0 < verify for *_, draft, verify in told[1:]) and len(told) > 2


def test_without_a_judge(pair):
    target, assistant = pair
    prompt = torch.tensor(PROMPTS[:1])
    loop = functools.partial(judge_decoding, assistant_model=assistant)
    options = {**OPTIONS, "assistant_model": assistant, "speculation_type": "dflash"}
    assert torch.equal(target.generate(prompt, custom_generate=loop, **options), target.generate(prompt, **OPTIONS))


def test_a_batch_gives_what_rows_give_alone(pair):
    check_rows_alone(pair)


def test_sampling_draws_from_the_target(pair, top_k):
    check_sampling(pair, top_k)


@pytest.mark.parametrize("family", ["llama", "glimmer", "cohere", "granite", "gemma2"])
def test_drafts_have_the_targets_scale(family):
    """What a head gives may be scaled or capped: a draft of other sharpness is sampled from, or judged, as another."""
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = {
        "llama": lambda: random_llama(0, 16),
        "glimmer": glimmer,
        "cohere": lambda: CohereForCausalLM(CohereConfig(logit_scale=0.3, **sizes)),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(logits_scaling=5.0, **sizes)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(head_dim=8, final_logit_softcapping=3.0, **sizes)),
    }[family]()
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model(torch.tensor(PROMPTS[:1])).logits
    hook.remove()
    torch.testing.assert_close(behind_head(model, seen[0]), logits)
    assert torch.equal(seen[0], logits) == (family == "llama")


@pytest.mark.parametrize(("dtype", "its_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_models_of_two_dtypes(top_k, dtype, its_dtype):
    target, assistant = random_llama(0, 16).to(dtype), assistant_of().to(its_dtype)
    options = {**OPTIONS, "max_new_tokens": 8, "judge": top_k, "assistant_model": assistant}
    output = target.generate(torch.tensor(PROMPTS[:1]), return_dict_in_generate=True, **options)
    assert output.num_candidates > 0


def test_an_offloaded_target(pair, top_k):
    target, assistant = pair
    options = {**OPTIONS, "judge": top_k, "judge_threshold": 0.0, "assistant_model": assistant}
    expected = target.generate(torch.tensor(PROMPTS[:1]), **options)
    offloaded = cpu_offload(copy.deepcopy(target), execution_device="cpu")
    if isinstance(target, MuseGlimmerForConditionalGeneration):
        with pytest.raises(ValueError, match="an offloaded target with a norm behind its embeddings"):
            offloaded.generate(torch.tensor(PROMPTS[:1]), **options)
    else:
        assert torch.equal(offloaded.generate(torch.tensor(PROMPTS[:1]), **options), expected)


def test_a_judge_may_read_what_the_assistant_thought(pair):
    target, assistant = pair
    judge = AutoJudge.from_config(JudgeConfig(judge_type="kl"))
    options = {**OPTIONS, "assistant_model": assistant, "judge": judge, "return_dict_in_generate": True}
    output = target.generate(torch.tensor(PROMPTS[:1]), judge_threshold=0.999, **options)
    assert output.num_judge_accepted.sum() > 0


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"judge": JudgeConfig(assistant_hidden_size=32)}, "of size 32, and MuseGlimmerAssistantModel has none"),
        ({"num_assistant_tokens": BLOCK}, "at most 5 for a MuseGlimmerAssistantModel, .* got 6"),
        ({"assistant_model": {"hidden_size": 48}}, "states of size 48, .* got LlamaForCausalLM with 32"),
        ({"assistant_model": {"target_layer_ids": [0, 2]}}, "more than 2 layers .* with 32, 2 layers"),
        ({"assistant_model": {"mask_token_id": 16}}, "a token 16, .* 16 tokens"),
        ({"assistant_model": {"target_layer_ids": []}}, "must have `target_layer_ids` .*, got \\[\\], 2 and 6"),
        ({"assistant_model": {"target_layer_ids": [-1, 0]}}, "of at least 0 .*, got \\[-1, 0\\], 2 and 6"),
        ({"assistant_model": {"mask_token_id": -1}}, "of at least 0 .*, got \\[0, 1\\], -1 and 6"),
        ({"assistant_model": {"block_size": 1}}, "`block_size` of at least 2, got \\[0, 1\\], 2 and 1"),
        ({"speculation_type": "other"}, "`speculation_type='other'` with this assistant"),
    ],
)
def test_what_cannot_work_is_refused(others, message, top_k):
    model, options = random_llama(0, 16), {"judge": top_k, "assistant_model": {}, **OPTIONS, **others}
    if isinstance(options["judge"], JudgeConfig):
        options["judge"] = AutoJudge.from_config(options["judge"])
    options["assistant_model"] = assistant_of(**options["assistant_model"])
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor(PROMPTS[:1]), **options)


def test_targets_whose_states_it_could_not_read_are_refused(top_k):
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    narrow = OPTForCausalLM(OPTConfig(hidden_size=32, ffn_dim=64, word_embed_proj_dim=16, **sizes)).eval()
    with pytest.raises(ValueError, match="states of size 32, .* got OPTForCausalLM with 16 and 32"):
        narrow.generate(torch.tensor(PROMPTS[:1]), judge=top_k, assistant_model=assistant_of(), **OPTIONS)
    sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    more = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 16, "laurel_rank": 4}
    config = Gemma3nTextConfig(**sizes, **more, num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0])
    with pytest.raises(ValueError, match="several streams"):
        Gemma3nForCausalLM(config).generate(
            torch.tensor(PROMPTS[:1]), judge=top_k, assistant_model=assistant_of(), **OPTIONS
        )


def test_dflash_needs_its_assistant(random_pair, top_k):
    model, assistant = random_pair
    options = {"judge": top_k, "assistant_model": assistant, "speculation_type": "dflash", **OPTIONS}
    with pytest.raises(ValueError, match="`speculation_type='dflash'` with this assistant"):
        model.generate(torch.tensor(PROMPTS[:1]), **options)


def test_an_earlier_calls_cache_lacks_the_states(top_k):
    model, cache = random_llama(0, 16), DynamicCache()
    text = torch.tensor(PROMPTS[:1])
    model(text[:, :-3], **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="a cache of an earlier call with a drafter that reads"):
        model.generate(text, judge=top_k, assistant_model=assistant_of(), **{CACHE_NAME: cache}, **OPTIONS)


def test_mining_asks_as_decoding_does(pair):
    num_assistant_tokens = 2 if isinstance(pair[0], LlamaForCausalLM) else None
    draft = functools.partial(stock_draft, *pair, penalty=1.0)
    check_mining(pair, draft, num_assistant_tokens or BLOCK - 1, num_assistant_tokens=num_assistant_tokens)


def test_sampled_mining_draws_with_one_noise():
    """Each of the draft's tokens is drawn with the noise of the text before it."""
    pair = random_llama(0, 16), assistant_of()

    def draft(text):
        generator = DFlashCandidateGenerator(*pair[::-1], do_sample=False, output_logits=False)
        states = pair[0](torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
        generator.rewind([1], None, states)
        noise, text = GumbelNoise(1.5, seed=0), torch.tensor([text])
        drafted, _ = generator.get_candidates(
            text, None, [BLOCK], lambda behind, x: noise(torch.cat([text, behind], dim=1), x[:, 0])[:, None]
        )
        return drafted[0, text.shape[1] :].tolist()

    check_mining(pair, draft, BLOCK - 1, temperature=1.5)


def test_what_mining_lacks_is_refused(pair, tmp_path):
    options = {"output_dir": tmp_path / "mined"}
    for more, message in (
        ({"assistant_states": True}, "Features of the assistant need one that reads the text"),
        ({"assistant_logit_features": True}, "Features of the assistant need one that reads the text"),
        ({"num_assistant_tokens": BLOCK}, f"at most {BLOCK - 1} for a MuseGlimmerAssistantModel"),
        ({"num_assistant_tokens": "adaptive"}, "of mining must be an int"),
    ):
        with pytest.raises(ValueError, match=message):
            mine_random(pair, MINED, **options, **more)
    with pytest.raises(ValueError, match="reads the states of the model it was made for"):
        mine_random((random_llama(hidden_size=64), pair[1]), MINED, **options)
    assert not (tmp_path / "mined").exists()
    tokens = mine_random(pair, MINED[:1], features_dtype=None)
    with pytest.raises(ValueError, match="one that reads the text, got MuseGlimmerAssistantModel"):
        compute_features(tokens, *pair)


def test_a_mined_folder_is_of_one_draft_length(pair, tmp_path):
    """It decides what can be a mismatch."""
    mined = mine_random(pair, MINED[:1], output_dir=tmp_path)
    assert_same(mine_random(pair, MINED[:1], output_dir=tmp_path, num_assistant_tokens=BLOCK - 1), mined)
    with pytest.raises(ValueError, match="num_assistant_tokens"):
        mine_random(pair, MINED[:1], output_dir=tmp_path, num_assistant_tokens=2)
