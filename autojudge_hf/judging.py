# SPDX-License-Identifier: Apache-2.0
"""Asking a judge about the candidates of a cycle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .features import judge_inputs
from .verification import harmless, of_candidates


if TYPE_CHECKING:
    from .modeling import Judge


class Judging:
    """A judge at a threshold, what it has to be shown, and whether that was finite.

    Args:
        judge (`Judge`, *optional*): `None` accepts no mismatch, and is never asked.
        threshold (`float`): what scores below is harmless. At 0 nobody is asked either.
        device (`torch.device`): of the candidates.

    Attributes:
        judge (`Judge`, *optional*): who is asked, or `None`.
        judge_type (`str`, *optional*): of which type.
        reads_target, reads_assistant, reads_assistant_logits (`bool`): which states and logits have to be kept for it.
    """

    def __init__(self, judge: Judge | None, threshold: float, device: torch.device):
        self.judge, self.threshold = judge if threshold > 0.0 else None, threshold
        # Once, or each question would wait for its weights. (Apple's GPUs can't hold a bias in double precision.)
        if self.judge is not None and device.type != "mps":
            self.judge.to(device)
        config = None if self.judge is None else self.judge.config
        self.judge_type = None if config is None else config.judge_type
        reads_states = config is not None and judge.reads_states
        self.reads_target = reads_states and config.hidden_size is not None
        self.reads_assistant = reads_states and config.assistant_hidden_size is not None
        self.reads_assistant_logits = config is not None and judge.reads_assistant_logits
        self._num_state_features = 0 if config is None else config.num_state_features
        self._sums_of_states: list[torch.Tensor] = []

    def wants(self, matches: torch.Tensor) -> bool:
        """Whether to ask, given which candidates match, shape `(b, k)`."""
        if self.judge is None or matches.shape[1] == 0:
            return False
        # Elsewhere it takes less time to ask than to see whether there is something to ask.
        return matches.device.type != "cpu" or any(False in row for row in matches.tolist())

    # The processor's caches are full of the models, and this way an operation runs through less code.
    @torch.inference_mode()
    def __call__(
        self,
        candidate_ids: torch.LongTensor,
        logits: torch.Tensor,
        states: torch.Tensor | None,
        assistant_states: torch.Tensor | None,
        assistant_logits: torch.Tensor | None,
    ) -> torch.Tensor:
        """Which candidates may stay even if they don't match, shape `(b, k)`.

        Args:
            candidate_ids, assistant_states, assistant_logits: see `judge_inputs`.
            logits (`torch.FloatTensor` of shape `(b, k + 1, v)`): the target's, processed.
            states (`torch.FloatTensor` of shape `(b, k + 1, h)`, *optional*): the target's.
        """
        inputs = judge_inputs(candidate_ids, logits, states, assistant_states, assistant_logits, self.judge.config)
        # Logit features of a candidate that processors forbid are infinite, and no cause for alarm.
        self._sums_of_states.append(inputs.features[..., : self._num_state_features].sum())
        is_harmless = harmless(self.judge(inputs), self.threshold)
        if self.threshold >= 1.0:
            return is_harmless
        # Not what logits processors forbid, whatever a judge makes of it.
        return is_harmless & of_candidates(inputs.target_logits, candidate_ids).isfinite()

    def saw_only_finite_states(self) -> bool:
        return not self._sums_of_states or bool(torch.stack(self._sums_of_states).isfinite().all())
