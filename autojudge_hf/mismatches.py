# SPDX-License-Identifier: Apache-2.0
"""Where a drafter would have written another token than a sequence has: what the search asks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .dflash import DFlashCandidateGenerator
from .former_responses import FormerResponses, FormerResponsesAlone
from .model_properties import input_device, vocab_size
from .mtp import MTPCandidateGenerator
from .prefixes import prefixes_of


if TYPE_CHECKING:
    import numpy as np
    from transformers import LogitsProcessorList, PreTrainedModel

    from .drafter import Drafter
    from .forward import Pass
    from .prefixes import Prefixes


# Positions at which the assistant's choice is looked up at once. The next mismatch is mostly nearer.
SCANNED_POSITIONS = 32


@dataclass
class Search:
    """Where the search on one example stands.

    Attributes:
        trial (`list[int]`): the tokens that the target is to continue: the prompt, then a prefix with a candidate.
        sequence (`list[int]`): prompt and response, as of the last decision.
        position (`int`): the first one that isn't decided; where a trial is under way, the candidate's.
    """

    example_id: int
    example: Mapping[str, Any]
    prompt: list[int]
    trial: list[int]
    position: int
    sequence: list[int] | None = None
    reference: Any = None
    features: np.ndarray | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)


class TextReader:
    """An assistant that reads the text: it is asked at every position. Prefixes stay cached.

    Args:
        model, assistant_model (`PreTrainedModel`): the target and the assistant.
        processors (`LogitsProcessorList`): those of both models.
        num_assistant_tokens (`int`): limit of its drafts where it continues trials.
        eos_token_ids (`set[int]`): the target's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        assistant_model: PreTrainedModel,
        processors: LogitsProcessorList,
        num_assistant_tokens: int,
        eos_token_ids: set[int],
    ):
        self.model, self.assistant_model, self.processors = model, assistant_model, processors
        self.num_assistant_tokens, self.eos_token_ids = num_assistant_tokens, eos_token_ids
        self._prefixes = prefixes_of(assistant_model)

    def start(self, example_id: int, prompt: list[int]) -> None:
        self._prefixes.run({example_id: prompt[:-1] or prompt}, num_last=1)

    def forget(self, example_id: int) -> None:
        self._prefixes.forget(example_id)

    def run(self, trials: Mapping[int, list[int]]) -> Pass:
        """Logits and states of the last two tokens at least."""
        return self._prefixes.run(trials, num_last=2, output_states=True)

    def of_continuations(self, searches: Sequence[Search]) -> Drafter:
        """What drafts the target's continuations of their trials."""
        trials = {s.example_id: s.trial for s in searches}
        return FormerResponses(
            [s.sequence or [] for s in searches],
            self.num_assistant_tokens,
            self.assistant_model,
            self.model,
            do_sample=False,
            eos_token_ids=self.eos_token_ids,
            cache=self._prefixes.batch(trials, num_last=1)[2],
        )

    def find_mismatches(self, searches: Sequence[Search]) -> set[int]:
        """Prepares the next trials: where the assistant's choice first isn't the sequence's. Returns who has one."""
        found: set[int] = set()
        while scanned := [s for s in searches if s.example_id not in found and s.position < len(s.sequence)]:
            ends = {s.example_id: min(s.position + SCANNED_POSITIONS, len(s.sequence)) for s in scanned}
            read = {s.example_id: s.sequence[: ends[s.example_id] - 1] for s in scanned}
            longest = max(ends[s.example_id] - s.position for s in scanned)
            # A token that only the assistant has is no candidate.
            logits = self._prefixes.run(read, num_last=longest).logits[..., : vocab_size(self.model)]
            for s, row in zip(scanned, logits):
                choices = self._choices(s.sequence[: ends[s.example_id] - 1], row[s.position - ends[s.example_id] :])
                pairs = enumerate(zip(choices, s.sequence[s.position :]))
                difference = next((n for n, (choice, token) in pairs if choice != token), len(choices))
                s.position += difference
                if difference < len(choices):
                    found.add(s.example_id)
                    s.trial = [*s.sequence[: s.position], choices[difference]]
        return found

    def _choices(self, tokens: list[int], logits: torch.Tensor) -> list[int]:
        """The tokens that logits of shape `(n, v)`, the last of which follow `tokens`, choose."""
        if self.processors:
            behind = range(len(tokens) - len(logits) + 1, len(tokens) + 1)
            rows = zip(behind, logits.float().split(1))
            logits = torch.cat([self.processors(torch.tensor([tokens[:n]]), row) for n, row in rows])
        return logits.argmax(dim=-1).tolist()


