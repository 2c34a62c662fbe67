# SPDX-License-Identifier: Apache-2.0
"""What a judge sees: positions, order, and the figures from the logits, compared with arithmetic by hand."""

import math

import pytest
import torch

from autojudge_hf import JudgeConfig
from autojudge_hf.features import judge_inputs, logit_features


def test_positions_and_order():
    candidate_ids, logits = torch.tensor([[3, 1]]), torch.randn(1, 3, 5)
    target, assistant = torch.arange(6.0).view(1, 3, 2), -torch.arange(9.0).view(1, 3, 3)
    of_candidates = judge_inputs(candidate_ids, logits, target, assistant, "candidate").features
    assert of_candidates.tolist() == [[[-3, -4, -5, 2, 3], [-6, -7, -8, 4, 5]]]
    previous = judge_inputs(candidate_ids, logits, target, None, "previous").features
    assert previous.tolist() == [[[0, 1], [2, 3]]]
    both = judge_inputs(candidate_ids, logits, target, assistant, "both").features
    assert both.tolist() == [[[0, -1, -2, -3, -4, -5, 0, 1, 2, 3], [-3, -4, -5, -6, -7, -8, 2, 3, 4, 5]]]
    assert both.shape[-1] == JudgeConfig(hidden_size=2, assistant_hidden_size=3, state_position="both").num_features
    assert judge_inputs(candidate_ids, logits, None, None, "candidate").features.shape == (1, 2, 0)


def test_logit_features_by_hand():
    p = [0.5, 0.25, 0.125, 0.125]
    logits = torch.tensor([p, p]).log()[None] + 3.0  # a constant changes nothing
    best, third = logit_features(torch.tensor([[0, 2]]), logits)[0].tolist()
    entropy = -sum(x * math.log(x) for x in p)
    assert best == pytest.approx([math.log(0.5), 0.0, 0.0, entropy])
    assert third == pytest.approx([math.log(0.125), math.log(0.5 / 0.125), math.log(3), entropy])


def test_a_forbidden_candidate_has_no_finite_score():
    """Logits processors say minus infinity: then no judge on these features may accept."""
    logits = torch.tensor([[[0.0, 1.0, -math.inf]]])
    features = logit_features(torch.tensor([[2]]), logits)[0, 0]
    assert not features.isfinite().all()
    assert logit_features(torch.tensor([[1]]), logits)[0, 0].isfinite().all()


def test_logit_features_follow_the_states():
    candidate_ids, logits, states = torch.tensor([[3, 1]]), torch.randn(1, 3, 5), torch.randn(1, 3, 2)
    features = judge_inputs(candidate_ids, logits, states, None, "candidate", True).features
    assert features.shape == (1, 2, 6)
    assert torch.equal(features[..., 2:], logit_features(candidate_ids, logits[:, :2]))
