# SPDX-License-Identifier: Apache-2.0
"""Assistants that read the target's cache (Gemma 4's): the same drafts as stock, and the target's tokens."""

import functools

import pytest
import reference
import torch
from conftest import random_llama, scaled_up
from drafter_oracles import (
    OPTIONS,
    PROMPTS,
    check_lossless,
    check_rows_alone,
    check_sampling,
    drafts_of_a_judged_call,
)
from transformers import (
    DynamicCache,
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GenerationConfig,
    LogitsProcessorList,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from autojudge_hf import AutoJudge, JudgeConfig, judge_decoding, mine_mismatches
from autojudge_hf.model_properties import CACHE_NAME
from autojudge_hf.shared_cache import SharedCacheCandidateGenerator
from autojudge_hf.tasks import GSM8K


WINDOW = 8
KINDS = ["sliding_attention", "full_attention"]


def gemma(num_layers, num_shared, vocab_size=16, **overrides):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": WINDOW,
        "max_position_embeddings": 128,
        "eos_token_id": None,
    }
    return Gemma4TextConfig(
        vocab_size=vocab_size,
        num_hidden_layers=num_layers,
        num_kv_shared_layers=num_shared,
        layer_types=KINDS * (num_layers // 2),
        **{**sizes, **overrides},
    )


def assistant_of(hidden_size=32, seed=2, **options):
    torch.manual_seed(seed)
    text = gemma(2, 2, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
    config = Gemma4AssistantConfig(text_config=text, backbone_hidden_size=hidden_size, **options)
    model = scaled_up(Gemma4AssistantForCausalLM(config).eval())
    if model.masked_embedding is not None:
        model.masked_embedding.token_ordering.copy_(torch.randperm(16))
    return model


def target_of(num_shared, seed):
    torch.manual_seed(seed)
    config = gemma(4, num_shared, hidden_size_per_layer_input=8, vocab_size_per_layer_input=16)
    return scaled_up(Gemma4ForCausalLM(config).eval())


# Seeds whose texts vary.
@pytest.fixture(
    scope="module",
    params=[(0, 3, True), (2, 4, False)],
    ids=["all layers have keys, clustered head", "two layers share"],
)
def pair(request):
    num_shared, seed, clustered = request.param
    head = {"use_ordered_embeddings": clustered, "num_centroids": 4, "centroid_intermediate_top_k": 2}
    return target_of(num_shared, seed), assistant_of(**head)


def stock_draft(model, assistant, tokens, num_candidates):
    """What transformers' own generator drafts behind a text, from one forward over all of it."""
    text = torch.tensor([tokens])
    cache = DynamicCache(config=model.config)
    outputs = model(text[:, :-1], output_hidden_states=True, **{CACHE_NAME: cache})
    num_own = 4 - model.config.num_kv_shared_layers
    layers = dict(zip(KINDS, cache.layers[num_own - 2 : num_own]))
    assistant.generation_config.num_assistant_tokens = num_candidates
    kwargs = {"attention_mask": torch.ones_like(text)}
    generator = model._get_candidate_generator(
        generation_config=GenerationConfig(max_length=500, num_assistant_tokens=num_candidates),
        input_ids=text,
        inputs_tensor=text,
        logits_processor=LogitsProcessorList(),
        model_kwargs=kwargs,
        assistant_model=assistant,
    )
    # Of the last state alone: transformers 5.15 takes a prefill's first.
    given = CausalLMOutputWithPast(hidden_states=(outputs.hidden_states[-1][:, -1:],))
    given.shared_kv_states = {kind: (layer.keys, layer.values) for kind, layer in layers.items()}
    drafted, _ = generator.get_candidates(
        text, model_kwargs=kwargs, model_outputs=given, is_first_iteration=False, n_last_matches=0
    )
    return drafted[0, len(tokens) :].tolist()


@pytest.mark.parametrize("num_rows", [1, 3])
def test_drafts_are_those_of_stock(pair, top_k, num_rows, monkeypatch):
    options = {"num_assistant_tokens": 4}
    drafter = SharedCacheCandidateGenerator
    for text, candidates in drafts_of_a_judged_call(monkeypatch, drafter, pair, top_k, num_rows, WINDOW, **options):
        assert candidates == stock_draft(*pair, text, 4)[: len(candidates)]


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("num_assistant_tokens", [1, 5, "adaptive"])
def test_lossless(pair, top_k, num_assistant_tokens, num_rows):
    check_lossless(pair, top_k, num_rows, num_assistant_tokens=num_assistant_tokens)


def test_without_a_judge(pair):
    target, assistant = pair
    prompt = torch.tensor(PROMPTS[:1])
    loop = functools.partial(judge_decoding, assistant_model=assistant, num_assistant_tokens=3)
    output = target.generate(prompt, custom_generate=loop, assistant_model=assistant, **OPTIONS)
    assert torch.equal(output, target.generate(prompt, **OPTIONS))


def test_a_batch_gives_what_rows_give_alone(pair):
    check_rows_alone(pair, num_assistant_tokens=4)


def test_a_conversation_goes_on_from_its_cache(pair, top_k):
    target, assistant = pair
    options = {**OPTIONS, "assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0}
    first = target.generate(torch.tensor(PROMPTS[:1]), return_dict_in_generate=True, **options)
    longer = torch.cat([first.sequences, torch.tensor([[4, 5, 6]])], dim=1)
    second = target.generate(longer, **{CACHE_NAME: first[CACHE_NAME]}, **options)
    assert second[0].tolist() == reference.greedy(target, longer[0].tolist(), OPTIONS["max_new_tokens"], ())


def test_sampling_draws_from_the_target(pair, top_k):
    check_sampling(pair, top_k)


def test_a_judge_may_read_what_the_assistant_thought(pair):
    target, assistant = pair
    judge = AutoJudge.from_config(JudgeConfig(judge_type="kl"))
    options = {**OPTIONS, "assistant_model": assistant, "judge": judge, "return_dict_in_generate": True}
    output = target.generate(torch.tensor(PROMPTS[:1]), judge_threshold=0.999, num_assistant_tokens=4, **options)
    assert output.num_judge_accepted.sum() > 0


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"cache_implementation": "static"}, "'static'` with an assistant that reads the target's cache"),
        ({"judge": JudgeConfig(assistant_hidden_size=32)}, "of size 32, and Gemma4AssistantForCausalLM has none"),
        ({"assistant_model": 48}, "expected a target of the Gemma 4 family with states of size 48, got .* with 32"),
    ],
)
def test_what_cannot_work_is_refused(others, message, top_k):
    model, options = target_of(0, 3), {"judge": top_k, "assistant_model": assistant_of(), **OPTIONS, **others}
    if isinstance(options["judge"], JudgeConfig):
        options["judge"] = AutoJudge.from_config(options["judge"])
    if isinstance(options["assistant_model"], int):
        options["assistant_model"] = assistant_of(hidden_size=48)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor(PROMPTS[:1]), **options)


def test_another_familys_target_is_refused(top_k):
    with pytest.raises(ValueError, match="of size 32, got LlamaForCausalLM with 32"):
        random_llama().generate(torch.tensor(PROMPTS[:1]), judge=top_k, assistant_model=assistant_of(), **OPTIONS)


def test_an_assistant_is_no_target(top_k):
    with pytest.raises(ValueError, match="assistants without a cache of their own as targets"):
        assistant_of().generate(torch.tensor(PROMPTS[:1]), judge=top_k, assistant_model=target_of(0, 3), **OPTIONS)


def test_mining_asks_for_an_assistant_that_reads_text(tokenizer):
    with pytest.raises(ValueError, match="Mine with an assistant that reads the text"):
        mine_mismatches(
            target_of(0, 3), assistant_of(), tokenizer, [{"question": "?"}], GSM8K(), max_new_tokens=8, batch_size=1
        )
