# SPDX-License-Identifier: Apache-2.0
"""What decoding returns besides tokens: counts, scores, logits, hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput


if TYPE_CHECKING:
    from transformers import GenerationConfig

    from .verification import RowOutcome


COUNTS = ("num_target_forwards", "num_candidates", "num_matches", "num_judge_accepted", "num_judge_rejected")


@dataclass
class JudgeDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., judge=, return_dict_in_generate=True)` returns: stock fields, and five counts per row.

    A response's first token comes from the prefill. Every verification cycle then commits its accepted candidates
    and one token of the target's own, unless the response ends within the cycle's candidates.

    Args:
        num_target_forwards (`torch.LongTensor` of shape `(batch_size,)`): verification cycles, prefill not counted.
        num_candidates (`torch.LongTensor` of shape `(batch_size,)`): tokens that the assistant proposed.
        num_matches (`torch.LongTensor` of shape `(batch_size,)`): committed because the target agreed.
        num_judge_accepted (`torch.LongTensor` of shape `(batch_size,)`): committed because the judge called the
            mismatch harmless.
        num_judge_rejected (`torch.LongTensor` of shape `(batch_size,)`): mismatches that ended a cycle; the candidates
            after them were dropped unseen. Without a judge, every mismatch reached.
    """

    num_target_forwards: torch.LongTensor | None = None
    num_candidates: torch.LongTensor | None = None
    num_matches: torch.LongTensor | None = None
    num_judge_accepted: torch.LongTensor | None = None
    num_judge_rejected: torch.LongTensor | None = None

    def summary(self) -> str:
        """One line for a reader: what the whole batch's drafts came to."""
        cycles, candidates, matched, judged, rejected = (int(getattr(self, name).sum()) for name in COUNTS)
        dropped = candidates - matched - judged - rejected
        return (
            f"{(cycles + matched + judged) / max(1, cycles):.1f} tokens per cycle: {cycles} cycles, {candidates} "
            f"candidates, {matched} matched, {judged} accepted by the judge, {rejected} rejected and {dropped} behind"
        )


class KeptOutputs:
    """`output_scores`, `output_logits` and `output_hidden_states`, row by row, zeros after a row's end; and counts."""

    def __init__(self, generation_config: GenerationConfig, batch_size: int):
        def wanted(name: str) -> list[list[Any]] | None:
            is_kept = generation_config.return_dict_in_generate and getattr(generation_config, name)
            return [[] for _ in range(batch_size)] if is_kept else None

        self._scores, self._logits = wanted("output_scores"), wanted("output_logits")
        self.hidden_states = wanted("output_hidden_states")
        self._counts = [[0] * len(COUNTS) for _ in range(batch_size)]

    def count(self, row: int, outcome: RowOutcome, num_kept: int) -> None:
        """Adds a verification cycle of a row, of whose block `num_kept` tokens were committed."""
        judged = outcome.judged[:num_kept]
        rejected = num_kept == len(outcome.block) <= outcome.num_candidates
        cycle = (1, outcome.num_candidates, len(judged) - sum(judged), sum(judged), rejected)
        self._counts[row] = [total + n for total, n in zip(self._counts[row], cycle)]

    def add(self, row: int, num_kept: int, scores: torch.Tensor, logits: torch.Tensor, states: Any, j: int) -> None:
        """What the first `num_kept` positions after the last commit of active row j gave."""
        # Copies: a view would keep the whole block.
        if self._scores is not None:
            self._scores[row].append(scores[j, :num_kept].clone())
        if self._logits is not None:
            self._logits[row].append(logits[j, :num_kept].clone())
        if self.hidden_states is not None:
            # The prompt's states all belong to the first token, as in stock `generate`.
            first = states[0].shape[-2] if not self.hidden_states[row] else 1
            for i in range(num_kept):
                at = slice(0, first) if first > 1 else slice(i, i + 1)
                # Gemma 3n's have several streams in front of the rows.
                self.hidden_states[row].append(tuple(layer[..., j : j + 1, at, :].clone() for layer in states))

    def scores(self, row: int, new: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Of each token of a row, `new` ones last, shape `(1, v)`, as stock shows them to stopping criteria."""
        return None if self._scores is None else torch.cat([*self._scores[row], new])[:, None].unbind()

    def output(self) -> dict[str, tuple | None]:
        """The output's fields: for each token, a tensor over rows (hidden states: one per layer)."""
        return {
            "scores": self._by_token(self._scores),
            "logits": self._by_token(self._logits),
            "hidden_states": self._states_by_token(),
            **dict(zip(COUNTS, torch.tensor(self._counts).T)),
        }

    @staticmethod
    def _by_token(kept: list[list[torch.Tensor]] | None) -> tuple[torch.Tensor, ...] | None:
        if kept is None:
            return None
        rows = [torch.cat(blocks) for blocks in kept]
        return torch.nn.utils.rnn.pad_sequence(rows).unbind(0)

    def _states_by_token(self) -> tuple[tuple[torch.Tensor, ...], ...] | None:
        if self.hidden_states is None:
            return None
        longest = max(self.hidden_states, key=len)
        return tuple(
            tuple(
                torch.cat(
                    [row[t][layer] if t < len(row) else torch.zeros_like(states) for row in self.hidden_states], dim=-3
                )
                for layer, states in enumerate(token)
            )
            for t, token in enumerate(longest)
        )
