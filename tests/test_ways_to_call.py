# SPDX-License-Identifier: Apache-2.0
"""The rest of what people do with `generate`: pipelines, outputs, threads, dtypes, offloading, odd pairs."""

import contextlib
import copy
import functools
import itertools
import logging
import re
import threading
import time

import pytest
import reference
import torch
from conftest import PROMPT, left_padded, random_llama, scaled_up, similar_model
from test_architectures import random_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CompileConfig,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LogitsProcessor,
    LogitsProcessorList,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    pipeline,
)

import autojudge_hf.checks
import autojudge_hf.generation
from autojudge_hf import AutoJudge, JudgeConfig, mine_mismatches
from autojudge_hf.draft_length import AdaptiveDraftLength
from autojudge_hf.fixed_cache import kept_caches
from autojudge_hf.head_inputs import head_reads_last_states
from autojudge_hf.model_properties import CACHE_NAME, is_compiled
from autojudge_hf.outputs import COUNTS
from autojudge_hf.prefixes import Prefixes
from autojudge_hf.rows import Rows
from autojudge_hf.tasks import GSM8K


LOSSLESS = {"do_sample": False, "judge_threshold": 0.0}


def warnings_of(caplog, decode):
    autojudge_hf.checks.warn_once.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="autojudge_hf.checks"):
        output = decode()
    return output, caplog.messages


# Outputs


def test_hidden_states_as_plain_generate_gives_them(random_pair, top_k):
    """Per token and layer, the prompt's with the first token."""
    model, assistant = random_pair
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_hidden_states": True}
    expected = model.generate(PROMPT, do_sample=False, **options).hidden_states
    for k in (1, 5):
        output = model.generate(
            PROMPT, assistant_model=assistant, judge=top_k, num_assistant_tokens=k, **LOSSLESS, **options
        )
        assert len(output.hidden_states) == len(expected) == 12
        for token, expected_token in zip(output.hidden_states, expected):
            assert len(token) == len(expected_token) == 3
            for layer, expected_layer in zip(token, expected_token):
                torch.testing.assert_close(layer, expected_layer, rtol=1e-4, atol=1e-4)


def test_hidden_states_of_several_streams(top_k):
    """Gemma 3n's layers have four dimensions, the streams in front."""
    model = random_model("gemma3n_text", seed=0)
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_hidden_states": True}
    prompts = PROMPT.repeat(2, 1)
    expected = model.generate(prompts, do_sample=False, **options).hidden_states
    options |= {"assistant_model": similar_model(model), "judge": top_k, **LOSSLESS}
    for more in ({}, {"cache_implementation": "static"}):
        states = model.generate(prompts, **options, **more).hidden_states
        for layer, expected_layer in itertools.chain.from_iterable(map(zip, states, expected)):
            assert layer.ndim == 4
            torch.testing.assert_close(layer, expected_layer, rtol=1e-3, atol=1e-3)


def test_hidden_states_of_a_ragged_batch(random_pair, top_k):
    model, assistant = random_pair
    prompts = [[3, 14, 15, 9, 2, 6, 5], [7, 7, 3], [12, 4, 4, 4, 8]]
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_hidden_states": True}
    options |= {"assistant_model": assistant, "judge": top_k, **LOSSLESS}
    batch = model.generate(**left_padded(prompts), **options).hidden_states
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), **options).hidden_states
        for token, expected in list(zip(batch, alone, strict=True))[1:]:
            torch.testing.assert_close(token[-1][row], expected[-1][0], rtol=1e-4, atol=1e-4)


def test_hidden_states_behind_a_rows_end(random_pair, top_k):
    """Zeros, as many as the longest row needs; one row ends with its first token, one never."""
    model, assistant = random_pair
    prompts, eos_token_id = [[3, 14, 15, 9, 2, 6, 5], [7, 7, 3], [12, 4, 4, 4, 8]], 27
    options = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_hidden_states": True}
    options |= {"assistant_model": assistant, "judge": top_k, "eos_token_id": eos_token_id, **LOSSLESS}
    batch = model.generate(**left_padded(prompts), **options).hidden_states
    lengths = [len(reference.greedy(model, prompt, 12, {eos_token_id})) - len(prompt) for prompt in prompts]
    assert len(set(lengths)) == 3 and len(batch) == max(lengths) == 12
    for row, length in enumerate(lengths):
        assert [t for t, token in enumerate(batch) if token[-1][row].any()] == [*range(length)]


def test_summary_is_a_line_with_the_counts(random_pair, top_k):
    model, assistant = random_pair
    output = model.generate(
        PROMPT,
        assistant_model=assistant,
        judge=top_k,
        judge_threshold=0.6,
        num_assistant_tokens=5,
        max_new_tokens=60,
        do_sample=False,
        return_dict_in_generate=True,
    )
    line = output.summary()
    cycles, *counts = (getattr(output, name).item() for name in COUNTS)
    behind = counts[0] - sum(counts[1:])
    assert min(cycles, behind, *counts) > 0
    assert [int(n) for n in re.findall(r"(?<!\.)\b\d+\b(?!\.)", line)] == [cycles, *counts, behind]


def test_summary_of_a_single_token(random_pair, top_k):
    """The prefill's, without any cycle."""
    model, assistant = random_pair
    options = {"assistant_model": assistant, "judge": top_k, "return_dict_in_generate": True}
    assert model.generate(PROMPT, max_new_tokens=1, **options).summary().startswith("0.0 tokens per cycle: 0 cycles")


# Callers


