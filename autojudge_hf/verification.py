# SPDX-License-Identifier: Apache-2.0
"""The accept rule: which candidates of a cycle stay, and the target's own token after them.

Tensors in, tensors out; no model. Shapes: b rows, k candidates, v entries of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch


class RowOutcome(NamedTuple):
    """A row's cycle, on the host.

    Attributes:
        block (`list[int]`): accepted candidates, then the target's own token.
        matched, judged (`list[int]`): for each candidate 1 where it was accepted for this reason.
        num_candidates (`int`): how many candidates there were.
    """

    block: list[int]
    matched: list[int]
    judged: list[int]
    num_candidates: int


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

    def on_host(self, candidate_ids: torch.LongTensor, lengths: torch.LongTensor) -> list[RowOutcome]:
        """What each row comes to, by one copy from the device; `lengths` as in `verify_greedy`."""
        k = candidate_ids.shape[1]
        columns = (self.next_token[:, None], lengths[:, None], candidate_ids, self.matched, self.judged)
        outcomes = []
        for own, n, *rest in torch.cat(columns, dim=1).tolist():
            candidates, matched, judged = rest[:k], rest[k : 2 * k], rest[2 * k :]
            outcomes.append(RowOutcome([*candidates[: sum(matched) + sum(judged)], own], matched, judged, n))
        return outcomes


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
    candidate_ids: torch.Tensor,
    target_logits: torch.Tensor,
    is_harmless: torch.Tensor | None,
    lengths: torch.Tensor | None = None,
) -> Verification:
    """Keeps candidates while each is the target's argmax, or harmless.

    Args:
        candidate_ids (`torch.LongTensor` of shape `(b, k)`): the assistant's tokens.
        target_logits (`torch.FloatTensor` of shape `(b, k + 1, v)`): the target's processed logits; position i
            follows candidate i - 1, so that `target_logits[:, i]` is for candidate i and the last one is for the
            bonus token.
        is_harmless (`torch.BoolTensor` of shape `(b, k)`, *optional*): what the judge would accept.
        lengths (`torch.LongTensor` of shape `(b,)`, *optional*): how many of a row's candidates there really are,
            all k by default; behind a shorter draft the target's own token follows.
    """
    choices = target_logits.argmax(dim=-1)
    matches = candidate_ids == choices[:, :-1]
    is_candidate = _is_candidate(candidate_ids, lengths)
    return _accepted_prefix(matches, is_harmless, is_candidate, lambda n: choices.gather(1, n[:, None]).squeeze(1))


def verify_sampled(
    candidate_ids: torch.Tensor,
    target_logits: torch.Tensor,
    assistant_logits: torch.Tensor | None,
    is_harmless: torch.Tensor | None,
    lengths: torch.Tensor | None = None,
) -> Verification:
    """Speculative sampling (arXiv 2211.17192, algorithm 1) in which a harmless rejection is taken back.

    With p and q the processed target and draft distributions, a position's token is x with probability
    `min(p, q)(x) + [q - p]+(x) 1[x harmless] + (sum over important y of [q - p]+(y)) norm([p - q]+)(x)`.
    Without a judge that is p.

    Args:
        candidate_ids, target_logits, is_harmless, lengths: see `verify_greedy`.
        assistant_logits (`torch.FloatTensor` of shape `(b, k, v)`, *optional*): the processed logits that the
            candidates were drawn from; minus infinity where the assistant has no such token. `None`: each candidate
            was certain.
    """
    k = candidate_ids.shape[1]
    p = target_logits.softmax(dim=-1)
    # Behind the last candidate there is no q: the residual is p itself.
    q = torch.zeros_like(p)
    is_candidate = _is_candidate(candidate_ids, lengths)
    if k > 0:
        if assistant_logits is None:
            drawn_from = torch.zeros_like(p[:, :k]).scatter(2, candidate_ids[..., None], 1.0)
        else:
            drawn_from = assistant_logits.softmax(dim=-1)
        q[:, :k] = drawn_from * is_candidate[..., None]
    p_candidate = p[:, :-1].gather(2, candidate_ids[..., None]).squeeze(2)
    q_candidate = q[:, :k].gather(2, candidate_ids[..., None]).squeeze(2)
    matches = torch.rand_like(q_candidate) * q_candidate < p_candidate

    def draw(n: torch.Tensor) -> torch.Tensor:
        at = n[:, None, None].expand(-1, 1, p.shape[-1])
        residual = (p.gather(1, at) - q.gather(1, at)).clamp(min=0).squeeze(1)
        # p = q exactly leaves no residual mass; then nothing is rejected, but rounding can say otherwise.
        empty = residual.sum(dim=-1, keepdim=True) <= 0
        residual = torch.where(empty, p.gather(1, at).squeeze(1), residual)
        return torch.multinomial(residual, num_samples=1).squeeze(1)

    return _accepted_prefix(matches, is_harmless, is_candidate, draw)


def _is_candidate(candidate_ids: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    if lengths is None:
        return torch.ones_like(candidate_ids, dtype=torch.bool)
    return torch.arange(candidate_ids.shape[1], device=lengths.device) < lengths[:, None]


def _accepted_prefix(
    matches: torch.Tensor,
    is_harmless: torch.Tensor | None,
    is_candidate: torch.Tensor,
    next_token: Callable[[torch.Tensor], torch.Tensor],
) -> Verification:
    accepted = matches if is_harmless is None else matches | is_harmless
    prefix = (accepted & is_candidate).long().cumprod(dim=1).bool()
    return Verification(prefix & matches, prefix & ~matches, next_token(prefix.sum(dim=1)))
