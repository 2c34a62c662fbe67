# SPDX-License-Identifier: Apache-2.0
"""The accept rule: which candidates of a cycle stay, and the target's own token after them.

Tensors in, tensors out; no model. Shapes: b rows, k candidates, v entries of the vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Verification(NamedTuple):
    """Outcome of one verification cycle.

    Attributes:
        matched (`torch.BoolTensor` of shape `(b, k)`): accepted because the target agrees.
        judged (`torch.BoolTensor` of shape `(b, k)`): mismatches accepted because the judge calls them harmless.
        next_token (`torch.LongTensor` of shape `(b,)`): the target's token after the accepted candidates: a
            correction, or a bonus where all k were accepted.
    """

    matched: torch.Tensor
    judged: torch.Tensor
    next_token: torch.Tensor


def harmless(score_logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which scores fall below `threshold`, compared as logits.

    In fp32 a sigmoid reaches 1.0, so probabilities could not tell the two ends apart. At 0 nothing is harmless, at
    1 everything is; in between a score that isn't finite never is.
    """
    if threshold >= 1.0:
        return torch.ones_like(score_logits, dtype=torch.bool)
    bound = math.log(threshold) - math.log1p(-threshold) if threshold > 0.0 else -math.inf
    return torch.isfinite(score_logits) & (score_logits < bound)


def verify_greedy(
    candidate_ids: torch.Tensor, target_logits: torch.Tensor, is_harmless: torch.Tensor | None
) -> Verification:
    """Keeps candidates while each is the target's argmax, or harmless.

    Args:
        candidate_ids (`torch.LongTensor` of shape `(b, k)`): the assistant's tokens.
        target_logits (`torch.FloatTensor` of shape `(b, k + 1, v)`): the target's processed logits; position i
            follows candidate i - 1, so that `target_logits[:, i]` is for candidate i and the last one is for the
            bonus token.
        is_harmless (`torch.BoolTensor` of shape `(b, k)`, *optional*): what the judge would accept.
    """
    choices = target_logits.argmax(dim=-1)
    matches = candidate_ids == choices[:, :-1]
    return _accepted_prefix(matches, is_harmless, lambda n: choices.gather(1, n[:, None]).squeeze(1))


def verify_sampled(
    candidate_ids: torch.Tensor,
    target_logits: torch.Tensor,
    assistant_logits: torch.Tensor,
    is_harmless: torch.Tensor | None,
) -> Verification:
    """Speculative sampling (arXiv 2211.17192, algorithm 1) in which a harmless rejection is taken back.

    With p and q the processed target and draft distributions, a position's token is x with probability
    `min(p, q)(x) + [q - p]+(x) 1[x harmless] + (sum over important y of [q - p]+(y)) norm([p - q]+)(x)`.
    Without a judge that is p.

    Args:
        candidate_ids, target_logits, is_harmless: see `verify_greedy`.
        assistant_logits (`torch.FloatTensor` of shape `(b, k, v)`): the processed logits that the candidates were
            drawn from; minus infinity where the assistant has no such token.
    """
    p, q = target_logits.softmax(dim=-1), assistant_logits.softmax(dim=-1)
    p_candidate = p[:, :-1].gather(2, candidate_ids[..., None]).squeeze(2)
    q_candidate = q.gather(2, candidate_ids[..., None]).squeeze(2)
    matches = torch.rand_like(q_candidate) * q_candidate < p_candidate

    def draw(n: torch.Tensor) -> torch.Tensor:
        # After the last candidate there is no q: the residual is p itself.
        q_or_zero = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)
        at = n[:, None, None].expand(-1, 1, p.shape[-1])
        residual = (p.gather(1, at) - q_or_zero.gather(1, at)).clamp(min=0).squeeze(1)
        # p = q exactly leaves no residual mass; then nothing is rejected, but rounding can say otherwise.
        empty = residual.sum(dim=-1, keepdim=True) <= 0
        residual = torch.where(empty, p.gather(1, at).squeeze(1), residual)
        return torch.multinomial(residual, num_samples=1).squeeze(1)

    return _accepted_prefix(matches, is_harmless, draw)


def _accepted_prefix(matches: torch.Tensor, is_harmless: torch.Tensor | None, next_token) -> Verification:
    accepted = matches if is_harmless is None else matches | is_harmless
    prefix = accepted.long().cumprod(dim=1).bool()
    return Verification(prefix & matches, prefix & ~matches, next_token(prefix.sum(dim=1)))
