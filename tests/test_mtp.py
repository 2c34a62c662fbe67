# SPDX-License-Identifier: Apache-2.0
"""A target's own heads for tokens further on (`use_mtp`): stock's drafts, and the target's tokens."""

import copy
import functools
import gc
import json
import shutil
import threading
import time
import weakref

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
from safetensors.torch import load_file, save_file
from test_evaluation import EvenLength
from test_hybrids import FAMILIES as hybrid_families
from test_mining import assert_same, mine_random
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LogitsProcessorList,
    MellumConfig,
    MellumForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.cache_utils import MtpCache
from transformers.generation import candidate_generator
from transformers.modeling_layers import MtpModel

import autojudge_hf.generation
from autojudge_hf import AutoJudge, JudgeConfig, evaluate_judge, judge_decoding
from autojudge_hf.fixed_cache import FixedCache
from autojudge_hf.model_properties import CACHE_NAME
from autojudge_hf.mtp import MTPCandidateGenerator


WINDOW = 8
NUM_LAYERS = 2
SIZES = {
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": None,
}
runs = pytest.mark.skipif(
    not hasattr(MtpModel, "forward_layer"), reason="this transformers can't run one head at a time, and is refused"
)


def save_with_heads(whole, folder, num_heads, layer_name, name, **config):
    """A checkpoint in which the last layers of `whole` are heads, under the names that the family's have."""
    scaled_up(whole).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for i in range(num_heads):
        prefix = f"model.layers.{NUM_LAYERS + i}."
        for old in [key for key in weights if key.startswith(prefix)]:
            weights[layer_name(i) + old.removeprefix(prefix)] = weights.pop(old)
        norms = {name(i, norm): 1 + 0.3 * torch.randn(32) for norm in ("enorm", "hnorm", "norm")}
        weights |= {**norms, name(i, "eh_proj"): 0.3 * torch.randn(32, 64)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    saved = json.loads((folder / "config.json").read_text())
    for key in ("layer_types", "mlp_layer_types"):
        if saved.get(key):
            saved[key] = saved[key][:NUM_LAYERS]
    saved |= {"num_hidden_layers": NUM_LAYERS, "num_nextn_predict_layers": num_heads, **config}
    (folder / "config.json").write_text(json.dumps(saved))


def save_glm(folder, num_heads=2, **sizes):
    """Heads whose layers follow the model's own."""
    torch.manual_seed(3)
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    config = Glm4MoeConfig(num_hidden_layers=NUM_LAYERS + num_heads, **{**experts, **SIZES, **sizes})
    whole = Glm4MoeForCausalLM(config)

    def name(i, of):
        return f"model.layers.{NUM_LAYERS + i}.{'shared_head.norm' if of == 'norm' else of}.weight"

    save_with_heads(whole, folder, num_heads, lambda i: f"model.layers.{NUM_LAYERS + i}.", name)


def save_mellum(folder, **sizes):
    """One head, with a window."""
    torch.manual_seed(3)
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    config = MellumConfig(
        num_hidden_layers=3, layer_types=kinds, sliding_window=WINDOW, num_experts=4, **{**SIZES, **sizes}
    )
    names = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "norm": "norm", "eh_proj": "fc"}
    save_with_heads(
        MellumForCausalLM(config),
        folder,
        1,
        lambda i: f"mtp.layers.{i}.",
        lambda i, of: f"mtp.{names[of]}.weight",
        mtp_layer_types=["sliding_attention"],
        mtp_mlp_layer_types=["sparse"],
    )


def save_ling(folder):
    """A hybrid, whose head keeps no state."""
    torch.manual_seed(3)
    kinds = {"layer_types": ["linear_attention", "full_attention", "full_attention"]}
    kinds["mlp_layer_types"] = ["dense", "sparse", "sparse"]
    sizes = {**hybrid_families["bailing_hybrid"], **SIZES, "num_key_value_heads": 4, **kinds}
    config = CONFIG_MAPPING["bailing_hybrid"](num_hidden_layers=NUM_LAYERS + 1, num_mtp_layers=1, **sizes)

    def name(i, of):
        return f"model.layers.{NUM_LAYERS + i}.{'shared_head.norm' if of == 'norm' else of}.weight"

    mtp = {"mtp_layer_types": ["full_attention"], "mtp_mlp_layer_types": ["sparse"], "num_mtp_layers": 1}
    whole = AutoModelForCausalLM.from_config(config)
    save_with_heads(whole, folder, 1, lambda i: f"model.layers.{NUM_LAYERS + i}.", name, **mtp)