def test_generation_config_object(random_pair, top_k):
    model, assistant = random_pair
    config = GenerationConfig(max_new_tokens=25, do_sample=False, repetition_penalty=1.3)
    expected = model.generate(PROMPT, generation_config=config)
    got = model.generate(PROMPT, generation_config=config, assistant_model=assistant, judge=top_k, judge_threshold=0.0)
    assert torch.equal(got, expected)


@pytest.mark.slow
def test_pipeline_with_a_chat_and_with_batches(target, draft, tokenizer, test_problems, top_k):
    generator = pipeline("text-generation", model=target, tokenizer=tokenizer)
    chats = [[{"role": "user", "content": GSM8K().instruction(problem)}] for problem in test_problems[:3]]
    options = {"do_sample": False, "max_new_tokens": 200}
    expected = generator(chats, batch_size=3, **options)
    got = generator(chats, batch_size=3, assistant_model=draft, judge=top_k, judge_threshold=0.0, **options)
    assert got == expected
    assert got[0][0]["generated_text"][-1]["role"] == "assistant"


class GoneError(Exception):
    """What a server raises when nobody listens any more."""


class Listener:
    """Leaves at a certain `put`, of which the first is the prompt."""

    def __init__(self, leaves_at):
        self.leaves_at, self.heard, self.num_put = leaves_at, [], 0

    def put(self, tokens):
        self.num_put += 1
        if self.num_put == self.leaves_at:
            raise GoneError
        if self.num_put > 1:
            self.heard += tokens.flatten().tolist()

    def end(self):
        pass


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("more", "is_lazy"), [({}, False), ({"prefill_chunk_size": 2}, False), ({}, True)])
@pytest.mark.parametrize("layer", [0, -1])
def test_a_cache_can_be_gone_on_with_where_a_forward_was_broken_off(top_k, family, more, is_lazy, layer):
    """Some of its layers have read what others haven't; at the first forward, in the second turn, and later."""
    model = random_model(family, seed=0)
    assistant = similar_model(model)
    options = {"assistant_model": assistant, "judge": top_k, **LOSSLESS, **more}
    model.generation_config.pad_token_id = None  # some of the text's tokens are such
    plain = {"do_sample": False, "max_new_tokens": 12}
    text = model.generate(PROMPT, do_sample=False, max_new_tokens=30)
    expected, lengths = model.generate(text, **plain), set()
    for number, num_known in itertools.product((1, 2, 4, 7), (0, 5)):
        for going_on in ({}, options):
            cache = DynamicCache() if is_lazy else DynamicCache(config=model.config)
            forwards = itertools.count(1)
            if num_known:
                model(text[:, :num_known], **{CACHE_NAME: cache})

            def fail(*_, forwards=forwards, number=number):
                if next(forwards) == number:
                    raise GoneError

            hook = model.model.layers[layer].register_forward_hook(fail)
            with pytest.raises(GoneError):
                model.generate(PROMPT, max_new_tokens=30, **{CACHE_NAME: cache}, **options)
            hook.remove()
            lengths.add(cache.get_seq_length())
            assert torch.equal(model.generate(text, **{CACHE_NAME: cache, **plain, **going_on}), expected)
    assert len(lengths) > 2


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_cache_can_be_gone_on_with_where_a_commit_was_broken_off(top_k, family, monkeypatch):
    """Between taking tokens back and committing them: a sliding window has forgotten what it then lacks."""
    model = random_model(family, seed=0)
    model.generation_config.pad_token_id = None
    options = {"assistant_model": similar_model(model), "judge": top_k, "num_assistant_tokens": 3, **LOSSLESS}
    plain, commit = {"do_sample": False, "max_new_tokens": 12}, Rows.commit
    text = model.generate(PROMPT, do_sample=False, max_new_tokens=30)
    expected = model.generate(text, **plain)
    for last, going_on in itertools.product(range(1, 6), ({}, options)):
        cache, commits = DynamicCache(config=model.config), itertools.count(1)

        def fail(*args, commits=commits, last=last):
            if next(commits) == last:
                raise GoneError
            return commit(*args)

        with monkeypatch.context() as patch, pytest.raises(GoneError):
            patch.setattr(Rows, "commit", fail)
            model.generate(PROMPT, max_new_tokens=30, **{CACHE_NAME: cache}, **options)
        assert "_state_copies" not in vars(cache)
        assert torch.equal(model.generate(text, **{CACHE_NAME: cache, **plain, **going_on}), expected)


def test_a_batchs_cache_has_nothing_of_ours(random_pair, top_k):
    model, assistant = random_pair
    cache = DynamicCache(config=model.config)
    options = {"assistant_model": assistant, "judge": top_k, "max_new_tokens": 5, "do_sample": False}
    model.generate(**left_padded([[3, 4], [5]]), **{CACHE_NAME: cache}, **options)
    assert cache.get_seq_length() == 0 and "_state_copies" not in vars(cache)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("leaves_at", [2, 3, 4, 6])
def test_a_cache_can_be_gone_on_with_where_a_call_was_broken_off(top_k, family, leaves_at):
    """By the client of a chat: the cache has what was heard, and the next turn goes on from it."""
    window = {"sliding_window": 8, "num_key_value_heads": 2} if family == "mistral" else {}
    model = decoder(family, **SMALL, **window)
    cache, listener = DynamicCache(config=model.config), Listener(leaves_at)
    options = {"assistant_model": similar_model(model), "judge": top_k, "num_assistant_tokens": 6, **LOSSLESS}
    with pytest.raises(GoneError):
        model.generate(PROMPT, max_new_tokens=40, streamer=listener, **{CACHE_NAME: cache}, **options)
    text = torch.cat([PROMPT, torch.tensor([[*listener.heard, 7, 8, 9, 1, 2]])], dim=1)
    assert cache.get_seq_length() == 7 + len(listener.heard) - 1
    assert not any(layer.keys.is_inference() for layer in cache.layers)
    expected = model.generate(text, do_sample=False, max_new_tokens=20)
    assert torch.equal(model.generate(text, max_new_tokens=20, **{CACHE_NAME: cache}, **options), expected)


