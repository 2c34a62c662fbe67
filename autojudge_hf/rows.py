# SPDX-License-Identifier: Apache-2.0
"""The unfinished rows of a batch. Each commits another number of tokens per cycle; they stay aligned at their ends."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


WITH_STATE = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
OF_SCORES = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TopHLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)
WITH_PROMPTS = (EncoderNoRepeatNGramLogitsProcessor, EncoderRepetitionPenaltyLogitsProcessor)


class Rows:
    """What every row of a batch has committed.

    Attributes:
        active (`list[int]`): which rows of the batch aren't finished, `a` of them.
        responses (`list[list[int]]`): every row's tokens behind its prompt, finished rows included.
        input_ids (`torch.LongTensor` of shape `(a, n)`): the active rows with their newest tokens in the last column;
            a row that is shorter than others has more padding at its front.
        attention_mask (`torch.LongTensor` of shape `(a, n)`, *optional*): 0 at padding; `None` for a single row
            without any.
    """

    def __init__(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None):
        self.prompts = input_ids
        self.active = list(range(len(input_ids)))
        self.responses: list[list[int]] = [[] for _ in self.active]
        self.input_ids = input_ids
        if attention_mask is None and len(input_ids) > 1:
            attention_mask = torch.ones_like(input_ids)
        self.attention_mask = None if attention_mask is None else attention_mask.long()
        # A copy between host and device waits for what is queued: what is known on one side stays there.
        whole = [input_ids.shape[1]]
        self._prompt_lengths = whole if attention_mask is None else self.attention_mask.sum(dim=1).tolist()
        self._histories = list(input_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each active row, padding left out: the position of its next token."""
        return [self._prompt_lengths[row] + len(self.responses[row]) for row in self.active]

    def history(self, row: int) -> torch.Tensor:
        """The prompt of a row of the batch, as it came, and its response: what `generate` shows to processors."""
        known = self._histories[row]
        if new := self.responses[row][len(known) - self.prompts.shape[1] :]:
            known = self._histories[row] = torch.cat([known, known.new_tensor(new)])
        return known

    def commit(self, new_tokens: Sequence[list[int]], finished: Sequence[bool]) -> list[int]:
        """Appends `new_tokens[j]`, at least one, to active row j, and drops the finished rows; returns which j stay.

        Columns in which no unfinished row has a token go too: the padding of short rows would add up over the cycles,
        and some models have buffers of the length that their longest text may have.
        """
        for row, new in zip(self.active, new_tokens):
            self.responses[row] += new
        longest = max(map(len, new_tokens))
        lacking = [longest - len(new) for new in new_tokens]
        blocks = [new + [0] * n for new, n in zip(new_tokens, lacking)]
        self.input_ids = _appended(self.input_ids, blocks, lacking)
        if self.attention_mask is not None:
            blocks = [[1] * len(new) + [0] * n for new, n in zip(new_tokens, lacking)]
            self.attention_mask = _appended(self.attention_mask, blocks, lacking)
        unfinished = [j for j, done in enumerate(finished) if not done]
        if any(finished):
            self.active = [self.active[j] for j in unfinished]
            self.input_ids = self.input_ids[unfinished]
            self.attention_mask = None if self.attention_mask is None else self.attention_mask[unfinished]
        if len(self.prompts) > 1:
            columns = max(self.lengths, default=0)
            self.input_ids = self.input_ids[:, -columns:]
            self.attention_mask = self.attention_mask[:, -columns:]
        return unfinished

    def sequences(self, pad_token_id: int) -> torch.LongTensor:
        """Prompts and responses of the whole batch, padded at the end."""
        longest = max(map(len, self.responses))
        padded = [response + [pad_token_id] * (longest - len(response)) for response in self.responses]
        return torch.cat([self.prompts, torch.tensor(padded, device=self.prompts.device)], dim=1)


def _appended(x: torch.Tensor, blocks: list[list[int]], lacking: list[int]) -> torch.Tensor:
    """Joins the blocks to the rows of `x`, and turns row i right by `lacking[i]`: its padding comes to its front."""
    joined = torch.cat([x, x.new_tensor(blocks)], dim=1)
    if not any(lacking):
        return joined
    return torch.stack([row.roll(n) for row, n in zip(joined, lacking)])