def save_three_heads(folder):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0, "partial_rotary_factor": 1.0}
    save_glm(folder, 3, max_position_embeddings=24, rope_parameters=rope)


FAMILIES = {
    "glm": (save_glm, Glm4MoeForCausalLM, 2),
    "mellum": (save_mellum, MellumForCausalLM, 1),
    "three_heads": (save_three_heads, Glm4MoeForCausalLM, 3),
}


@pytest.fixture(scope="module", params=["glm", "mellum"])
def family(request, tmp_path_factory):
    """A checkpoint's folder, the class that it is of, and the number of heads."""
    save, model_class, num_heads = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    save(folder)
    with pytest.MonkeyPatch.context() as patch:
        if model_class is Glm4MoeForCausalLM:
            # The class knows the layer numbers of the sizes that were published.
            own = rf"model\.layers\.[{NUM_LAYERS}-{NUM_LAYERS + num_heads - 1}]\."
            patch.setattr(model_class, "_keys_to_ignore_on_load_unexpected", [own])
        yield folder, model_class, num_heads


def load(family):
    folder, model_class, _ = family
    return model_class.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pair(family):
    """As the oracles have it: the target drafts for itself."""
    return load(family), None


def stock_draft(model, tokens, penalty):
    """What transformers' own generator drafts behind a text, from one forward over all of it."""
    generator = candidate_generator.MTPCandidateGenerator(
        model,
        GenerationConfig(do_sample=False),
        {},
        LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty)]),
    )
    return drafts_of_stock(model, generator, tokens)


@runs
@pytest.mark.parametrize(
    ("num_rows", "more", "penalty"),
    [
        (1, {}, 1.0),
        (3, {}, 1.0),
        (3, {"num_assistant_tokens": 1}, 1.0),
        (3, {"num_assistant_tokens": "adaptive"}, 1.0),
        (1, {"repetition_penalty": 1.5}, 1.5),
    ],
)
def test_drafts_are_those_of_stock(family, pair, top_k, num_rows, more, penalty, monkeypatch):
    *_, num_heads = family
    drafts = drafts_of_a_judged_call(
        monkeypatch, MTPCandidateGenerator, pair, top_k, num_rows, WINDOW, use_mtp=True, **more
    )
    longest = {1: 1, None: num_heads, "adaptive": 8}[more.get("num_assistant_tokens")]
    assert max(len(candidates) for _, candidates in drafts) == longest
    for text, candidates in drafts:
        of_stock = stock_draft(pair[0], text, penalty)
        assert candidates[:num_heads] == of_stock[: len(candidates)]


def long_draft(model, tokens, num_candidates):
    """From nothing, without a cache: behind its last head, a model goes on with that head's own states."""
    heads, ids = MtpModel.from_pretrained(model), torch.tensor([tokens])
    states, candidates = [model(ids[:, :-1], output_hidden_states=True).hidden_states[-1]], []
    for i in range(num_candidates):
        head = min(i, len(heads.layers) - 1)
        if i >= len(heads.layers):
            states[head] = torch.cat([states[head], states[-1][:, -1:]], dim=1)
        behind = torch.tensor([[*tokens, *candidates]])[:, -states[head].shape[1] :]
        end = len(tokens) + i
        positions = torch.arange(end - behind.shape[1], end)[None]
        states[head + 1 :] = [heads.forward_layer(head, states[head], positions, MtpCache(), input_ids=behind)]
        candidates.append(model.lm_head(states[-1][0, -1]).argmax().item())
    return candidates


