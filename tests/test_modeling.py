# SPDX-License-Identifier: Apache-2.0
"""Judges on disk: what was saved comes back, and nothing else loads."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import PROMPT, random_llama, similar_model
from safetensors.torch import save_file
from transformers import GenerationConfig

import autojudge_hf.modeling
from autojudge_hf import (
    AutoJudge,
    EntropyJudge,
    Judge,
    JudgeConfig,
    KLJudge,
    LinearJudge,
    MarginJudge,
    MLPJudge,
    RuleJudge,
    TopKJudge,
    symbol_token_ids,
)
from autojudge_hf.configuration import GREEDY_SETTINGS, decoding_settings, public_name
from autojudge_hf.features import JudgeInputs
from autojudge_hf.verification import harmless


TRAINING_FREE = (TopKJudge, RuleJudge, MarginJudge, EntropyJudge, KLJudge)


@pytest.fixture
def linear():
    judge = AutoJudge.from_config(
        JudgeConfig(
            hidden_size=6,
            assistant_hidden_size=2,
            threshold=0.25,
            base_model_name_or_path="org/target",
            base_model_revision="abc",
            assistant_model_name_or_path="/home/someone/models/draft",
            task="gsm8k",
        )
    )
    judge.load_state_dict({"weight": torch.arange(8.0), "bias": torch.tensor([-3.0])})
    return judge


def test_save_and_load(linear, tmp_path):
    linear.save_pretrained(tmp_path / "judge")
    loaded = AutoJudge.from_pretrained(tmp_path / "judge")
    assert isinstance(loaded, LinearJudge) and loaded.config == linear.config
    for name, tensor in linear.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    files = sorted(str(p.relative_to(tmp_path / "judge")) for p in (tmp_path / "judge").rglob("*") if p.is_file())
    assert files == [
        "README.md",
        "config.json",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
        "model.safetensors",
    ]


def test_what_no_judge_can_be_made_of(linear):
    with pytest.raises(ValueError, match=r"`JudgeConfig`, got \{'judge_type'.*from_dict"):
        AutoJudge.from_config(linear.config.to_dict())
    with pytest.raises(ValueError, match=r"Unknown judge_type 'crystal'.*knows \['entropy', 'kl', 'linear'"):
        AutoJudge.from_config(JudgeConfig(judge_type="crystal"))
    for ignored in ({"hidden_size": 4}, {"assistant_hidden_size": 4}, {"assistant_logit_features": True}):
        with pytest.raises(ValueError, match=r"\['linear', 'mlp'\] judges, and a 'margin' one would ignore them"):
            JudgeConfig(judge_type="margin", **ignored)


def test_no_machine_paths_in_config_and_card(linear, tmp_path):
    linear.save_pretrained(tmp_path)
    for name in ("config.json", "README.md"):
        text = (tmp_path / name).read_text()
        assert "draft" in text and "org/target" in text
        assert "/home" not in text and str(tmp_path) not in text


@pytest.mark.parametrize("judge_class", TRAINING_FREE)
def test_training_free_judges_need_nothing(judge_class, tmp_path):
    judge = AutoJudge.from_config(JudgeConfig(judge_type=judge_class.judge_type))
    judge.save_pretrained(tmp_path)
    loaded = AutoJudge.from_pretrained(tmp_path)
    assert type(loaded) is judge_class and loaded.config == judge.config


def random_inputs(num_candidates=500, vocab=12):
    torch.manual_seed(0)
    logits, assistant = torch.randn(2, 1, num_candidates, vocab).mul(3)
    return JudgeInputs(torch.randint(vocab, (1, num_candidates)), logits, torch.empty(1, num_candidates, 0), assistant)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.91, 0.99])
def test_training_free_judges_accept_by_their_rules(threshold):
    """Each rule as its source puts it, in plain arithmetic on probabilities."""
    inputs = random_inputs()
    expected = {"margin": [], "entropy": [], "kl": []}
    rows = zip(inputs.candidate_ids[0], inputs.target_logits[0].double(), inputs.assistant_logits[0].double())
    for candidate, target_logits, assistant_logits in rows:
        p, q = target_logits.softmax(0), assistant_logits.softmax(0)
        expected["margin"].append(bool(p[candidate] > (1 - threshold) * p.max()))
        epsilon, entropy = 1 - threshold, -(p * p.log()).sum()
        expected["entropy"].append(bool(p[candidate] > min(epsilon, epsilon**0.5 * (-entropy).exp())))
        expected["kl"].append(bool(1 - (-(p * (p / q).log()).sum()).exp() < threshold))
    for judge_type, accepted in expected.items():
        judge = AutoJudge.from_config(JudgeConfig(judge_type=judge_type))
        assert harmless(judge(inputs), threshold)[0].tolist() == accepted
        assert threshold == 0.1 or 0 < sum(accepted) < len(accepted)


@pytest.mark.parametrize("judge_class", TRAINING_FREE)
def test_training_free_judges_at_the_ends(judge_class):
    """Equal models, the best token: accepted by the smallest threshold."""
    judge = judge_class(JudgeConfig(judge_type=judge_class.judge_type))
    certain = torch.tensor([[[50.0, -50.0, -torch.inf]]])
    best = judge(JudgeInputs(torch.tensor([[0]]), certain, torch.empty(1, 1, 0), certain))
    assert best.isfinite().all() and harmless(best, 0.4).all()
    # The assistant of a pair with padded vocabularies lacks tokens: minus infinity, and no NaN from it.
    padded = certain.clone()
    padded[..., 1] = -torch.inf
    score = judge(JudgeInputs(torch.tensor([[0]]), certain, torch.empty(1, 1, 0), padded))
    assert score.isfinite().all() and harmless(score, 0.4).all()


def test_top_k_accepts_by_rank():
    logits = torch.tensor([[[5.0, 4.0, 3.0, 2.0, 1.0]]]).expand(1, 5, 5)
    inputs = JudgeInputs(torch.arange(5)[None], logits, torch.empty(1, 5, 0))
    scores = torch.sigmoid(TopKJudge(JudgeConfig(judge_type="top_k"))(inputs))[0]
    assert (scores.diff() > 0).all() and scores[0] == pytest.approx(1 / 3)  # as a rank of 1.5
    for threshold, best in ((0.6, 2), (0.7, 3), (0.76, 4)):
        assert (scores < threshold).tolist() == [rank <= best for rank in range(1, 6)]


def test_a_rule_judge_is_top_k_but_for_symbols(tmp_path, tokenizer):
    inputs, symbols = random_inputs(), [2, 7, 11]
    judge = RuleJudge(JudgeConfig(judge_type="rule", important_token_ids=symbols))
    judge.save_pretrained(tmp_path)
    scores = AutoJudge.from_pretrained(tmp_path)(inputs)
    by_rank = TopKJudge(JudgeConfig(judge_type="top_k"))(inputs)
    own = inputs.target_logits.argmax(-1)
    for candidate, best, score, expected in zip(inputs.candidate_ids[0].tolist(), own[0], scores[0], by_rank[0]):
        is_symbol = candidate in symbols or best in symbols
        assert harmless(score, 0.99) == (not is_symbol and harmless(expected, 0.99))
        assert is_symbol or score == expected
    assert harmless(scores, 1.0).all()
    for others in ([], [2**31 - 1]):  # however large an id, it takes no more room than another
        judge = RuleJudge(JudgeConfig(judge_type="rule", important_token_ids=others))
        assert torch.equal(judge(inputs), by_rank) and judge.symbols.numel() == 1
    texts = {token: tokenizer.decode([token]) for token in symbol_token_ids(tokenizer)}
    assert {"0", "=", "+"} <= {text.strip() for text in texts.values()} and all(texts.values())
    assert not {"apples", "the"} & {text.strip() for text in texts.values()}


def test_mlp_score_by_hand(tmp_path):
    judge = MLPJudge(JudgeConfig(judge_type="mlp", hidden_size=3, intermediate_size=2))
    assert judge.decision_function(torch.ones(3)).isnan()
    tensors = {
        "hidden_weight": torch.tensor([[1.0, -1.0], [0.5, 2.0], [0.0, 1.0]]),
        "hidden_bias": torch.tensor([0.25, -1.0]),
        "weight": torch.tensor([2.0, -3.0]),
        "bias": torch.tensor([0.5]),
    }
    judge.load_state_dict(tensors)
    judge.save_pretrained(tmp_path)
    loaded = AutoJudge.from_pretrained(tmp_path)
    # relu(1 + 1 + .25) = 2.25 and relu(-1 + 4 + 3 - 1) = 5; relu(-1 + .25) = 0 and relu(1 - 1) = 0
    scores = loaded.decision_function(torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 0.0]]))
    assert isinstance(loaded, MLPJudge) and scores.tolist() == [0.5 + 4.5 - 15.0, 0.5]


def test_thresholds_by_name():
    config = JudgeConfig(judge_type="top_k", thresholds={"1 point": 0.6, "5 points": 1})
    assert config.threshold_named("5 points") == 1.0
    with pytest.raises(ValueError, match=r"'1 point', '5 points'.*'2 points'.*calibrate_threshold"):
        config.threshold_named("2 points")
    for wrong in ({"1 point": 2}, {1: 0.5}, [0.5], {"1 point": "0.5"}):
        with pytest.raises(ValueError, match="thresholds"):
            JudgeConfig(judge_type="top_k", thresholds=wrong)
    for name, wrong in (("important_token_ids", [1, -1]), ("important_token_ids", "12"), ("intermediate_size", 0)):
        with pytest.raises(ValueError, match=name):
            JudgeConfig(judge_type="rule", **{name: wrong})


def test_linear_score_is_the_dot_product(linear):
    features = torch.randn(1, 3, 8)
    inputs = JudgeInputs(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, 4), features)
    expected = [[sum(w * x for w, x in enumerate(row)) - 3.0 for row in rows] for rows in features.tolist()]
    torch.testing.assert_close(linear(inputs), torch.tensor(expected))
    for same in (features[0], features[0].numpy()):
        torch.testing.assert_close(linear.predict_proba(same), torch.sigmoid(torch.tensor(expected[0])))


@pytest.mark.parametrize(
    ("tensors", "messages"),
    [
        ({"weight": torch.zeros(8)}, ["missing: bias"]),
        ({"weight": torch.zeros(8), "bias": torch.zeros(1), "more": torch.zeros(1)}, ["unexpected: 'more'"]),
        ({"weight": torch.zeros(9), "bias": torch.zeros(1)}, ["weight", "[8]", "[9]"]),
        ({"weight": torch.full((8,), torch.nan), "bias": torch.tensor([torch.inf])}, ["weight", "bias", "finite"]),
        ({"weight": torch.zeros(8).half(), "bias": torch.zeros(1)}, ["weight", "F32", "F16"]),
        ({"wait": torch.zeros(8)}, ["missing: bias", "missing: weight", "unexpected: 'wait'"]),
    ],
)
def test_wrong_tensors_are_all_named(linear, tmp_path, tensors, messages):
    linear.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        AutoJudge.from_pretrained(tmp_path)
    for message in messages:
        assert message in str(error.value)


def test_as_many_wrong_tensors_as_there_are_are_named(linear, tmp_path):
    linear.save_pretrained(tmp_path)
    save_file({f"layer.{i}": torch.zeros(1) for i in range(300)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        AutoJudge.from_pretrained(tmp_path, subfolder=None)
    assert all(f"'layer.{i}'" in str(error.value) for i in range(300))


def test_broken_files(linear, tmp_path):
    linear.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good = weights.read_bytes(), config.read_text()
    for content in (b"", b"not safetensors", good[0][:-5]):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match="valid safetensors"):
            AutoJudge.from_pretrained(tmp_path)
    weights.write_bytes(good[0])
    for content, message in (
        ("{", "valid JSON"),
        (good[1] + " " * 2**22, "isn't valid JSON: it has 4[0-9]{6} bytes"),
        ("[]", "isn't a judge's"),
        ('{"model_type": "llama"}', "isn't a judge's"),
        (json.dumps({**json.loads(good[1]), "judge_type": "oracle"}), "'oracle'.*linear.*top_k"),
        (json.dumps({**json.loads(good[1]), "from_the_future": 1}), "from_the_future"),
        (json.dumps({**json.loads(good[1]), "threshold": 2}), "threshold"),
        (json.dumps({**json.loads(good[1]), "hidden_size": "6"}), "hidden_size"),
    ):
        config.write_text(content)
        with pytest.raises(ValueError, match=message):
            AutoJudge.from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(OSError, match=r"config\.json.*model\.safetensors"):
        AutoJudge.from_pretrained(tmp_path)
    with pytest.raises(OSError):
        AutoJudge.from_pretrained("nobody/no-such-judge")


def test_config_defaults_and_refusals():
    for judge_type, size in (("linear", {"hidden_size": 4}), ("top_k", {})):
        assert isinstance(AutoJudge.from_config(JudgeConfig(judge_type=judge_type, **size)), Judge)
    with pytest.raises(ValueError, match="hidden_size"):
        AutoJudge.from_config(JudgeConfig())
    with pytest.raises(ValueError, match="state_position.*'next'"):
        JudgeConfig(state_position="next")
    with pytest.raises(ValueError, match="`logit_features` must be True or False, got 1"):
        JudgeConfig(logit_features=1)
    with pytest.raises(ValueError, match="LinearJudge needs judge_type='linear', got 'top_k'"):
        LinearJudge(JudgeConfig(judge_type="top_k"))
    with pytest.raises(OSError, match="from_pretrained"):
        AutoJudge()
    with pytest.raises(ValueError, match="finite"):
        JudgeConfig(judge_type="top_k", training={"C": float("nan")})
    for wrong, owner in (({"important_token_ids": [1]}, "rule"), ({"intermediate_size": 3}, "mlp")):
        with pytest.raises(ValueError, match=f"is for '{owner}' judges, and a 'margin' one would ignore it"):
            JudgeConfig(judge_type="margin", **wrong)
    # As documented.
    documented = {"linear": 0.5, "mlp": 0.5, "kl": 0.5, "top_k": 0.6, "rule": 0.6, "margin": 0.9, "entropy": 0.91}
    assert {judge_type: JudgeConfig(judge_type=judge_type).threshold for judge_type in documented} == documented


def test_settings_that_only_sampling_reads_are_neutral_under_greedy_decoding():
    values = {"temperature": 0.3, "top_k": 7, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.4}
    assert decoding_settings(GenerationConfig(do_sample=False, **values)) == GREEDY_SETTINGS
    sampling = decoding_settings(GenerationConfig(do_sample=True, **values))
    assert sampling == {**GREEDY_SETTINGS, "do_sample": True, **values}


def test_names_without_folders():
    assert public_name("org/model") == "org/model" and public_name("model") == "model"
    for path in ("models/llama/8b", "/home/me/8b", "./8b", "../me/8b", "~/8b"):
        assert public_name(path) == "8b"
    assert public_name("/home/me/.cache/huggingface/hub/models--org--8b/snapshots/0a1b2c") == "org/8b"


def test_a_cast_judge_is_saved_whole(linear, tmp_path):
    half = copy.deepcopy(linear).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "judge")
    loaded = AutoJudge.from_pretrained(tmp_path / "judge")
    assert loaded.weight.dtype == torch.float32 and torch.equal(loaded.weight, half.weight.float())


def test_a_full_disk_leaves_the_former_judge(linear, tmp_path, monkeypatch):
    linear.save_pretrained(tmp_path / "judge")
    before = {name: (tmp_path / "judge" / name).read_bytes() for name in ("config.json", "model.safetensors")}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(autojudge_hf.modeling, "save_file", full)
    other = copy.deepcopy(linear)
    other.config.threshold = 0.9
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(tmp_path / "judge")
    assert {name: (tmp_path / "judge" / name).read_bytes() for name in before} == before
    assert not [path for path in (tmp_path / "judge").iterdir() if path.name.startswith(".")]


def test_saved_judge_as_custom_generate(tmp_path):
    """A process that never imports the library itself decodes with the judge's folder alone."""
    model = random_llama()
    model.save_pretrained(tmp_path / "target")
    similar_model(model).save_pretrained(tmp_path / "draft")
    judge = AutoJudge.from_config(JudgeConfig(judge_type="top_k"))
    judge.save_pretrained(tmp_path / "judge")
    code = f"""
import torch
from transformers import AutoModelForCausalLM
load = lambda name: AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + name, dtype=torch.float32)
output = load("target").generate(
    torch.tensor([[3, 14, 15]]), assistant_model=load("draft"), do_sample=False, max_new_tokens=20,
    custom_generate={str(tmp_path / "judge")!r}, trust_remote_code=True,
)
print("tokens", output[0].tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    expected = model.generate(
        torch.tensor([[3, 14, 15]]),
        assistant_model=similar_model(model),
        judge=judge,
        do_sample=False,
        max_new_tokens=20,
    )
    assert f"tokens {expected[0].tolist()}" in result.stdout


def test_a_folder_that_is_saved_to_again_is_loaded_again(random_pair, tmp_path):
    model, assistant = random_pair
    judge = AutoJudge.from_config(JudgeConfig(judge_type="top_k"))
    accepted = []
    for threshold in (1.0, 0.0, 1.0):
        judge.config.threshold = threshold
        judge.save_pretrained(tmp_path / "judge")
        options = {"custom_generate": str(tmp_path / "judge"), "trust_remote_code": True, "do_sample": False}
        options |= {"max_new_tokens": 60, "return_dict_in_generate": True}
        accepted.append(model.generate(PROMPT, assistant_model=assistant, **options).num_judge_accepted.item())
    assert accepted[1] == 0 < accepted[0] == accepted[2]


@pytest.mark.parametrize("mode", [True, False])
def test_saving_does_not_depend_on_the_modules_mode(linear, tmp_path, mode):
    """`nn.Module` has a flag of its own, `training`, which `train` and `eval` set."""
    linear.train(mode).save_pretrained(tmp_path)
    assert torch.equal(AutoJudge.from_pretrained(tmp_path).weight, linear.weight)