def test_a_callers_sliding_window_stays_one(top_k):
    """A judged call keeps what leaves the window, to take tokens back; afterwards the cache forgets again."""
    model = decoder("mistral", **SMALL, sliding_window=8, num_key_value_heads=2)
    cache = DynamicCache(config=model.config)
    options = {"assistant_model": similar_model(model), "judge": top_k, **LOSSLESS}
    text = model.generate(PROMPT, max_new_tokens=20, **{CACHE_NAME: cache}, **options)
    expected = model.generate(text, do_sample=False, max_new_tokens=20)
    assert torch.equal(model.generate(text, do_sample=False, max_new_tokens=20, **{CACHE_NAME: cache}), expected)
    assert {layer.keys.shape[2] for layer in cache.layers} == {7}
    text = torch.cat([expected, PROMPT], dim=1)
    expected = model.generate(text, do_sample=False, max_new_tokens=20)
    assert torch.equal(model.generate(text, max_new_tokens=20, **{CACHE_NAME: cache}, **options), expected)


def test_a_call_that_fails_gives_its_static_cache_back(top_k):
    model = random_llama()
    options = {"assistant_model": similar_model(model), "judge": top_k, "cache_implementation": "static", **LOSSLESS}
    expected = model.generate(PROMPT, max_new_tokens=20, **options)
    kept = kept_caches[model]
    for leaves_at in (2, 3):
        with pytest.raises(GoneError):
            model.generate(PROMPT, max_new_tokens=20, streamer=Listener(leaves_at), **options)
        assert kept_caches[model] == kept
    assert torch.equal(model.generate(PROMPT, max_new_tokens=20, **options), expected)


@pytest.mark.parametrize("leaves_at", [0, 4])
def test_a_call_leaves_no_hooks_behind(random_pair, leaves_at):
    """Where it ends and where it fails: a judge of both models' states reads them by hooks."""
    model, assistant = random_pair
    judge = AutoJudge.from_config(JudgeConfig(hidden_size=32, assistant_hidden_size=32))
    judge.load_state_dict({"weight": torch.ones(64), "bias": torch.zeros(1)})
    seen = []

    class Looking(Listener):
        def put(self, tokens):
            seen.append(sum(len(m.get_output_embeddings()._forward_pre_hooks) for m in (model, assistant)))
            super().put(tokens)

    options = {"assistant_model": assistant, "judge": judge, "streamer": Looking(leaves_at)}
    with pytest.raises(GoneError) if leaves_at else contextlib.nullcontext():
        model.generate(PROMPT, do_sample=False, max_new_tokens=20, num_assistant_tokens=3, **options)
    assert max(seen) == 2
    assert not any(module._forward_pre_hooks for m in (model, assistant) for module in m.modules())


def test_adaptive_lengths_dont_learn_from_a_slow_reader(top_k, monkeypatch):
    """Or from a clock that stands still."""
    model, now, costs = random_llama(), [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    update = AdaptiveDraftLength.update
    monkeypatch.setattr(
        AdaptiveDraftLength, "update", lambda self, *args: costs.append(args[2:]) or update(self, *args)
    )

    class Slow(Listener):
        def put(self, tokens):
            now[0] += 100.0

    options = {"assistant_model": similar_model(model), "judge": top_k, "num_assistant_tokens": "adaptive", **LOSSLESS}
    model.generate(PROMPT, max_new_tokens=20, streamer=Slow(0), **options)
    assert now[0] > 0 and set(costs) == {(0.0, 0.0)}


def test_two_threads_on_one_model(random_pair, linear_judge):
    """No state is shared between calls: each thread gets what it gets alone."""
    model, assistant = random_pair
    prompts = [torch.tensor([[3, 14, 15, 9]]), torch.tensor([[7, 1, 8, 2, 8]])]
    options = {"do_sample": False, "max_new_tokens": 80, "assistant_model": assistant, "judge": linear_judge}
    alone = [model.generate(prompt, **options) for prompt in prompts]
    together = [[], []]

    def decode(i):
        for _ in range(3):
            together[i].append(model.generate(prompts[i], **options))

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, results in zip(alone, together):
        assert len(results) == 3 and all(torch.equal(result, expected) for result in results)


# Devices and dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(random_pair, linear_judge, dtype):
    """The judge computes in fp32 on half-precision states; at 1 every candidate stays, at 0 only a tie may differ."""
    model = copy.deepcopy(random_pair[0])
    assistant = similar_model(model, noise=0.2).to(dtype)
    model.to(dtype)
    options = {"do_sample": False, "max_new_tokens": 30, "assistant_model": assistant, "judge": linear_judge}
    output = model.generate(PROMPT, judge_threshold=1.0, return_dict_in_generate=True, **options)
    assert torch.equal(output.num_matches + output.num_judge_accepted, output.num_candidates)
    output = model.generate(PROMPT, judge_threshold=0.5, return_dict_in_generate=True, **options)
    assert output.num_judge_accepted > 0
    got = model.generate(PROMPT, judge_threshold=0.0, **options)[0]
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=30)[0]
    if len(parted := (got != expected).nonzero()):
        best, second = model(expected[None, : parted[0]]).logits[0, -1].float().topk(2).values
        assert best - second <= 4 * torch.finfo(dtype).eps * best.abs()


