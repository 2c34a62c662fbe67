# SPDX-License-Identifier: Apache-2.0
"""Lossless on every kind of causal model: caches that slide, soft-capped logits, learned positions, ALiBi, experts."""

import pytest
import torch
from conftest import left_padded, scaled_up, similar_model
from transformers import AutoConfig, AutoModelForCausalLM

import autojudge_hf.generation
from autojudge_hf import AutoJudge, JudgeConfig
from autojudge_hf.caches import filled_layers, rewind, rewindable_cache
from autojudge_hf.forward import cached_forward
from autojudge_hf.head_inputs import HeadInputs, head_reads_last_states
from autojudge_hf.model_properties import hidden_size


SIZES = {
    "vocab_size": 32,
    "use_cache": True,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SLIDING = {"sliding_window": 8}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
# The last two layers read the keys and values of the first two.
SHARED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
SHARED |= {**SLIDING, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 32}
STREAMS = {"altup_num_inputs": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": {},
    "mistral": SLIDING,
    "qwen2": {**SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {},
    "gemma2": MIXED,
    "gemma3_text": MIXED,
    "gemma3n_text": {**SHARED, **STREAMS, "intermediate_size": [64] * 4},
    "gemma4_text": {**SHARED, "global_head_dim": 16},
    "phi": {"num_key_value_heads": 2, "partial_rotary_factor": 0.5},
    "phi3": SLIDING,
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
    "bloom": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": True},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64},
    "starcoder2": SLIDING,
    "granite": {},
    "cohere": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"num_key_value_heads": 2},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
}
PROMPTS = [[3, 14, 15, 9, 2, 6, 5], [8, 9], [27, 1, 8, 2]]
NEW_TOKENS = 57  # up to the last position the models have


def random_model(family, seed):
    torch.manual_seed(seed)
    sizes = {name: size for name, size in SIZES.items() if not (family == "falcon" and name == "head_dim")}
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES[family]})
    return scaled_up(AutoModelForCausalLM.from_config(config).eval())


def worth_testing(family):
    """The first seed whose text has three tokens or more, and an assistant that agrees neither never nor always."""
    for seed in range(20):
        model = random_model(family, seed)
        ids = torch.tensor([PROMPTS[0]])
        text = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)
        if len(set(text[0, 7:].tolist())) < 3:
            continue
        for noise in (0.03, 0.1, 0.01):
            assistant = similar_model(model, noise=noise)
            own = model(text).logits[0, 6:-1].argmax(-1)
            agreed = (assistant(text).logits[0, 6:-1].argmax(-1) == own).float().mean()
            if 0.2 < agreed < 0.9:
                return model, assistant
    raise AssertionError(f"no random {family} is worth testing")


def rewind_to_wrong_keys(monkeypatch):
    """Corrupts every target cache from here on."""

    def wrong(cache, removed):
        rewind(cache, removed)
        for layer in filled_layers(cache) if any(removed) else ():
            layer.keys = layer.keys.roll(1, dims=2)

    monkeypatch.setattr(autojudge_hf.generation, "rewind", wrong)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_lossless(family, monkeypatch):
    """At three draft lengths, alone and in a ragged batch; and with keys of the wrong tokens the text must change."""
    model, assistant = worth_testing(family)
    top_k = AutoJudge.from_config(JudgeConfig(judge_type="top_k"))
    greedy = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    one, batch = {"input_ids": torch.tensor([PROMPTS[0]])}, left_padded(PROMPTS)
    for inputs in (one, batch):
        expected = model.generate(**inputs, **greedy)
        for num_assistant_tokens in (1, 5, 16):
            output = model.generate(
                **inputs,
                **greedy,
                assistant_model=assistant,
                judge=top_k,
                judge_threshold=0.0,
                num_assistant_tokens=num_assistant_tokens,
                return_dict_in_generate=True,
            )
            assert torch.equal(output.sequences, expected)
            assert 0 < output.num_matches.sum() < output.num_candidates.sum()

    rewind_to_wrong_keys(monkeypatch)
    options = {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0, "num_assistant_tokens": 5}
    assert not torch.equal(model.generate(**batch, **greedy, **options), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_judge_reads_the_last_hidden_states(family):
    """The head's input, taken where the head is called, against what `output_hidden_states` gives."""
    model = random_model(family, seed=0)
    tokens = torch.tensor([PROMPTS[0]])
    with HeadInputs(model) as head:
        outputs = cached_forward(model, tokens, rewindable_cache(model), num_logits=3, head=head)
    expected = model(tokens, output_hidden_states=True)
    assert head_reads_last_states(model) == (family != "gemma3n_text")  # that one's head reads the mean of several
    if head_reads_last_states(model):
        assert torch.equal(outputs.states[:, -3:], expected.hidden_states[-1][:, -3:])
    assert outputs.states.shape[-1] == hidden_size(model)
    assert not model.get_output_embeddings()._forward_pre_hooks