@runs
@pytest.mark.skipif("bailing_hybrid" not in CONFIG_MAPPING, reason="younger than the transformers installed here")
def test_a_target_that_keeps_a_state(top_k, tmp_path, monkeypatch):
    """States that are read again, beside the next draft, are no news to its heads."""
    monkeypatch.setattr(autojudge_hf.generation, "LONGEST_REREAD", 8)
    save_ling(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    options = {"use_mtp": True, "num_assistant_tokens": 3}
    drafts = drafts_of_a_judged_call(monkeypatch, MTPCandidateGenerator, (model, None), top_k, 1, WINDOW, **options)
    assert {len(candidates) for _, candidates in drafts} >= {0, 3}
    for text, candidates in drafts:
        assert candidates[:1] == stock_draft(model, text, 1.0)[: len(candidates)]
        assert candidates == long_draft(model, text, len(candidates))
    check_lossless((model, None), top_k, 1, **options)


@runs
@pytest.mark.parametrize("num_rows", [1, 3])
def test_long_drafts_go_on_with_the_last_head(pair, top_k, num_rows, monkeypatch):
    options = {"use_mtp": True, "num_assistant_tokens": 5}
    drafts = drafts_of_a_judged_call(monkeypatch, MTPCandidateGenerator, pair, top_k, num_rows, WINDOW, **options)
    assert max(len(candidates) for _, candidates in drafts) == 5
    for text, candidates in drafts:
        assert candidates == long_draft(pair[0], text, len(candidates))


@runs
@pytest.mark.parametrize("family", ["glm"], indirect=True)
def test_a_prompt_with_a_gap(pair, top_k, monkeypatch):
    """Of what is masked, nothing is drafted from. (A window counts it: such a target sees another text.)"""
    drafts, get_candidates = [], MTPCandidateGenerator.get_candidates
    monkeypatch.setattr(
        MTPCandidateGenerator, "get_candidates", lambda *args: drafts.append(get_candidates(*args)) or drafts[-1]
    )
    prompt = torch.tensor([[*PROMPTS[0][:5], 0, 0, *PROMPTS[0][5:]]])
    pair[0].generate(prompt, attention_mask=(prompt != 0).long(), judge=top_k, use_mtp=True, **OPTIONS)
    sequence, _ = drafts[0]
    text = sequence[sequence != 0].tolist()
    num_known = len(PROMPTS[0]) + 1
    assert text[num_known:] == stock_draft(pair[0], text[:num_known], 1.0)


@runs
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("num_assistant_tokens", [None, 1, 5, "adaptive"])
def test_lossless(pair, top_k, num_assistant_tokens, cache, num_rows):
    options = {"num_assistant_tokens": num_assistant_tokens, "use_mtp": True, **cache}
    output = check_lossless(pair, top_k, num_rows, **options)
    if num_rows == 1:
        assert isinstance(output[CACHE_NAME], FixedCache) == bool(cache)


@runs
@pytest.mark.parametrize("more", [{"repetition_penalty": 1.3}, {"output_hidden_states": True}])
def test_the_same_as_plain_decoding(pair, top_k, more):
    target, _ = pair
    options = {**OPTIONS, "return_dict_in_generate": True, **more}
    got = target.generate(torch.tensor(PROMPTS[:1]), judge=top_k, judge_threshold=0.0, use_mtp=True, **options)
    expected = target.generate(torch.tensor(PROMPTS[:1]), **options)
    assert torch.equal(got.sequences, expected.sequences)
    if "output_hidden_states" in more:
        for ours, its in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-4)


@runs
def test_without_a_judge(pair):
    target, _ = pair
    prompt = torch.tensor(PROMPTS[:1])
    got = target.generate(prompt, custom_generate=functools.partial(judge_decoding), use_mtp=True, **OPTIONS)
    assert torch.equal(got, target.generate(prompt, **OPTIONS))


@runs
def test_a_batch_gives_what_rows_give_alone(pair):
    check_rows_alone(pair, use_mtp=True)


@runs
def test_sampling_draws_from_the_target(pair, top_k):
    check_sampling(pair, top_k, use_mtp=True)


@runs
@pytest.mark.parametrize(("family", "num_assistant_tokens"), [("glm", 4), ("mellum", None)], indirect=["family"])
def test_mining_asks_as_decoding_does(family, num_assistant_tokens):
    *_, num_heads = family
    model, length = load(family), num_assistant_tokens or num_heads
    model.generation_config.use_mtp = True
    draft = functools.partial(long_draft, model, num_candidates=length)
    check_mining((model, None), draft, length, num_assistant_tokens=num_assistant_tokens)