def test_offloaded_target(random_pair, linear_judge, tmp_path):
    """`device_map`: weights that live elsewhere and only come in for the forward."""
    from accelerate import dispatch_model

    model, assistant = random_pair
    options = {"do_sample": False, "max_new_tokens": 30, "assistant_model": assistant, "judge": linear_judge}
    expected = model.generate(PROMPT, **options)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    offloaded = dispatch_model(copy.deepcopy(model), places, main_device="cpu", offload_dir=str(tmp_path))
    assert next(offloaded.lm_head.parameters()).device.type == "meta"
    assert torch.equal(offloaded.generate(PROMPT, **options), expected)


@pytest.mark.parametrize("role", ["target", "assistant"])
def test_models_that_are_offloaded_whole(random_pair, linear_judge, role):
    """They have no device of their own: every weight comes in for its layer's forward."""
    from accelerate import cpu_offload

    models = list(random_pair)
    options = {"do_sample": False, "max_new_tokens": 30, "judge": linear_judge}
    expected = models[0].generate(PROMPT, assistant_model=models[1], **options)
    at = ("target", "assistant").index(role)
    models[at] = cpu_offload(copy.deepcopy(models[at]), execution_device="cpu")
    assert models[at].device.type == "meta"
    for more in ({}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(models[0].generate(PROMPT, assistant_model=models[1], **options, **more), expected)
    prompts = [[3, 14, 15, 9], [2, 6, 5]]
    alone = [Prefixes(m).run(dict(enumerate(prompts)), 1).logits for m in (models[at], random_pair[at])]
    assert torch.equal(*alone)


class WeightOnlyInt8(torch.nn.Module):
    """What weight-only quantisation does to a linear layer."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
        self.quantised = (linear.weight / self.scale).round().to(torch.int8)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.quantised.to(x.dtype) * self.scale)


@torch.no_grad()
def test_quantised_target(random_pair, linear_judge):
    """Lossless is what the quantised model writes, which isn't what the full one does."""
    model = copy.deepcopy(random_pair[0])
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, WeightOnlyInt8(child))
    options = {"max_new_tokens": 60, "assistant_model": random_pair[1], "judge": linear_judge}
    expected = reference.greedy(model, PROMPT[0].tolist(), 60, ())
    assert expected != reference.greedy(random_pair[0], PROMPT[0].tolist(), 60, ())
    assert model.generate(PROMPT, **LOSSLESS, **options)[0].tolist() == expected
    assert model.generate(PROMPT, do_sample=False, judge_threshold=0.9, **options)[0].tolist() != expected


# Pairs that don't fit


def test_what_peft_tells_layers_by_hooks_is_refused(top_k):
    """Rows' adapters, which stay where they are when a row ends; and from which token of a forward on to adapt."""
    model = random_llama()
    options = {"assistant_model": similar_model(model), "judge": top_k, "max_new_tokens": 4, **LOSSLESS}

    def tell(target, args, kwargs, **told):
        return args, kwargs

    layer = model.model.layers[0].self_attn.q_proj
    hook = layer.register_forward_pre_hook(functools.partial(tell, adapter_names=["a", "b"]), with_kwargs=True)
    with pytest.raises(ValueError, match="`adapter_names` for several prompts"):
        model.generate(PROMPT.repeat(2, 1), **options)
    assert torch.equal(model.generate(PROMPT, **options), model.generate(PROMPT, do_sample=False, max_new_tokens=4))
    hook.remove()
    layer.register_forward_pre_hook(functools.partial(tell, alora_offsets=[3]), with_kwargs=True)
    with pytest.raises(ValueError, match="activated LoRA"):
        model.generate(PROMPT, **options)


def test_learned_prompts_are_refused(top_k):
    """PEFT puts them in front by a method that it lends the model while it generates, which our loop doesn't call."""
    model = random_llama()

    class Prompted:
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return model_inputs(*args, **kwargs)

    model_inputs = model.prepare_inputs_for_generation
    options = {"assistant_model": similar_model(model), "judge": top_k, "max_new_tokens": 4, **LOSSLESS}
    model.prepare_inputs_for_generation = Prompted().prepare_inputs_for_generation
    with pytest.raises(ValueError, match="prompt learning"):
        model.generate(PROMPT, **options)
    model.prepare_inputs_for_generation = model_inputs  # as PEFT leaves it
    assert torch.equal(model.generate(PROMPT, **options), model.generate(PROMPT, do_sample=False, max_new_tokens=4))


