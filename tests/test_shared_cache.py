# SPDX-License-Identifier: Apache-2.0
"""Assistants that read the target's cache (Gemma 4's): the same drafts as stock, and the target's tokens."""

import functools

import pytest
import reference
import torch
from conftest import left_padded, random_llama, scaled_up
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
PROMPTS = [[3, 14, 15, 9, 2, 6, 5, 3, 5, 8, 9], [2, 7, 1], [8, 2, 8, 1, 8, 2, 8]]
OPTIONS = {"do_sample": False, "max_new_tokens": 40}


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
    """At every cycle, within the window and beyond it, behind rejected candidates and accepted ones."""
    target, assistant = pair
    drafts, get_candidates = [], SharedCacheCandidateGenerator.get_candidates

    def seen(self, input_ids, attention_mask=None, *args):
        sequence, logits = get_candidates(self, input_ids, attention_mask, *args)
        for row, mask in zip(sequence, [None] * num_rows if attention_mask is None else attention_mask):
            first = 0 if mask is None else int((mask == 0).sum())
            drafts.append((row[first : input_ids.shape[1]].tolist(), row[input_ids.shape[1] :].tolist()))
        return sequence, logits

    monkeypatch.setattr(SharedCacheCandidateGenerator, "get_candidates", seen)
    output = target.generate(
        **left_padded(PROMPTS[:num_rows]),
        assistant_model=assistant,
        judge=top_k,
        judge_threshold=0.9,
        num_assistant_tokens=4,
        return_dict_in_generate=True,
        **OPTIONS,
    )
    assert output.num_judge_accepted.sum() > 0 and output.num_judge_rejected.sum() > 0
    assert len({len(text) for text, _ in drafts}) > 5 and max(len(text) for text, _ in drafts) > 3 * WINDOW
    for text, candidates in drafts:
        assert candidates == stock_draft(target, assistant, text, 4)[: len(candidates)]


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("num_assistant_tokens", [1, 5, "adaptive"])
def test_lossless(pair, top_k, num_assistant_tokens, num_rows):
    target, assistant = pair
    output = target.generate(
        **left_padded(PROMPTS[:num_rows]),
        assistant_model=assistant,
        judge=top_k,
        judge_threshold=0.0,
        num_assistant_tokens=num_assistant_tokens,
        return_dict_in_generate=True,
        **OPTIONS,
    )
    for row, prompt in zip(output.sequences, PROMPTS):
        expected = reference.greedy(target, prompt, OPTIONS["max_new_tokens"], ())
        assert row[-OPTIONS["max_new_tokens"] :].tolist() == expected[len(prompt) :]
    assert 0 < output.num_matches.sum() < output.num_candidates.sum()


def test_without_a_judge(pair):
    target, assistant = pair
    prompt = torch.tensor(PROMPTS[:1])
    loop = functools.partial(judge_decoding, assistant_model=assistant, num_assistant_tokens=3)
    output = target.generate(prompt, custom_generate=loop, assistant_model=assistant, **OPTIONS)
    assert torch.equal(output, target.generate(prompt, **OPTIONS))


def test_a_batch_gives_what_rows_give_alone(pair):
    """With a judge of the target's states, and rows that end at different times."""
    target, assistant = pair
    torch.manual_seed(5)
    judge = AutoJudge.from_config(JudgeConfig(hidden_size=32))
    judge.load_state_dict({"weight": torch.randn(32), "bias": torch.zeros(1)})
    options = {**OPTIONS, "assistant_model": assistant, "judge": judge, "judge_threshold": 0.5}
    options |= {"num_assistant_tokens": 4, "return_dict_in_generate": True, "eos_token_id": 8, "pad_token_id": 0}
    together = target.generate(**left_padded(PROMPTS), **options)
    assert together.num_judge_accepted.sum() > 0 and together.num_judge_rejected.sum() > 0
    width, lengths = max(map(len, PROMPTS)), set()
    for row, prompt in zip(together.sequences[:, width:].tolist(), PROMPTS):
        alone = target.generate(torch.tensor([prompt]), **options).sequences[0, len(prompt) :].tolist()
        assert row == alone + [0] * (len(row) - len(alone))
        lengths.add(len(alone))
    assert len(lengths) > 1


def test_a_conversation_goes_on_from_its_cache(pair, top_k):
    target, assistant = pair
    options = {**OPTIONS, "assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0}
    first = target.generate(torch.tensor(PROMPTS[:1]), return_dict_in_generate=True, **options)
    longer = torch.cat([first.sequences, torch.tensor([[4, 5, 6]])], dim=1)
    second = target.generate(longer, **{CACHE_NAME: first[CACHE_NAME]}, **options)
    assert second[0].tolist() == reference.greedy(target, longer[0].tolist(), OPTIONS["max_new_tokens"], ())


def test_sampling_draws_from_the_target(pair, top_k):
    """The first two tokens of many samples: one of the prefill, and one that the assistant drafts."""
    (model, assistant), prompt, num_samples = pair, PROMPTS[1], 4000
    torch.manual_seed(0)
    output = model.generate(
        torch.tensor([prompt] * num_samples),
        do_sample=True,
        top_k=0,
        temperature=3.0,
        max_new_tokens=3,
        assistant_model=assistant,
        judge=top_k,
        judge_threshold=0.0,
        num_assistant_tokens=2,
        return_dict_in_generate=True,
    )
    assert 0 < output.num_matches.sum() < output.num_candidates.sum()
    first = torch.tensor([[*prompt, token] for token in range(16)])
    with torch.no_grad():
        p_first = (model(first).logits[:, len(prompt) - 1] / 3)[0].softmax(-1)
        p_second = (model(first).logits[:, -1] / 3).softmax(-1)
    expected = (p_first[:, None] * p_second).flatten()
    drawn = output.sequences[:, len(prompt) : len(prompt) + 2]
    counts = torch.bincount(drawn[:, 0] * 16 + drawn[:, 1], minlength=256)
    assert reference.chi_square_p(counts, expected) > reference.NOT_CHANCE


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