@runs
@pytest.mark.parametrize("family", ["glm"], indirect=True)
def test_a_mined_folder_is_of_these_heads(family, tmp_path, monkeypatch):
    model, (folder, *_) = load(family), family
    model.generation_config.use_mtp = True
    mined = mine_random((model, None), MINED[:1], output_dir=tmp_path / "mined")
    again = load(family)
    again.generation_config.use_mtp = True
    assert_same(mine_random((again, None), MINED[:1], output_dir=tmp_path / "mined"), mined)
    weights = load_file(folder / "model.safetensors")
    weights = {name: x + 0.1 if "eh_proj" in name else x for name, x in weights.items()}
    other = shutil.copytree(folder, tmp_path / "other")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    other = load((other, *family[1:]))
    other.generation_config.use_mtp = True
    with pytest.raises(ValueError, match="assistant_weights"):
        mine_random((other, None), MINED[:1], output_dir=tmp_path / "mined")


def test_mining_without_heads_is_refused(tmp_path):
    model = random_llama()
    for name, message in (
        ("use_mtp", "has no `num_mtp_layers`"),
        ("prompt_lookup_num_tokens", "a model to ask"),
    ):
        setattr(model.generation_config, name, 3)
        with pytest.raises(ValueError, match=message):
            mine_random((model, None), MINED, output_dir=tmp_path / "mined")
        setattr(model.generation_config, name, None)
    model.generation_config.update(use_mtp=True, assistant_early_exit=1)
    with pytest.raises(ValueError, match="two drafters at once \\(assistant_early_exit, use_mtp\\)"):
        mine_random((model, None), MINED, output_dir=tmp_path / "mined")
    assert not (tmp_path / "mined").exists()


@runs
def test_a_judge_may_read_what_the_heads_thought(pair):
    target, _ = pair
    judge = AutoJudge.from_config(JudgeConfig(judge_type="kl"))
    options = {**OPTIONS, "use_mtp": True, "judge": judge, "return_dict_in_generate": True}
    output = target.generate(torch.tensor(PROMPTS[:1]), judge_threshold=0.999, **options)
    assert output.num_judge_accepted.sum() > 0


@runs
def test_evaluation_drafts_as_the_model_says(tokenizer, tmp_path):
    save_mellum(tmp_path, vocab_size=len(tokenizer))
    target = MellumForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    target.generation_config.use_mtp = True
    judge = AutoJudge.from_config(JudgeConfig(judge_type="kl"))
    examples = [{"text": "A farmer has 12 cows.", "even": True}, {"text": "Four boxes hold", "even": False}]
    options = {"thresholds": [1.0], "max_new_tokens": 21, "batch_size": 2}
    lossless, judged = evaluate_judge(target, None, tokenizer, examples, EvenLength(), judge, **options)
    assert judged["num_target_forwards"] == [10, 10] and min(lossless["num_target_forwards"]) > 15


@runs
def test_heads_are_read_once_and_go_with_their_model(family, top_k, monkeypatch):
    target, calls = load(family), []
    from_pretrained = MtpModel.from_pretrained
    monkeypatch.setattr(
        MtpModel, "from_pretrained", lambda *args, **kw: calls.append(1) or from_pretrained(*args, **kw)
    )
    options = {**OPTIONS, "use_mtp": True, "judge": top_k}
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        target.to(dtype).generate(torch.tensor(PROMPTS[:1]), **options)
    assert len(calls) == 1
    gone = weakref.ref(target)
    del target
    gc.collect()
    assert gone() is None


@runs
def test_heads_use_what_their_model_has_now(family):
    """Other embeddings and another head, say; and what stock keeps in full precision stays in it."""
    target, judge = load(family), AutoJudge.from_config(JudgeConfig(judge_type="kl"))
    options = {**OPTIONS, "use_mtp": True, "judge": judge, "judge_threshold": 0.0}
    target.generate(torch.tensor(PROMPTS[:1]), **options)
    target.resize_token_embeddings(24)
    target.lm_head = copy.deepcopy(target.lm_head)
    expected = target.generate(torch.tensor(PROMPTS[:1]), **OPTIONS)
    assert torch.equal(target.generate(torch.tensor(PROMPTS[:1]), **options), expected)
    heads = MTPCandidateGenerator(target, do_sample=False, output_logits=False).heads
    assert heads.shared_head is target.lm_head
    folder, model_class, _ = family
    half = model_class.from_pretrained(folder, dtype=torch.bfloat16).eval()
    half.generate(torch.tensor(PROMPTS[:1]), **options)
    heads = MTPCandidateGenerator(half, do_sample=False, output_logits=False).heads
    dtypes = [
        {name.partition("mlp.")[2]: x.dtype for name, x in layer.state_dict().items() if "mlp." in name}
        for layer in (heads.layers[0], half.model.layers[-1])
    ]
    assert dtypes[0] == dtypes[1]