def test_a_models_own_preparation_of_inputs_is_warned_of(top_k, caplog):
    class Own(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return super().prepare_inputs_for_generation(*args, **kwargs)

    model = random_llama()
    options = {"assistant_model": similar_model(model), "judge": top_k, "max_new_tokens": 4, **LOSSLESS}
    for cls, expected in ((Own, ["Own has a `prepare_inputs_for_generation` of its own"]), (LlamaForCausalLM, [])):
        model.__class__ = cls
        _, messages = warnings_of(caplog, lambda: model.generate(PROMPT, **options))
        assert [message[: len(start)] for message, start in zip(messages, expected)] == expected
        assert len(messages) == len(expected)


def test_continuous_batching_is_refused(random_pair, top_k):
    """`generate` would go there before it sees that there is a judge."""
    with pytest.raises(ValueError, match="paged"):
        random_pair[0].generate(PROMPT, judge=top_k, prompt_lookup_num_tokens=3, cache_implementation="paged")


def test_other_vocabularies_are_refused(random_pair, top_k):
    model, _ = random_pair
    with pytest.raises(ValueError, match=r"different vocabularies: 32 tokens.*1100"):
        model.generate(PROMPT, assistant_model=random_llama(1, 1100), judge=top_k, max_new_tokens=5)


def test_a_judge_of_another_pair_warns_with_both_names(random_pair, caplog):
    model, assistant = (copy.deepcopy(m) for m in random_pair)
    model.config._name_or_path, assistant.config._name_or_path = "org/big", "org/small"
    options = {"do_sample": False, "max_new_tokens": 8, "assistant_model": assistant}
    for names, expected in (
        (("org/other", "org/small"), ["target org/big (mined with org/other)"]),
        (("org/big", "org/tiny"), ["assistant org/small (mined with org/tiny)"]),
        (("big", "elsewhere/small"), []),
        ((None, None), []),
    ):
        config = JudgeConfig(hidden_size=32, base_model_name_or_path=names[0], assistant_model_name_or_path=names[1])
        judge = AutoJudge.from_config(config)
        judge.load_state_dict({"weight": torch.ones(32), "bias": torch.zeros(1)})
        _, messages = warnings_of(caplog, lambda judge=judge: model.generate(PROMPT, judge=judge, **options))
        assert len(messages) == len(expected)
        assert all(part in message for part, message in zip(expected, messages))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_arent_finite_are_rejected_and_counted(random_pair, linear_judge, caplog, monkeypatch, value):
    model, assistant = random_pair
    real = autojudge_hf.judging.judge_inputs

    def spoiled(*args):
        inputs = real(*args)
        inputs.features[..., 3] = value
        return inputs

    options = {"do_sample": False, "max_new_tokens": 40, "judge": linear_judge, "return_dict_in_generate": True}
    options |= {"assistant_model": assistant, "num_assistant_tokens": 4, "judge_threshold": 0.999}
    assert model.generate(PROMPT, **options).num_judge_accepted > 0
    monkeypatch.setattr(autojudge_hf.judging, "judge_inputs", spoiled)
    output, _ = warnings_of(caplog, lambda: model.generate(PROMPT, **options))
    model.generate(PROMPT, **options)
    messages = caplog.messages
    assert torch.equal(output.sequences, model.generate(PROMPT, do_sample=False, max_new_tokens=40))
    assert output.num_judge_accepted == 0 and output.num_candidates > output.num_matches
    assert len(messages) == 1 and "NaN or infinity" in messages[0]


def test_a_judge_is_asked_about_mismatches_only(random_pair, linear_judge, monkeypatch):
    """On a CPU, where a question that nobody has costs time."""
    model, assistant = random_pair
    asked = []
    monkeypatch.setattr(autojudge_hf.judging, "judge_inputs", lambda *args: asked.append(args[0]) or 1 / 0)
    options = {"do_sample": False, "max_new_tokens": 40, "judge": linear_judge, "judge_threshold": 0.5}
    agreeing = model.generate(PROMPT, assistant_model=model, **options)
    assert torch.equal(agreeing, model.generate(PROMPT, do_sample=False, max_new_tokens=40)) and not asked
    with pytest.raises(ZeroDivisionError):
        model.generate(PROMPT, assistant_model=assistant, **options)
    assert len(asked) == 1


def test_forbidden_candidates_are_no_broken_states(random_pair, caplog):
    """Top-k sampling leaves candidates without probability: their logit features are infinite, the states are fine."""
    model, assistant = random_pair
    judge = AutoJudge.from_config(JudgeConfig(hidden_size=32, logit_features=True))
    judge.load_state_dict({"weight": torch.ones(36), "bias": torch.zeros(1)})
    options = {"do_sample": True, "top_k": 1, "max_new_tokens": 40, "assistant_model": assistant, "judge": judge}
    options |= {"judge_threshold": 0.9, "return_dict_in_generate": True}
    output, messages = warnings_of(caplog, lambda: model.generate(PROMPT, **options))
    assert output.num_candidates > output.num_matches
    assert not any("NaN" in message for message in messages)


def test_reference_of_this_file_varies(random_pair):
    """A random model that repeats one token would hide a wrong cache."""
    model, _ = random_pair
    assert len(set(reference.greedy(model, PROMPT[0].tolist(), 40, ())[7:])) > 3


def test_growing_caches_are_not_compiled(random_pair, top_k, caplog):
    model, assistant = random_pair
    options = {"judge": top_k, "assistant_model": assistant, "max_new_tokens": 8, "do_sample": False}
    config = CompileConfig(backend=lambda *_: pytest.fail("compiled"))
    _, messages = warnings_of(caplog, lambda: model.generate(PROMPT, compile_config=config, **options))
    assert len(messages) == 1 and "`compile_config` needs `cache_implementation='static'`" in messages[0]


# Odd models


def decoder(name, **sizes):
    """A small random decoder of an odd family."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0, **sizes}
    return scaled_up(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval())


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_longrope_is_lossless_or_refused(top_k):
    """Past a certain length it turns every token's keys another way, so that no cache can be gone on with."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [1.0 + 2 * i for i in range(8)], "partial_rotary_factor": 1.0}
    model = decoder("phi3", **SMALL, rope_parameters=rope, original_max_position_embeddings=24)
    options = {"assistant_model": similar_model(model), "judge": top_k, "num_assistant_tokens": 5, **LOSSLESS}
    torch.manual_seed(1)
    for length, max_new_tokens in ((7, 17), (40, 30)):
        prompt = torch.randint(1, 32, (1, length))
        expected = model.generate(prompt, do_sample=False, max_new_tokens=max_new_tokens)
        assert torch.equal(model.generate(prompt, max_new_tokens=max_new_tokens, **options), expected)
    with pytest.raises(ValueError, match="LongRoPE"):
        model.generate(PROMPT, max_new_tokens=18, **options)


def test_dynamic_rope_is_lossless_or_refused(top_k):
    """Past the model's length a row's rotations depend on how long it is, and a batch has those of its longest."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = decoder("llama", **SMALL, rope_parameters=rope, max_position_embeddings=32)
    options = {"assistant_model": similar_model(model), "judge": top_k, "num_assistant_tokens": 5, **LOSSLESS}
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=60)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=60, **options), expected)
    batch = left_padded([PROMPT[0].tolist(), [3, 1, 4]])
    expected = model.generate(**batch, do_sample=False, max_new_tokens=25)
    assert torch.equal(model.generate(**batch, max_new_tokens=25, **options), expected)
    with pytest.raises(ValueError, match="dynamic NTK"):
        model.generate(**batch, max_new_tokens=26, **options)


def test_models_whose_forward_is_not_of_the_text_alone(top_k):
    sizes = {"emb_dim": 32, "n_layers": 2, "n_heads": 2, "causal": True, "pad_index": 0, "mask_token_id": 1}
    model = decoder("xlm", **sizes)
    with pytest.raises(ValueError, match="isn't of the text alone"):
        model.generate(PROMPT, assistant_model=similar_model(model), judge=top_k, max_new_tokens=5)
    sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 2, "num_decoder_layers": 1, "num_decoder_attention_heads": 2}
    sizes |= {"hidden_size": 32, "is_encoder_decoder": False}
    messages = {
        "bert": "encoders.*is_decoder=True",
        "openai-gpt": "cache no keys",
        "prophetnet": "alone",
        "git": "alone",
    }
    for name, message in messages.items():
        model = decoder(name, **(sizes if name in ("openai-gpt", "prophetnet") else SMALL))
        with pytest.raises(ValueError, match=message):
            model.generate(PROMPT, assistant_model=model, judge=top_k, max_new_tokens=5)
        with pytest.raises(ValueError, match=message):
            mine_mismatches(model, model, None, [{}], GSM8K(), max_new_tokens=5)
    parts = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 32, "num_kv_shared_layers": 0}
    parts |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "laurel_rank": 4}
    parts |= {"altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 2, "intermediate_size": [64] * 2}
    model = decoder("gemma3n_text", **{**SMALL, **parts}, num_key_value_heads=2, head_dim=16)
    with pytest.raises(ValueError, match="assistant_early_exit.*no embeddings of their own"):
        model.generate(PROMPT, assistant_early_exit=1, judge=top_k, max_new_tokens=5)


def test_a_threshold_that_was_set_wrongly(random_pair, top_k):
    model, assistant = random_pair
    for wrong in (5, float("nan"), "1 point", None):
        top_k.config.threshold = wrong
        with pytest.raises(ValueError, match=r"`judge.config.threshold` must be a number in \[0, 1\]"):
            model.generate(PROMPT, assistant_model=assistant, judge=top_k, max_new_tokens=5)
    judge = AutoJudge.from_config(JudgeConfig(judge_type="rule", important_token_ids=[7, 99]))
    with pytest.raises(ValueError, match=r"has \[99\], which aren't among the target's 32 tokens"):
        model.generate(PROMPT, assistant_model=assistant, judge=judge, max_new_tokens=5)


def test_models_that_count_positions_their_own_way(top_k):
    """RoBERTa starts behind its padding token unless it is told; BART can't be told, and lacks some of its layers."""
    sizes = {"d_model": 32, "decoder_layers": 2, "encoder_layers": 5, "decoder_attention_heads": 2}
    sizes |= {"decoder_ffn_dim": 64, "dropout": 0.0, "forced_eos_token_id": None, "is_encoder_decoder": False}
    sizes |= {"max_position_embeddings": PROMPT.shape[1] + 40 - 1}
    for model in (decoder("roberta", **SMALL, is_decoder=True), decoder("bart", **sizes, is_decoder=True)):
        options = {"assistant_model": similar_model(model), "judge": top_k, "num_assistant_tokens": 5, **LOSSLESS}
        expected = model.generate(PROMPT, do_sample=False, max_new_tokens=40)
        assert torch.equal(model.generate(PROMPT, max_new_tokens=40, **options), expected)
        # Up to the last position that there is: a forward of a fixed shape would have padding behind it.
        static = model.generate(PROMPT, max_new_tokens=40, cache_implementation="static", **options)
        assert torch.equal(static, expected)
    with pytest.raises(ValueError, match="batches of models whose `forward` takes no"):
        model.generate(**left_padded([[3, 4, 5], [6]]), max_new_tokens=4, **options)


def test_texts_for_a_model_of_images(top_k):
    text = LlamaConfig(**SMALL, vocab_size=32, eos_token_id=None, pad_token_id=0)
    vision = CLIPVisionConfig(**SMALL, image_size=8, patch_size=4)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=31)
    ).eval()
    scaled_up(model.model.language_model)
    options = {"assistant_model": random_llama(), "judge": top_k, "num_assistant_tokens": 5, **LOSSLESS}
    for inputs in ({"input_ids": PROMPT}, left_padded([[3, 4, 5, 9, 2], [6, 7]])):
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=20)
        assert len(set(expected[0, -20:].tolist())) >= 3
        assert torch.equal(model.generate(**inputs, max_new_tokens=20, **options), expected)


VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def test_processors_of_images_say_that_a_text_is_a_text(top_k):
    """In types of tokens that are all zero. Others say where images are, and would have to reach the model."""
    text = {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 32, "eos_token_id": None}
    tokens = {"image_token_index": 29, "boi_token_index": 30, "eoi_token_index": 31}
    config = Gemma3Config(text_config=text, vision_config={**VISION, "intermediate_size": 16}, **tokens)
    torch.manual_seed(0)
    model = scaled_up(Gemma3ForConditionalGeneration(config).eval())
    model.generation_config.eos_token_id = None
    options = {"assistant_model": random_llama(), "judge": top_k, "num_assistant_tokens": 5, **LOSSLESS}
    types = {"token_type_ids": torch.zeros_like(PROMPT)}
    expected = model.generate(PROMPT, **types, do_sample=False, max_new_tokens=20)
    assert torch.equal(model.generate(PROMPT, **types, max_new_tokens=20, **options), expected)
    with pytest.raises(ValueError, match="model inputs .'token_type_ids'"):
        model.generate(PROMPT, token_type_ids=types["token_type_ids"] + 1, max_new_tokens=20, **options)


def test_types_of_a_text_for_models_that_place_images(top_k):
    text = {**SMALL, "num_key_value_heads": 1, "vocab_size": 32, "eos_token_id": None}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    tokens = {"image_token_id": 28, "video_token_id": 29, "vision_start_token_id": 30, "vision_end_token_id": 31}
    torch.manual_seed(1)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    model = scaled_up(Qwen2VLForConditionalGeneration(config).eval())
    model.generation_config.eos_token_id = None
    options = {"assistant_model": random_llama(), "judge": top_k, "num_assistant_tokens": 5, **LOSSLESS}
    for inputs in ({"input_ids": PROMPT}, left_padded([[3, 4, 5, 9, 2], [6, 7]])):
        inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=20)
        assert len(set(expected[0, -20:].tolist())) >= 3
        assert torch.equal(model.generate(**inputs, max_new_tokens=20, **options), expected)
    inputs = {"input_ids": PROMPT, "mm_token_type_ids": torch.ones_like(PROMPT)}
    with pytest.raises(ValueError, match="model inputs .'mm_token_type_ids'"):
        model.generate(**inputs, position_ids=torch.arange(7).expand(3, 1, 7), max_new_tokens=20, **options)


