# SPDX-License-Identifier: Apache-2.0
"""What the decoding loop asks of a drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers.generation import CandidateGenerator


class Drafter(CandidateGenerator):
    """Drafts for all rows of a batch at once.

    Attributes:
        lengths (`list[int]`, *optional*): how many candidates of each row are real; `None`: all of them.
        states (`torch.FloatTensor` of shape `(b, k + 1, h_a)`, *optional*): an assistant's last hidden states of the
            last draft, from the last committed token to the last candidate; `None` where no judge reads them.
        reads_target_states (`bool`): whether `rewind` needs the target's last hidden states.
        target_layers (`list[int]`): which of the target's hidden states it needs besides; the first are embeddings.
        drafts_at_once (`bool`): whether a long draft takes as long as a short one.
    """

    lengths: list[int] | None = None
    states: torch.Tensor | None = None
    reads_target_states = False
    target_layers: Sequence[int] = ()
    drafts_at_once = False

    def get_candidates(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        max_candidates: Sequence[int],
        process: Callable[[torch.LongTensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.LongTensor, torch.Tensor | None]:
        """Drafts after `input_ids`.

        Args:
            input_ids (`torch.LongTensor` of shape `(b, n)`): the committed tokens.
            attention_mask (`torch.LongTensor` of shape `(b, n)`, *optional*): 0 at padding.
            max_candidates (`Sequence[int]`): how many each row has a use for; fewer where there are no more.
            process (`Callable`, *optional*): the target's logits processors, which the draft follows too: from the
                candidates so far, `(b, i)`, and their next logits, `(b, 1, v)`, to processed logits.

        Returns:
            `(candidate_input_ids, logits)`: the tokens followed by `k` candidates, shape `(b, n + k)`; and the
            processed logits that they were drawn from, shape `(b, k, v)`, where these are kept.
        """
        raise NotImplementedError

    def rewind(
        self,
        num_committed: Sequence[int],
        target_states: torch.Tensor | None,
        target_layers: Sequence[torch.Tensor] | None,
    ) -> None:
        """Forgets the candidates that weren't committed: row i went on by `num_committed[i]` tokens.

        Args:
            num_committed (`Sequence[int]`): accepted candidates and the target's own token.
            target_states (`torch.FloatTensor` of shape `(b, k + 1, h)`, *optional*): the target's last hidden states
                of the newest token and the candidates.
            target_layers (`Sequence[torch.FloatTensor]`, *optional*): those of the layers, of all that the target has
                just read.
        """

    def shrink(self, rows: Sequence[int], unneeded: int) -> None:
        """Keeps some rows of the batch, and drops the first `unneeded` columns."""

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Nothing to learn: the loop passes each cycle's draft length to `get_candidates`."""


def choices(logits: torch.Tensor, do_sample: bool) -> torch.LongTensor:
    """A token of each distribution, drawn from it or its best: shape `(b, k, v)` to `(b, k)`."""
    if not do_sample:
        return logits.argmax(dim=-1)
    return torch.multinomial(logits.softmax(dim=-1).flatten(0, 1), num_samples=1).view(logits.shape[:2])
