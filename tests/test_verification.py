# SPDX-License-Identifier: Apache-2.0
"""The accept rule against literal loops and exact distributions."""

import math

import pytest
import torch
from reference import NOT_CHANCE, chi_square_p

from autojudge_hf.verification import harmless, verify_greedy, verify_sampled


def literal_greedy(candidates, choices, is_harmless):
    """One row, one candidate after the other."""
    matched = judged = 0
    for i, candidate in enumerate(candidates):
        if candidate == choices[i]:
            matched += 1
        elif is_harmless is not None and is_harmless[i]:
            judged += 1
        else:
            return matched, judged, choices[i]
    return matched, judged, choices[len(candidates)]


@pytest.mark.parametrize("with_judge", [False, True])
@pytest.mark.parametrize("k", [0, 1, 7])
def test_greedy_rule_equals_a_loop(k, with_judge):
    torch.manual_seed(k)
    candidates = torch.randint(0, 3, (200, k))
    logits = torch.randn(200, k + 1, 3)
    is_harmless = torch.rand(200, k) < 0.5 if with_judge else None
    outcomes = verify_greedy(candidates, logits).accept(candidates, is_harmless, [k] * 200, set())
    for row, (block, judged, n) in enumerate(outcomes):
        expected = literal_greedy(
            candidates[row].tolist(),
            logits[row].argmax(-1).tolist(),
            None if is_harmless is None else is_harmless[row].tolist(),
        )
        assert (len(judged) - sum(judged), sum(judged), block[-1]) == expected
        assert block[:-1] == candidates[row, : len(judged)].tolist()
        assert n == k


def test_what_is_no_candidate_is_not_accepted():
    candidates = torch.tensor([[3, 1, 4, 1], [3, 1, 4, 1], [3, 1, 4, 1]])
    logits = torch.nn.functional.one_hot(torch.tensor([3, 1, 4, 1, 5]), 6).float().expand(3, 5, 6)
    outcomes = verify_greedy(candidates, logits).accept(candidates, None, [4, 2, 4], {5})
    assert [outcome.block for outcome in outcomes] == [[3, 1, 4, 1, 5], [3, 1, 4], [3, 1, 4, 1, 5]]
    # A draft ends with its EOS token; one that is rejected ends it all the same.
    for own, block in ((logits, [3, 1, 4, 1]), (logits.flip(0).roll(1, dims=1), [5])):
        (outcome,) = verify_greedy(candidates[:1], own[:1]).accept(candidates[:1], None, [4], {4})
        assert (outcome.num_candidates, outcome.block) == (3, block)


def test_what_fills_a_draft_up_is_not_accepted_as_eos():
    """The padding is token 0, which may end a response, and a judge may find everything harmless."""
    candidates, everything = torch.tensor([[3, 0, 0]]), torch.ones(1, 3, dtype=torch.bool)
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 5, 5, 5]]), 6).float()
    (outcome,) = verify_greedy(candidates, logits).accept(candidates, everything, [1], {0})
    assert (outcome.block, outcome.num_candidates) == ([3, 5], 1)


def test_threshold_ends_and_scores_that_are_not_finite():
    scores = torch.tensor([[-200.0, -1.0, 0.0, 1.0, 200.0, math.nan, math.inf, -math.inf]])
    assert harmless(scores, 0.0).sum() == 0
    assert harmless(scores, 1.0).all()
    assert harmless(scores, 0.5).tolist() == [[True, True, False, False, False, False, False, False]]
    # sigmoid(200) is 1.0 in fp32; its logit is still above that of any threshold below 1.
    assert harmless(scores, 1.0 - 1e-12).tolist() == [[True, True, True, True, False, False, False, False]]


def formula(p, q, is_harmless):
    """P(x) = min(p, q)(x) + [q - p]+(x) 1[harmless] + (sum of [q - p]+ over important y) norm([p - q]+)(x)."""
    excess, lack = (q - p).clamp(min=0), (p - q).clamp(min=0)
    return torch.minimum(p, q) + excess * is_harmless + (excess * ~is_harmless).sum() * lack / lack.sum()


def first_token_counts(p, q, is_harmless, num_samples=64_000):
    candidates = torch.multinomial(q, num_samples, replacement=True)[:, None]
    result = verify_sampled(
        candidates,
        p.log().expand(num_samples, 2, -1),
        q.log().expand(num_samples, 1, -1),
        [1] * num_samples,
    )
    outcomes = result.accept(candidates, is_harmless[candidates], [1] * num_samples, set())
    tokens = torch.tensor([outcome.block[0] for outcome in outcomes])
    return tokens.bincount(minlength=len(p))


P = torch.tensor([0.4, 0.3, 0.05, 0.15, 0.1])
Q = torch.tensor([0.1, 0.35, 0.3, 0.05, 0.2])
NOTHING = torch.zeros(5, dtype=torch.bool)
SOME = torch.tensor([False, False, True, False, False])


@pytest.mark.parametrize(("is_harmless", "name"), [(NOTHING, "lossless"), (SOME, "judged")])
def test_sampled_rule_has_the_exact_distribution(is_harmless, name):
    torch.manual_seed(3)
    expected = formula(P, Q, is_harmless)
    if name == "lossless":
        torch.testing.assert_close(expected, P)
    assert chi_square_p(first_token_counts(P, Q, is_harmless), expected) > NOT_CHANCE


def test_plain_resampling_would_be_noticed(monkeypatch):
    """A test of the test above: drawing the correction from p instead of the residual must fail it."""
    torch.manual_seed(3)
    real = torch.multinomial

    def from_p(weights, num_samples, **kwargs):
        return real(P.expand_as(weights) if weights.ndim == 2 else weights, num_samples, **kwargs)

    monkeypatch.setattr(torch, "multinomial", from_p)
    assert chi_square_p(first_token_counts(P, Q, NOTHING), P) < 1e-6


def test_bonus_token_comes_from_the_target_alone():
    torch.manual_seed(0)
    n = 32_000
    logits = torch.stack([Q.log(), P.log()]).expand(n, 2, -1)
    candidates = torch.multinomial(Q, n, replacement=True)[:, None]
    for lengths, block_length in (([1] * n, 2), ([0] * n, 1)):
        # With no candidate the first position is the bonus token's, whatever was drafted there.
        result = verify_sampled(candidates, logits.roll(1 - lengths[0], dims=1), Q.log().expand(n, 1, -1), lengths)
        blocks = [outcome.block for outcome in result.accept(candidates, None, lengths, set())]
        assert {len(block) for block in blocks} == {block_length}
        bonus = torch.tensor([block[-1] for block in blocks])
        assert chi_square_p(bonus.bincount(minlength=5), P) > NOT_CHANCE
