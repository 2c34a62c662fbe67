# SPDX-License-Identifier: Apache-2.0
"""What a judge sees: positions, order, and the figures from the logits, compared with arithmetic by hand."""

import math

import pytest
import torch

from autojudge_hf import AutoJudge, JudgeConfig
from autojudge_hf.features import assistant_logit_features, judge_inputs, kl_divergence, logit_features
from autojudge_hf.judging import Judging


def test_positions_and_order():
    candidate_ids, logits = torch.tensor([[3, 1]]), torch.randn(1, 3, 5)
    target, assistant = torch.arange(6.0).view(1, 3, 2), -torch.arange(9.0).view(1, 3, 3)
    of_candidates = judge_inputs(
        candidate_ids, logits, target, assistant, None, JudgeConfig(state_position="candidate")
    ).features
    assert of_candidates.tolist() == [[[-3, -4, -5, 2, 3], [-6, -7, -8, 4, 5]]]
    previous = judge_inputs(candidate_ids, logits, target, None, None, JudgeConfig(state_position="previous")).features
    assert previous.tolist() == [[[0, 1], [2, 3]]]
    assert torch.equal(
        judge_inputs(candidate_ids, logits, target, None, None, JudgeConfig(state_position="both")).target_logits,
        logits[:, :2],
    )
    both = judge_inputs(candidate_ids, logits, target, assistant, None, JudgeConfig(state_position="both")).features
    assert both.tolist() == [[[0, -1, -2, -3, -4, -5, 0, 1, 2, 3], [-3, -4, -5, -6, -7, -8, 2, 3, 4, 5]]]
    assert both.shape[-1] == JudgeConfig(hidden_size=2, assistant_hidden_size=3, state_position="both").num_features
    assert judge_inputs(
        candidate_ids, logits, None, None, None, JudgeConfig(state_position="candidate")
    ).features.shape == (1, 2, 0)


def test_logit_features_by_hand():
    p = [0.5, 0.25, 0.125, 0.125]
    logits = torch.tensor([p, p]).log()[None] + 3.0  # a constant changes nothing
    best, third = logit_features(torch.tensor([[0, 2]]), logits)[0].tolist()
    entropy = -sum(x * math.log(x) for x in p)
    assert best == pytest.approx([math.log(0.5), 0.0, 0.0, entropy])
    assert third == pytest.approx([math.log(0.125), math.log(0.5 / 0.125), math.log(3), entropy])


@pytest.mark.parametrize("judge_type", ["linear", "mlp", "top_k", "rule", "margin", "entropy", "kl"])
def test_a_forbidden_candidate_is_never_harmless(judge_type):
    """Logits processors say minus infinity; the learned judges here would take anything, without a look at that."""
    size = {"hidden_size": 2} if judge_type in ("linear", "mlp") else {}
    judge = AutoJudge.from_config(JudgeConfig(judge_type=judge_type, **size))
    judge.load_state_dict(
        {name: torch.zeros_like(x) - 50 * (name == "bias") for name, x in judge.state_dict().items()}
    )
    logits, states = torch.tensor([[[2.0, 1.9, -math.inf]] * 3]), torch.ones(1, 3, 2)
    asked = torch.tensor([[1, 2]]), logits, states, None, logits[:, :2]
    assert Judging(judge, 1 - 1e-9, logits.device)(*asked).tolist() == [[True, False]]
    assert Judging(judge, 1.0, logits.device)(*asked).tolist() == [[True, True]]


def test_a_forbidden_candidate_shows_in_its_logit_features():
    logits = torch.tensor([[[0.0, 1.0, -math.inf]]])
    features = logit_features(torch.tensor([[2]]), logits)[0, 0]
    assert not features.isfinite().all()
    assert logit_features(torch.tensor([[1]]), logits)[0, 0].isfinite().all()


def test_logit_features_follow_the_states():
    candidate_ids, logits, states = torch.tensor([[3, 1]]), torch.randn(1, 3, 5), torch.randn(1, 3, 2)
    features = judge_inputs(candidate_ids, logits, states, None, None, JudgeConfig(logit_features=True)).features
    assert features.shape == (1, 2, 6)
    assert torch.equal(features[..., 2:], logit_features(candidate_ids, logits[:, :2]))


def test_assistant_logit_features_by_hand():
    p, q = [0.5, 0.25, 0.25, 0.0], [0.125, 0.375, 0.5, 0.0]
    target, assistant = torch.tensor([[p]]).log(), torch.tensor([[q]]).log() - 1.0
    candidate, kl = assistant_logit_features(torch.tensor([[2]]), target, assistant)[0, 0].tolist()
    assert candidate == pytest.approx(math.log(0.5))
    assert kl == pytest.approx(0.5 * math.log(4) + 0.25 * math.log(2 / 3) + 0.25 * math.log(0.5))
    assert not assistant_logit_features(torch.tensor([[3]]), target, assistant)[0, 0, 0].isfinite()


def test_kl_where_one_model_lacks_tokens():
    """What the target can't write doesn't matter; what the assistant can't is what the rest hides, in nats."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    none = torch.tensor([0.0, 0.0, -math.inf])
    without = torch.tensor([0.625, 0.375])
    by_target = (without * (without / q[:2]).log()).sum()
    torch.testing.assert_close(kl_divergence(p.log() + none, q.log()), by_target)
    of_both = (without * (without / torch.tensor([0.4, 0.6])).log()).sum()
    torch.testing.assert_close(kl_divergence(p.log(), q.log() + none), of_both - math.log(0.8))
    # Nearly all that the target would write, and the models aren't alike.
    assert kl_divergence(torch.tensor([0.0, 0.0, 9.0]), none) > 8
    assert kl_divergence(torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0])).isinf()


@pytest.mark.parametrize("position", ["candidate", "previous", "both"])
def test_columns_are_where_the_config_says(position):
    candidate_ids, logits, drafted = torch.tensor([[3, 1]]), torch.randn(1, 3, 5), torch.randn(1, 2, 5)
    target, assistant = torch.randn(1, 3, 2), torch.randn(1, 3, 3)
    features = judge_inputs(
        candidate_ids,
        logits,
        target,
        assistant,
        drafted,
        JudgeConfig(state_position=position, logit_features=True, assistant_logit_features=True),
    ).features
    config = JudgeConfig(
        hidden_size=2,
        assistant_hidden_size=3,
        state_position=position,
        logit_features=True,
        assistant_logit_features=True,
    )
    expected = {
        "assistant state, previous": assistant[:, :2],
        "assistant state, candidate": assistant[:, 1:],
        "target state, previous": target[:, :2],
        "target state, candidate": target[:, 1:],
        "logit features": logit_features(candidate_ids, logits[:, :2]),
        "assistant logit features": assistant_logit_features(candidate_ids, logits[:, :2], drafted),
    }
    assert features.shape[-1] == config.num_features
    assert len(config.feature_columns) == (6 if position == "both" else 4)
    for name, at in config.feature_columns.items():
        assert torch.equal(features[..., at], expected[name])
    states = [expected[name] for name in config.feature_columns if "state" in name]
    assert torch.equal(features[..., : config.num_state_features], torch.cat(states, dim=-1))
