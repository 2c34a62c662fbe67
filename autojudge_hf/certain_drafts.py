# SPDX-License-Identifier: Apache-2.0
"""Drafts that come without a distribution, row by row: of the prompt itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from .drafter import Drafter
from .model_properties import vocab_size


if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


class CertainDrafts(Drafter):
    """Drafts of as many candidates as each row happens to have, all of them certain: there are no logits, no states.

    Args:
        model (`PreTrainedModel`): the target.
    """

    def __init__(self, model: PreTrainedModel):
        self.vocab_size = vocab_size(model)

    def drafts(self, rows: list[torch.LongTensor], max_candidates: Sequence[int]) -> list[list[int]]:
        """At most `max_candidates[j]` tokens behind row j, whose padding is left out."""
        raise NotImplementedError

    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        max_candidates: Sequence[int],
        process: Callable[..., torch.Tensor] | None = None,
    ) -> tuple[torch.LongTensor, None]:
        """As [`Drafter.get_candidates`]. A row's draft ends before what `process` forbids."""
        rows = list(input_ids)
        if attention_mask is not None:
            rows = [row[mask.bool()] for row, mask in zip(rows, attention_mask)]
        drafts = [input_ids.new_tensor(draft) for draft in self.drafts(rows, max_candidates)]
        self.lengths = list(map(len, drafts))
        padded = torch.nn.utils.rnn.pad_sequence(drafts, batch_first=True)
        for i in range(padded.shape[1] if process is not None else 0):
            logits = torch.zeros(len(padded), 1, self.vocab_size, device=padded.device)
            logits = process(padded[:, :i], logits, lengths=self.lengths, only_forbid=True)[:, 0]
            is_forbidden = logits.gather(1, padded[:, i : i + 1]).isinf()[:, 0].tolist()
            self.lengths = [min(n, i) if forbidden else n for n, forbidden in zip(self.lengths, is_forbidden)]
        return torch.cat([input_ids, padded], dim=1), None


class PromptLookup(CertainDrafts):
    """Drafts what followed the last tokens where they occurred before, by `transformers`' generator.

    Args:
        model (`PreTrainedModel`): the target.
        generation_config (`GenerationConfig`): its `max_matching_ngram_size` and `max_length`.
    """

    def __init__(self, model: PreTrainedModel, generation_config: GenerationConfig):
        super().__init__(model)
        self.of_a_row = PromptLookupCandidateGenerator(
            eos_token_id=generation_config._eos_token_tensor,
            max_matching_ngram_size=generation_config.max_matching_ngram_size or 2,
            max_length=generation_config.max_length,
            vocab_size=self.vocab_size,
        )

    def drafts(self, rows: list[torch.LongTensor], max_candidates: Sequence[int]) -> list[list[int]]:
        drafts = []
        for row, limit in zip(rows, max_candidates):
            self.of_a_row.num_output_tokens = limit
            sequence, _ = self.of_a_row.get_candidates(row[None])
            drafts.append(sequence[0, len(row) :].tolist())
        return drafts
