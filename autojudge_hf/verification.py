# SPDX-License-Identifier: Apache-2.0
"""The accept rule: which candidates of a cycle stay, and the target's own token after them.

Tensors in, accepted prefix out; no model. Shapes: b rows, k candidates, v entries of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch


class RowOutcome(NamedTuple):
    """A row's cycle, on the host.

    Attributes:
        block (`list[int]`): accepted candidates, then the target's own token.
        judged (`list[bool]`): for each accepted candidate, whether it's a mismatch that the judge calls harmless.
        num_candidates (`int`): how many candidates there were.
    """

    block: list[int]
    judged: list[bool]
    num_candidates: int


class Verification(NamedTuple):
    """What the target says of every candidate, should those before it all be accepted.

    Attributes:
        matches (`torch.BoolTensor` of shape `(b, k)`): it agrees.
        own_tokens (`torch.LongTensor` of shape `(b, k + 1)`): what the target writes in the candidate's place: a
            correction, and behind the last candidate a bonus.
    """

    matches: torch.Tensor
    own_tokens: torch.Tensor

    def accept(
        self,
        candidate_ids: torch.LongTensor,
        is_harmless: torch.Tensor | None,
        lengths: Sequence[int],
        eos_token_ids: Collection[int],
    ) -> list[RowOutcome]:
        """Keeps candidates while each matches or is harmless; by one copy from the device.

        Args:
            candidate_ids (`torch.LongTensor` of shape `(b, k)`): the assistant's tokens.
            is_harmless (`torch.BoolTensor` of shape `(b, k)`, *optional*): what the judge would accept.
            lengths (`Sequence[int]`): how many of each row's candidates there really are. Behind a shorter draft the
                target's own token follows, and none is a candidate behind an EOS token.
            eos_token_ids (`Collection[int]`): which these are.
        """
        k = candidate_ids.shape[1]
        columns = [candidate_ids, self.own_tokens, self.matches]
        if is_harmless is not None:
            columns.append(is_harmless)
        outcomes = []
        for row, length in zip(torch.cat(columns, dim=1).tolist(), lengths):
            candidates, own, matches = row[:k], row[k : 2 * k + 1], row[2 * k + 1 : 3 * k + 1]
            excused = row[3 * k + 1 :] or [0] * k
            n = next((i for i, token in enumerate(candidates[:length], 1) if token in eos_token_ids), length)
            end = next((i for i in range(n) if not matches[i] and not excused[i]), n)
            judged = [not matched for matched in matches[:end]]
            outcomes.append(RowOutcome([*candidates[:end], own[end]], judged, n))
        return outcomes


def of_candidates(values: torch.Tensor, candidate_ids: torch.LongTensor) -> torch.Tensor:
    """The candidates' own entries, `(b, k, v)` to `(b, k)`."""
    return values.gather(2, candidate_ids[..., None]).squeeze(2)


def harmless(score_logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which scores fall below `threshold`, compared as logits.

    In fp32 a sigmoid reaches 1.0, so probabilities could not tell the two ends apart. At 0 nothing is harmless, at
    1 everything is; in between a score that isn't finite never is.
    """
    if threshold >= 1.0:
        return torch.ones_like(score_logits, dtype=torch.bool)
    bound = math.log(threshold) - math.log1p(-threshold) if threshold > 0.0 else -math.inf
    return (score_logits < bound) & (score_logits > -math.inf)


def verify_greedy(candidate_ids: torch.Tensor, target_logits: torch.Tensor) -> Verification:
    """A candidate matches where it is the target's argmax.

    Args:
        candidate_ids (`torch.LongTensor` of shape `(b, k)`): the assistant's tokens.
        target_logits (`torch.FloatTensor` of shape `(b, k + 1, v)`): the target's processed logits; position i
            follows candidate i - 1, so that `target_logits[:, i]` is for candidate i and the last one is for the
            bonus token.
    """
    choices = target_logits.argmax(dim=-1)
    return Verification(candidate_ids == choices[:, :-1], choices)


def verify_sampled(
    candidate_ids: torch.Tensor,
    target_logits: torch.Tensor,
    assistant_logits: torch.Tensor | None,
    lengths: Sequence[int],
) -> Verification:
    """Speculative sampling (arXiv 2211.17192, algorithm 1) in which a harmless rejection is taken back.

    With p and q the processed target and draft distributions, a position's token is x with probability
    `min(p, q)(x) + [q - p]+(x) 1[x harmless] + (sum over important y of [q - p]+(y)) norm([p - q]+)(x)`.
    Without a judge that is p.

    Args:
        candidate_ids, target_logits: see `verify_greedy`.
        assistant_logits (`torch.FloatTensor` of shape `(b, k, v)`, *optional*): the processed logits that the
            candidates were drawn from; minus infinity where the assistant has no such token. `None`: each candidate
            was certain.
        lengths (`Sequence[int]`): how many of each row's candidates there really are.
    """
    k = candidate_ids.shape[1]
    p = target_logits.softmax(dim=-1)
    # Behind the last candidate there is no q: the residual is p itself.
    q = torch.zeros_like(p)
    if k > 0:
        if assistant_logits is None:
            drawn_from = torch.zeros_like(p[:, :k]).scatter(2, candidate_ids[..., None], 1.0)
        else:
            drawn_from = assistant_logits.softmax(dim=-1)
        if min(lengths) < k:
            is_candidate = torch.arange(k, device=p.device) < candidate_ids.new_tensor(lengths)[:, None]
            drawn_from = drawn_from * is_candidate[..., None]
        q[:, :k] = drawn_from
    p_candidate, q_candidate = of_candidates(p[:, :-1], candidate_ids), of_candidates(q[:, :k], candidate_ids)
    matches = torch.rand_like(q_candidate) * q_candidate < p_candidate

    residual = (p - q).clamp(min=0)
    # p = q exactly leaves no residual mass; then nothing is rejected, but rounding can say otherwise.
    residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, p)
    own_tokens = torch.multinomial(residual.flatten(0, 1), num_samples=1).view(p.shape[:2])
    return Verification(matches, own_tokens)