def test_a_config_that_says_more_than_its_class_asks(top_k):
    """Old ones said of every model whether it was a decoder."""
    model = random_llama()
    model.config.is_decoder = False
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=20)
    got = model.generate(PROMPT, assistant_model=random_llama(1), judge=top_k, max_new_tokens=20, **LOSSLESS)
    assert torch.equal(got, expected)


def test_rows_leave_a_cache_that_is_filled_in_part(top_k):
    """Without an image Llama 3.2's layers for images cache nothing."""
    text = {**SMALL, "vocab_size": 32, "num_key_value_heads": 1, "cross_attention_layers": [1], "eos_token_id": None}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    vision = {**VISION, "attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 32}
    vision |= {"intermediate_size": 16, "intermediate_layers_indices": [0]}
    torch.manual_seed(0)
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=31)
    model = scaled_up(MllamaForConditionalGeneration(config).eval())
    batch = left_padded([PROMPT[0].tolist(), [3, 1, 4]])
    expected = model.generate(**batch, do_sample=False, max_new_tokens=30)
    options = {"assistant_model": similar_model(model), "judge": top_k, "num_assistant_tokens": 5, **LOSSLESS}
    for more in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**batch, max_new_tokens=30, **options, **more), expected)


@pytest.fixture
def compiler():
    """Growing shapes soon come to dynamo's limit, behind which it leaves a forward alone for good."""
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("way", ["forward", "whole forward", "compile"])
def test_a_compiled_target_gives_a_judge_its_states(random_pair, linear_judge, way):
    """A graph from before there was a hook has none, and isn't guarded by whether there is one."""
    model, assistant = copy.deepcopy(random_pair)
    options = {"assistant_model": assistant, "judge": linear_judge, "max_new_tokens": 30}
    options |= {"do_sample": False, "num_assistant_tokens": 5, "return_dict_in_generate": True}
    thresholds, prompt = (0.0, 0.5), torch.tensor([[7, 7, 3]])
    expected = [model.generate(prompt, judge_threshold=threshold, **options) for threshold in thresholds]
    assert expected[1].num_judge_accepted > 0 and expected[1].num_judge_rejected > 0
    if way == "compile":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=way == "whole forward")
    for threshold, output in zip(thresholds, expected):
        compiled = model.generate(prompt, judge_threshold=threshold, **options)
        assert torch.equal(compiled.sequences, output.sequences)
        assert torch.equal(compiled.num_judge_accepted, output.num_judge_accepted)


def test_another_threads_forward_is_not_what_the_head_reads():
    model = random_llama()

    def meanwhile(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=model, args=(PROMPT,))
            thread.start()
            thread.join()

    model.lm_head.register_forward_hook(meanwhile)
    assert head_reads_last_states(model)


def test_a_forward_that_is_kept_from_being_compiled_is_not_compiled():
    model = random_llama()
    assert not is_compiled(model)
    model.forward = torch.compiler.disable(model.forward)
    assert not is_compiled(model)


