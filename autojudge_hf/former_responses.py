# SPDX-License-Identifier: Apache-2.0
"""Drafts of what a former response to the same prompt says, where the new one joins it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .candidate_generator import JudgeCandidateGenerator
from .certain_drafts import CertainDrafts


if TYPE_CHECKING:
    from transformers import PreTrainedModel


#: Tokens that must agree, tried in this order.
CONTEXTS = (6, 3, 2)


class FormerResponses(JudgeCandidateGenerator):
    """Drafts what former responses to the same prompts say where the new ones join them; else asks the assistant.

    Two responses that differ by one token mostly go on alike, at the same place or a few tokens on: then a draft costs
    nothing, and may be long. An assistant's draft costs the same for all rows as for one, so that rows of a batch join
    together or not at all. Greedy.

    Args:
        former (`list[list[int]]`): prompt and former response of each row, or nothing.
        num_assistant_tokens (`int`): limit of the assistant's drafts alone.
        args, kwargs: of [`JudgeCandidateGenerator`].
    """

    def __init__(self, former: list[list[int]], num_assistant_tokens: int, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.former, self.num_assistant_tokens = former, num_assistant_tokens

    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        max_candidates: Sequence[int],
        process: Callable[[torch.LongTensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """As [`Drafter.get_candidates`]."""
        newest = input_ids[:, -max(CONTEXTS) :].tolist()
        lengths = [input_ids.shape[1]] if attention_mask is None else attention_mask.sum(dim=1).tolist()
        drafts = [_followers(*row) for row in zip(self.former, newest, lengths)]
        length = min(map(len, drafts))
        if length == 0:
            limits = [min(self.num_assistant_tokens, n) for n in max_candidates]
            return super().get_candidates(input_ids, attention_mask, limits, process)
        self._length = input_ids.shape[1]
        candidate_ids = input_ids.new_tensor([draft[:length] for draft in drafts])[:, : max(max_candidates)]
        return torch.cat([input_ids, candidate_ids], dim=1), None

    def shrink(self, rows: Sequence[int], unneeded: int) -> None:
        super().shrink(rows, unneeded)
        self.former = [self.former[j] for j in rows]


class FormerResponsesAlone(CertainDrafts):
    """The same without an assistant: where a new response doesn't join the former one, nothing is drafted.

    Args:
        former (`list[list[int]]`): prompt and former response of each row, or nothing.
        model (`PreTrainedModel`): the target.
    """

    def __init__(self, former: list[list[int]], model: PreTrainedModel):
        super().__init__(model)
        self.former = former

    def drafts(self, rows: list[torch.LongTensor], max_candidates: Sequence[int]) -> list[list[int]]:
        of_rows = zip(self.former, (row.tolist() for row in rows), max_candidates)
        return [_followers(former, row[-max(CONTEXTS) :], len(row))[:limit] for former, row, limit in of_rows]

    def shrink(self, rows: Sequence[int], unneeded: int) -> None:
        self.former = [self.former[j] for j in rows]


def _followers(former: list[int], newest: list[int], n: int) -> list[int]:
    """What follows in `former` where a row of `n` tokens, the last of which are `newest`, joins it."""
    for length in CONTEXTS:
        if length > n:
            continue  # there the row has padding
        for start in range(max(0, n - 2 * CONTEXTS[0] - length), len(former) - length):
            if former[start : start + length] == newest[-length:]:
                return former[start + length :]
    # Right behind the token that differs there is no context yet.
    return former[n:] if former[n - 1 : n] == newest[-1:] else []