def left_padded(texts: Sequence[list[int]], pad_token_id: int = 0) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Token ids of shape `(b, n)`, padded at the front, and their mask, 0 at the padding."""
    missing = [max(map(len, texts)) - len(text) for text in texts]
    input_ids = torch.tensor([[pad_token_id] * n + text for n, text in zip(missing, texts)])
    return input_ids, torch.tensor([[0] * n + [1] * len(text) for n, text in zip(missing, texts)])


class RowProcessors:
    """Logits processors for rows of different lengths: each row by itself, under its own number in the batch."""

    def __init__(self, processors: LogitsProcessorList, batch_size: int, eos_token_ids: Collection[int] = ()):
        refused = {type(x).__name__ for x in processors if isinstance(x, WITH_STATE)}
        if batch_size > 1:
            refused |= {type(x).__name__ for x in processors if isinstance(x, WITH_PROMPTS)}
        if refused:
            raise ValueError(
                f"Judge decoding doesn't support the logits processors {sorted(refused)}: they remember tokens that "
                "may be taken back, or the prompts of a whole batch."
            )
        self.eos_token_ids = eos_token_ids
        #: Those for all rows and positions at once, where none looks at the tokens before.
        self.of_scores = processors if all(type(x) in OF_SCORES for x in processors) else None
        self.processors = [
            LogitsProcessorList(_numbered(processor, row, batch_size) for processor in processors)
            for row in range(batch_size)
        ]
        #: Without those that cut a distribution's tail: what they leave says which tokens can't be.
        self.that_forbid = [
            LogitsProcessorList(x for x in of_row if type(x) not in OF_SCORES) for of_row in self.processors
        ]

    def __call__(
        self,
        rows: Rows,
        room: Sequence[int],
        candidate_ids: torch.LongTensor,
        logits: torch.Tensor,
        lengths: Sequence[int] | None = None,
        only_forbid: bool = False,
    ) -> torch.Tensor:
        """Logits of shape `(a, n, v)`, of which the last follow `rows` and all of `candidate_ids`, `(a, i)`.

        Of row j's candidates there is room for `room[j]`, and `lengths[j]` are real, all by default: what follows the
        others, or an EOS token, is for no processor to see. Those that cut a distribution's tail take no part where
        the logits aren't a model's (`only_forbid`).
        """
        processors = self.that_forbid if only_forbid else self.processors
        if not any(processors):
            return logits
        if self.of_scores is not None:
            return self.of_scores(candidate_ids, logits.flatten(0, 1)).view_as(logits)
        n = logits.shape[1]
        limits = room if lengths is None else list(map(min, room, lengths))
        first = candidate_ids.shape[1] - n + 1
        processed = []
        for j, row in enumerate(rows.active):
            tokens = torch.cat([rows.history(row), candidate_ids[j]])[None]
            ends = (i for i, token in enumerate(candidate_ids[j].tolist()) if token in self.eos_token_ids)
            limit = min(limits[j], next(ends, limits[j]))
            for i in range(n):
                if first + i > limit:
                    processed.append(logits[j, i][None])
                    continue
                seen = tokens[:, : tokens.shape[1] - n + 1 + i]
                processed.append(processors[row](seen, logits[j, i][None].clone()))
        return torch.cat(processed).view_as(logits)


def _is_strange(x: object) -> bool:
    """Whether a processor or criterion is somebody else's, and so may go by a row's number in the batch."""
    return type(x).__module__.split(".")[0] not in ("transformers", __package__)


def _numbered(processor: LogitsProcessor, row: int, batch_size: int) -> LogitsProcessor:
    """The processor for a row on its own, which would otherwise count as row 0 of the batch."""
    if batch_size > 1 and _is_strange(processor):
        return _AsBatch(processor, row, batch_size)
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        processor = copy.copy(processor)
        processor._prefix_allowed_tokens_fn = lambda _, tokens: allowed(row, tokens)
    elif isinstance(processor, RepetitionPenaltyLogitsProcessor):
        ignored = processor.prompt_ignore_length
        if isinstance(ignored, torch.Tensor):
            processor = copy.copy(processor)
            processor.prompt_ignore_length = ignored[row : row + 1]
    return processor


class _AsBatch(LogitsProcessor):
    """Shows a processor a batch in which every row is the one at hand, and takes that row's logits."""

    def __init__(self, processor: LogitsProcessor, row: int, batch_size: int):
        self.processor, self.row, self.batch_size = processor, row, batch_size

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        processed = self.processor(input_ids.repeat(self.batch_size, 1), scores.repeat(self.batch_size, 1))
        return processed[self.row : self.row + 1]


class MaxRowLengths(StoppingCriteria):
    """New tokens that each row may have, where rows differ in that; one row is seen at a time, in [`StopRule`]."""

    def __init__(self, limits: list[int]):
        self.limits = limits


class StopRule:
    """Where a committed block ends a response: at its first prefix that a stopping criterion accepts.

    Length and EOS are known for a whole block at once; any other criterion has to see every prefix.
    """

    def __init__(self, criteria: StoppingCriteriaList, prompts: torch.LongTensor):
        batch_size, columns = prompts.shape
        max_length = min(c.max_length for c in criteria if isinstance(c, MaxLengthCriteria))
        limits = [[max_length - columns] * batch_size, *(c.limits for c in criteria if isinstance(c, MaxRowLengths))]
        self.max_new_tokens = [min(of_row) for of_row in zip(*limits)]
        eos_criteria = [c for c in criteria if isinstance(c, EosTokenCriteria)]
        self.eos_token_ids = {token for c in eos_criteria for token in c.eos_token_id.flatten().tolist()}
        self.others = StoppingCriteriaList(
            c for c in criteria if not isinstance(c, (MaxLengthCriteria, MaxRowLengths, EosTokenCriteria))
        )
        # Somebody else's are shown a batch in which every row is the one at hand.
        self._num_shown = batch_size if any(map(_is_strange, self.others)) else 1

    def room(self, rows: Rows, j: int) -> int:
        """How many tokens active row j may still commit."""
        row = rows.active[j]
        return self.max_new_tokens[row] - len(rows.responses[row])

    def __call__(
        self, rows: Rows, j: int, new_tokens: list[int], scores: tuple[torch.Tensor, ...] | None = None
    ) -> tuple[int, bool]:
        """How many of active row j's `new_tokens` stay, and whether the response is finished.

        Criteria may look at `scores`: those of its whole response, a tensor of shape `(1, v)` for each token.
        """
        room = self.room(rows, j)
        row, shown = rows.active[j], self._num_shown
        history = rows.history(row) if self.others else None
        for i, token in enumerate(new_tokens, start=1):
            if token in self.eos_token_ids or i >= room:
                return i, True
            if history is not None:
                seen = torch.cat([history, history.new_tensor(new_tokens[:i])]).repeat(shown, 1)
                so_far = None if scores is None else scores[: len(scores) - len(new_tokens) + i]
                if so_far is not None and shown > 1:
                    so_far = tuple(of_token.expand(shown, -1) for of_token in so_far)
                if self.others(seen, so_far)[row if shown > 1 else 0]:
                    return i, True
        return len(new_tokens), False
