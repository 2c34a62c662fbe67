# SPDX-License-Identifier: Apache-2.0
"""What a judge sees of a candidate. Mining and decoding both call `judge_inputs`, so that they can't differ."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .configuration import JudgeConfig
from .verification import of_candidates


class JudgeInputs(NamedTuple):
    """All that verification knows of k candidates in b rows.

    Attributes:
        candidate_ids (`torch.LongTensor` of shape `(b, k)`).
        target_logits (`torch.FloatTensor` of shape `(b, k, v)`): the target's processed logits for each candidate's
            position.
        features (`torch.FloatTensor` of shape `(b, k, f)`): hidden states in fp32, the assistant's first, then the
            target's, then the logit features, then those of both models' logits; `f` is `JudgeConfig.num_features`,
            and 0 for a judge that reads none.
        assistant_logits (`torch.FloatTensor` of shape `(b, k, v)`, *optional*): the processed logits that the
            candidates were drafted from, for a judge that reads them.
    """

    candidate_ids: torch.Tensor
    target_logits: torch.Tensor
    features: torch.Tensor
    assistant_logits: torch.Tensor | None = None


def judge_inputs(
    candidate_ids: torch.Tensor,
    target_logits: torch.Tensor,
    target_states: torch.Tensor | None,
    assistant_states: torch.Tensor | None,
    assistant_logits: torch.Tensor | None,
    config: JudgeConfig,
) -> JudgeInputs:
    """Selects and joins what belongs to each candidate.

    Args:
        candidate_ids (`torch.LongTensor` of shape `(b, k)`).
        target_logits (`torch.FloatTensor` of shape `(b, k + 1, v)`): logits after the last committed token and
            after each candidate.
        target_states (`torch.FloatTensor` of shape `(b, k + 1, h)`, *optional*): the target's last hidden states at
            the same positions.
        assistant_states (`torch.FloatTensor` of shape `(b, k + 1, h_a)`, *optional*): the assistant's.
        assistant_logits (`torch.FloatTensor` of shape `(b, k, v)`, *optional*): what the draft was made from.
        config ([`JudgeConfig`]): which of these the judge reads, and at which positions.
    """
    k = candidate_ids.shape[1]
    target_logits = target_logits[:, :k]
    previous, candidate = slice(0, k), slice(1, k + 1)
    positions = {"candidate": [candidate], "previous": [previous], "both": [previous, candidate]}[
        config.state_position
    ]
    given = [states for states in (assistant_states, target_states) if states is not None]
    device = candidate_ids.device
    states = [states[:, at].to(device, torch.float32) for states in given for at in positions]
    if config.logit_features:
        states.append(logit_features(candidate_ids, target_logits))
    if config.assistant_logit_features:
        states.append(assistant_logit_features(candidate_ids, target_logits, assistant_logits))
    features = torch.cat(states, dim=-1) if states else torch.empty(*candidate_ids.shape, 0, device=device)
    return JudgeInputs(candidate_ids, target_logits, features, assistant_logits)


def logit_features(candidate_ids: torch.LongTensor, target_logits: torch.Tensor) -> torch.Tensor:
    """What the target's own distribution says of the candidates, shape `(b, k, 4)`.

    In the order of `LOGIT_FEATURES`: log-probability of the candidate (nats), how far it is below the best token's,
    logarithm of its rank (the best token's is 0), entropy (nats). A candidate that logits processors forbid has values
    that aren't finite.

    Args:
        candidate_ids (`torch.LongTensor` of shape `(b, k)`).
        target_logits (`torch.FloatTensor` of shape `(b, k, v)`).
    """
    log_p = target_logits.log_softmax(dim=-1)
    candidate = log_p.gather(2, candidate_ids[..., None])
    num_better = (log_p > candidate).sum(dim=-1, keepdim=True, dtype=torch.float32)
    margin = log_p.amax(dim=-1, keepdim=True) - candidate
    return torch.cat([candidate, margin, num_better.log1p(), entropy(log_p)[..., None]], dim=-1)


def entropy(log_p: torch.Tensor) -> torch.Tensor:
    """In nats, of distributions given as logarithms: `(..., v)` to `(...)`."""
    # Zero times minus infinity is no number, and counts as zero. (`torch.special.entr` takes much longer on a CPU.)
    return -(log_p.exp() * log_p).nansum(dim=-1)


def assistant_logit_features(
    candidate_ids: torch.LongTensor, target_logits: torch.Tensor, assistant_logits: torch.Tensor
) -> torch.Tensor:
    """What the assistant's distribution adds, shape `(b, k, 2)`.

    In the order of `ASSISTANT_LOGIT_FEATURES`: the assistant's log-probability of the candidate (nats), and
    `kl_divergence`.

    Args:
        candidate_ids (`torch.LongTensor` of shape `(b, k)`).
        target_logits, assistant_logits (`torch.FloatTensor` of shape `(b, k, v)`).
    """
    candidate = of_candidates(assistant_logits.log_softmax(dim=-1), candidate_ids)
    return torch.stack([candidate, kl_divergence(target_logits, assistant_logits)], dim=-1)


def kl_divergence(target_logits: torch.Tensor, assistant_logits: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, p the target's distribution: `(..., v)` to `(...)`.

    Over the tokens that both could write, less the logarithm of p's share of them: what the assistant lacks counts,
    and a little of it, as in the padding of a vocabulary, counts little.
    """
    log_p, log_q = target_logits.log_softmax(dim=-1), assistant_logits.log_softmax(dim=-1)
    both = log_p.isfinite() & log_q.isfinite()
    log_share = torch.where(both, log_p, -torch.inf).logsumexp(dim=-1)
    log_p = log_p - log_share[..., None]
    return torch.where(both, log_p.exp() * (log_p - log_q), 0.0).sum(dim=-1) - log_share