@dataclass
class _Draft:
    """An example's last draft.

    Attributes:
        drafter ([`Drafter`]): of this example alone, since it keeps the target's states of the text.
        start (`int`): position of the first candidate.
        candidates (`list[int]`).
        num_read (`int`): of how many tokens the drafter has states.
    """

    drafter: Drafter
    start: int
    candidates: list[int] = field(default_factory=list)
    num_read: int = 0


class StateReader:
    """A drafter that goes by what the target has just computed: it drafts cycle by cycle, as in decoding.

    A draft goes on behind a candidate that is the sequence's token, or became it as a harmless mismatch. Behind an
    important mismatch, where the target's token stays, the next draft begins. Behind a whole draft the target has a
    token of its own; so has it at the beginning, where nothing can be drafted yet.

    Args:
        model (`PreTrainedModel`): the target.
        assistant_model (`PreTrainedModel`, *optional*): the assistant; `None`: the target's own heads.
        target ([`Prefixes`]): what the target has read.
        processors (`LogitsProcessorList`): those of both models.
        num_assistant_tokens (`int`): candidates per cycle.
        max_new_tokens (`int`): limit of a whole response.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        assistant_model: PreTrainedModel | None,
        target: Prefixes,
        processors: LogitsProcessorList,
        num_assistant_tokens: int,
        max_new_tokens: int,
    ):
        self.model, self.assistant_model, self.target, self.processors = model, assistant_model, target, processors
        self.num_assistant_tokens, self.max_new_tokens = num_assistant_tokens, max_new_tokens
        self._drafts: dict[int, _Draft] = {}

    def start(self, example_id: int, prompt: list[int]) -> None:
        self._drafts[example_id] = _Draft(self._new_drafter(), start=len(prompt))

    def forget(self, example_id: int) -> None:
        del self._drafts[example_id]

    def of_continuations(self, searches: Sequence[Search]) -> Drafter:
        """As [`TextReader.of_continuations`]."""
        return FormerResponsesAlone([s.sequence or [] for s in searches], self.model)

    def find_mismatches(self, searches: Sequence[Search]) -> set[int]:
        """As [`TextReader.find_mismatches`]."""
        found = set()
        for s in searches:
            candidate = self._next_candidate(s)
            if candidate is not None:
                found.add(s.example_id)
                s.trial = [*s.sequence[: s.position], candidate]
        return found

    def _next_candidate(self, s: Search) -> int | None:
        """The next that isn't the sequence's token; the search is at its position then, or at the sequence's end."""
        draft = self._drafts[s.example_id]
        while s.position < len(s.sequence):
            num_kept = s.position - draft.start
            if draft.candidates[:num_kept] != s.sequence[draft.start : s.position]:  # or there aren't so many
                self._draft(draft, s)
            elif num_kept < len(draft.candidates) and draft.candidates[num_kept] != s.sequence[s.position]:
                return draft.candidates[num_kept]
            else:
                s.position += 1
        return None

    @torch.inference_mode()
    def _draft(self, draft: _Draft, s: Search) -> None:
        """Begins the next draft at the search's position."""
        committed, limit = s.sequence[: s.position], len(s.prompt) + self.max_new_tokens - s.position - 1
        drafter, num_new = draft.drafter, len(committed) - 1 - draft.num_read
        outputs = self.target.run({s.example_id: committed[:-1]}, num_new, output_layers=drafter.target_layers)
        # Behind them it expects those of the candidates that weren't committed, to drop them.
        rejected = (0, 0, 0, max(0, len(draft.candidates) + 1 - num_new))
        states = [
            x if x is None else torch.nn.functional.pad(x[:, -num_new:], rejected) for x in outputs.hidden_states
        ]
        drafter.rewind([num_new], None, states)
        input_ids = torch.tensor([committed], device=input_device(self.model))

        def process(candidate_ids: torch.LongTensor, logits: torch.Tensor) -> torch.Tensor:
            return self.processors(torch.cat([input_ids, candidate_ids], dim=1), logits[:, 0])[:, None]

        limits = [min(self.num_assistant_tokens, limit)]
        drafted, _ = drafter.get_candidates(input_ids, None, limits, process if self.processors else None)
        draft.start, draft.num_read = s.position, s.position - 1
        draft.candidates = drafted[0, s.position :].tolist()

    def _new_drafter(self) -> Drafter:
        options = {"do_sample": False, "output_logits": False}
        if self.assistant_model is None:
            return MTPCandidateGenerator(self.model, **options)
        return DFlashCandidateGenerator(self.assistant_model, self.model, **options)