def test_models_are_asked_one_after_the_other():
    """Compiled ones run eagerly, which is said for the process: of two threads the last would leave it so."""
    inside, met = threading.Barrier(2), []

    def meet(*_):
        with contextlib.suppress(threading.BrokenBarrierError):
            inside.wait(timeout=1)
            met.append(True)

    models = [random_llama(), random_llama()]
    for model in models:
        model.lm_head.register_forward_hook(meet)
    threads = [threading.Thread(target=head_reads_last_states, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not met


@pytest.mark.usefixtures("compiler")
def test_a_compiled_target_that_mixes_states_for_its_head(linear_judge):
    model = random_model("gemma3n_text", seed=0)
    model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(ValueError, match="compiled Gemma3nForCausalLM"):
        model.generate(PROMPT, assistant_model=similar_model(model), judge=linear_judge, max_new_tokens=4)


def test_a_compiled_assistant_drafts_as_well(random_pair, top_k):
    """A wrapper's `forward` doesn't name the positions, without which a padded row is drafted for badly."""
    model, assistant = random_pair
    options = {"judge": top_k, "judge_threshold": 0.5, "do_sample": False, "max_new_tokens": 20}
    options |= {"num_assistant_tokens": 3, "return_dict_in_generate": True}
    plain, compiled = (
        model.generate(**left_padded([[3, 14, 15, 9, 2], [8]]), assistant_model=drafter, **options)
        for drafter in (assistant, torch.compile(assistant, backend="eager"))
    )
    assert torch.equal(compiled.sequences, plain.sequences)
    assert torch.equal(compiled.num_matches, plain.num_matches)

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = assistant

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "model" else getattr(self.model, name)

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

    alone = [model.generate(PROMPT, assistant_model=drafter, **options) for drafter in (assistant, Wrapped())]
    assert torch.equal(alone[0].num_matches, alone[1].num_matches)
    with pytest.raises(ValueError, match="batches of models whose `forward` takes no `position_ids`"):
        model.generate(**left_padded([[3, 4, 5], [6]]), assistant_model=Wrapped(), **options)


@pytest.mark.parametrize("drafter", ["assistant_model", "prompt_lookup_num_tokens"])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_processors_see_what_generate_shows_them(random_pair, top_k, drafter, threshold):
    """Rows as wide as the batch, never longer than the response may be: one may keep a table of its steps."""
    model, assistant = random_pair
    prompts = [[3, 14, 15, 9, 3, 14, 2, 3, 14, 15, 7, 2, 3], [5, 6, 5, 6, 5]]
    torch.manual_seed(0)
    steps = torch.randn(8, 32) * 0.01

    class Steps(LogitsProcessor):
        def __call__(self, input_ids, scores):
            assert input_ids.shape[1] >= 13
            return scores + steps[input_ids.shape[1] - 13]

    options = {"do_sample": False, "max_new_tokens": 8, "logits_processor": LogitsProcessorList([Steps()])}
    expected = model.generate(**left_padded(prompts), **options)
    draft = {"assistant_model": assistant} if drafter == "assistant_model" else {drafter: 4}
    output = model.generate(**left_padded(prompts), judge=top_k, judge_threshold=threshold, **draft, **options)
    assert threshold > 0 or torch.equal(output, expected)


def test_masks_of_any_dtype(random_pair, top_k):
    model, assistant = random_pair
    inputs = left_padded([[3, 14, 15, 9, 2], [8]])
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=9)
    for dtype in (torch.bool, torch.int32, torch.float32, torch.float16):
        mask = inputs["attention_mask"].to(dtype)
        output = model.generate(
            inputs["input_ids"],
            attention_mask=mask,
            max_new_tokens=9,
            assistant_model=assistant,
            judge=top_k,
            **LOSSLESS,
        )
        assert torch.equal(output, expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("cache_implementation", [None, "static"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_prompts_are_read_in_chunks(top_k, family, cache_implementation, num_rows):
    """No forward takes more tokens, and the text is the same; judged, too, and behind an earlier call's cache."""
    model = random_llama() if family == "llama" else random_model(family, seed=0)
    inputs = left_padded([[3, 14, 15, 9, 2, 6, 5] * 4, [7, 7, 3], [12, 4, 4, 4, 8]][:num_rows])
    options = {"assistant_model": similar_model(model), "judge": top_k, "num_assistant_tokens": 3, "do_sample": False}
    options |= {"max_new_tokens": 20, "cache_implementation": cache_implementation, "eos_token_id": None}
    widths = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for threshold in (0.0, 0.8):
        expected = model.generate(**inputs, **options, judge_threshold=threshold)
        for chunk_size in (4, 5, 9, 27, 28, 100):
            widths.clear()
            got = model.generate(**inputs, **options, judge_threshold=threshold, prefill_chunk_size=chunk_size)
            assert torch.equal(got, expected)
            num_chunks = -(-28 // chunk_size)
            assert widths[: num_chunks - 1] == [chunk_size] * (num_chunks - 1) and widths[num_chunks] == 4
    hook.remove()


def test_a_chunked_prompt_goes_on_from_a_cache(random_pair, top_k):
    model, assistant = random_pair
    options = {"assistant_model": assistant, "judge": top_k, **LOSSLESS, "return_dict_in_generate": True}
    first = model.generate(PROMPT, max_new_tokens=9, prefill_chunk_size=2, **options)
    text = torch.cat([first.sequences, PROMPT], dim=1)
    expected = model.generate(text, max_new_tokens=9, do_sample=False)
    more = {CACHE_NAME: first[CACHE_NAME], "prefill_chunk_size": 3}
    assert torch.equal(model.generate(text, max_new_tokens=9, **more, **options).sequences, expected)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prefill_chunk_size": 0}, "`prefill_chunk_size=0`, which must be an int of at least 1"),
        ({"prefill_chunk_size": 2.5}, "`prefill_chunk_size=2.5`, which must be an int"),
        ({"prefill_chunk_size": 4, "output_hidden_states": True}, "where a prompt's states are kept or read"),
    ],
)
def test_chunks_that_cannot_be_are_refused(random_pair, top_k, more, message):
    model, assistant = random_pair
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPT, assistant_model=assistant, judge=top_k, max_new_tokens=4, **more)