@runs
@pytest.mark.parametrize("family", ["three_heads"], indirect=True)
def test_heads_that_look_beyond_the_targets_positions(family, top_k):
    """Rotations that change with the length seen (dynamic NTK) are the target's alone."""
    target = load(family)
    for seed in range(12):
        torch.manual_seed(seed)
        prompt = torch.randint(1, 16, (1, 11))
        options = {"do_sample": False, "max_new_tokens": 40}
        expected = target.generate(prompt, **options)
        got = target.generate(prompt, use_mtp=True, judge=top_k, judge_threshold=0.0, **options)
        assert torch.equal(got, expected), seed


@runs
def test_threads_read_the_heads_once(family, top_k, monkeypatch):
    """And leave the process's default dtype alone."""
    folder, model_class, _ = family
    target = model_class.from_pretrained(folder, dtype=torch.bfloat16).eval()
    read, calls = MtpModel.from_pretrained, []

    def slowly(*args, **kwargs):
        calls.append(1)
        time.sleep(0.1)
        return read(*args, **kwargs)

    monkeypatch.setattr(MtpModel, "from_pretrained", slowly)
    options = {**OPTIONS, "use_mtp": True, "judge": top_k}
    threads = [
        threading.Thread(target=target.generate, args=(torch.tensor(PROMPTS[:1]),), kwargs=options) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and torch.get_default_dtype() == torch.float32


@runs
def test_an_offloaded_target(pair, top_k):
    target, _ = pair
    offloaded = cpu_offload(copy.deepcopy(target), execution_device="cpu")
    options = {**OPTIONS, "judge": top_k, "judge_threshold": 0.0}
    expected = target.generate(torch.tensor(PROMPTS[:1]), use_mtp=True, **options)
    assert torch.equal(offloaded.generate(torch.tensor(PROMPTS[:1]), use_mtp=True, **options), expected)


@runs
def test_what_cannot_work_is_refused(pair, top_k):
    target, _ = pair
    model = copy.deepcopy(target)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    cache, text = DynamicCache(), torch.tensor(PROMPTS[:1])
    target(text[:, :-3], **{CACHE_NAME: cache})
    reader = AutoJudge.from_config(JudgeConfig(assistant_hidden_size=32))
    for wrong, message in (
        ({"judge": reader}, "of size 32, and `use_mtp` has none"),
        ({"assistant_model": random_llama(0, 16)}, "two drafters at once \\(assistant_model, use_mtp\\)"),
        ({CACHE_NAME: cache}, "a cache of an earlier call with a drafter that reads the target's states"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(text, **{"judge": top_k, "use_mtp": True, **OPTIONS, **wrong})


@runs
def test_a_checkpoint_without_heads_is_told_before_any_forward(family, top_k, tmp_path):
    model = load(family)
    made = type(model)(copy.deepcopy(model.config))
    made.config.name_or_path = ""
    with pytest.raises(ValueError, match="reads a target's heads from its checkpoint, and this .* has none"):
        made.generate(torch.tensor(PROMPTS[:1]), judge=top_k, use_mtp=True, **OPTIONS)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    with pytest.raises(RuntimeError, match="weights are missing"):
        model.generate(torch.tensor(PROMPTS[:1]), judge=top_k, use_mtp=True, **OPTIONS)


def test_other_models_and_older_transformers_are_refused(top_k, monkeypatch):
    model = random_llama(0, 16)
    options = {"judge": top_k, "use_mtp": True, **OPTIONS}
    with pytest.raises(ValueError, match="`use_mtp` for LlamaForCausalLM, whose config has no `num_mtp_layers`"):
        model.generate(torch.tensor(PROMPTS[:1]), **options)
    model.config.num_mtp_layers = 1
    monkeypatch.delattr(MtpModel, "forward_layer", raising=False)
    with pytest.raises(ValueError, match="`use_mtp` takes transformers 5.20 or newer, got 5"):
        model.generate(torch.tensor(PROMPTS[:1]), **options)
