# SPDX-License-Identifier: Apache-2.0
"""Drafting with an assistant that has a tokenizer of its own: what passes between the two models is text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .caches import num_cached, rewind
from .candidate_generator import JudgeCandidateGenerator
from .certain_drafts import CertainDrafts
from .model_properties import eos_token_ids, input_device, max_positions, vocab_size
from .rows import left_padded
from .supported import LARGEST_PADDING


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def is_other_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, assistant_tokenizer: PreTrainedTokenizerBase | None
) -> bool:
    """Whether the models have different tokenizers, given the assistant's; without it they have one.

    Raises:
        ValueError: for the assistant's alone.
    """
    if assistant_tokenizer is None:
        return False
    if tokenizer is None:
        raise ValueError("`assistant_tokenizer` needs the target's `tokenizer` beside it, got None: pass both.")
    return len(tokenizer) != len(assistant_tokenizer) or tokenizer.get_vocab() != assistant_tokenizer.get_vocab()


@dataclasses.dataclass
class _Row:
    """A row in the assistant's tokens."""

    num_settled: int  #: How many of the target's tokens won't be told anew: those of
    settled: list[int]  #: these.
    cached: list[int]  #: What the assistant's cache holds.


class OtherTokenizer(CertainDrafts):
    """Drafts greedily in the assistant's tokens, and offers the target's tokens of that text.

    A text that the two cut in different places costs acceptance, never correctness. Special tokens that only one of
    the tokenizers has are left out.

    Args:
        assistant_model (`PreTrainedModel`): the drafter.
        model (`PreTrainedModel`): the target.
        tokenizer, assistant_tokenizer (`PreTrainedTokenizerBase`): of the target, and of the assistant.

    Raises:
        ValueError: for a tokenizer that has more tokens than its model.
    """

    #: Tokens at the end of a text that are told anew for each draft: they may be cut in another way once it goes on.
    UNSETTLED = 64
    #: In tokens: so far back somebody else's token surely ends.
    LONGEST_WORD = 8

    def __init__(
        self,
        assistant_model: PreTrainedModel,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        assistant_tokenizer: PreTrainedTokenizerBase,
    ):
        super().__init__(model)
        pair = (("tokenizer", tokenizer, model), ("assistant_tokenizer", assistant_tokenizer, assistant_model))
        for name, its_tokenizer, its_model in pair:
            if len(its_tokenizer) > vocab_size(its_model) + LARGEST_PADDING:
                raise ValueError(
                    f"`{name}` has {len(its_tokenizer)} tokens, and {type(its_model).__name__} knows "
                    f"{vocab_size(its_model)}: expected the tokenizer that the model was trained with."
                )
        self.assistant_tokenizer = assistant_tokenizer
        eos = eos_token_ids(assistant_model)
        self.assistant = JudgeCandidateGenerator(assistant_model, assistant_model, do_sample=False, eos_token_ids=eos)
        self.rows: list[_Row] = []
        self._to_assistant = _Translation(tokenizer, assistant_tokenizer)
        self._to_target = _Translation(assistant_tokenizer, tokenizer)

    def drafts(self, rows: list[torch.LongTensor], max_candidates: int) -> list[list[int]]:
        texts = [row.tolist() for row in rows]
        self.rows = self.rows or [self._begun(tokens) for tokens in texts]
        known = [self._known(row, tokens) for row, tokens in zip(self.rows, texts)]
        limit = max_positions(self.assistant.assistant_model) or math.inf
        length = min(max_candidates, limit - max(map(len, known)))
        if length <= 0:
            return [[] for _ in rows]
        input_ids, attention_mask = self._behind_cached(known)
        sequence, _ = self.assistant.get_candidates(input_ids, attention_mask, length)
        drafted = sequence[:, input_ids.shape[1] :].tolist()
        for row, tokens, draft in zip(self.rows, known, drafted):
            row.cached = tokens + draft[:-1]  # The last candidate never ran through the assistant.
        return [self._translated(*of_row)[:max_candidates] for of_row in zip(known, drafted)]

    def shrink(self, rows: Sequence[int], unneeded: int) -> None:
        """Keeps some rows of the batch. (The columns to drop are the target's.)"""
        if self.rows:
            self.assistant.shrink(rows, 0)
            self.rows = [self.rows[j] for j in rows]

    def _begun(self, tokens: list[int]) -> _Row:
        usual = self.assistant_tokenizer.encode("")
        begins_so = self._to_assistant([], tokens[:1]) == usual
        return _Row(num_settled=0, settled=[] if begins_so else usual, cached=[])

    def _known(self, row: _Row, tokens: list[int]) -> list[int]:
        """A row of the target's tokens in the assistant's."""
        n, last = row.num_settled, self.assistant.vocab_size - 1
        new = self._to_assistant(tokens[:n], tokens[n:])
        known = row.settled + new
        newest = len(tokens) - self.UNSETTLED
        for end in range(newest, max(n + self.UNSETTLED, newest - self.LONGEST_WORD), -1):
            settled = self._to_assistant(tokens[:n], tokens[n:end])
            if new[: len(settled)] == settled:  # not within a token of the assistant's
                row.num_settled, row.settled = end, row.settled + settled
                break
        return [min(token, last) for token in known] or [last]

    def _behind_cached(self, known: list[list[int]]) -> tuple[torch.LongTensor, torch.LongTensor | None]:
        """Leaves the cache what its rows have in common with `known`; tokens and mask, shape `(b, n)`, of all.

        Rows stay aligned at their ends, so that each has as many tokens to run as the one with most.
        """
        cache = self.assistant.cache
        cached = [row.cached for row in self.rows]
        new = max(len(tokens) - _num_shared(held, tokens[:-1]) for held, tokens in zip(cached, known))
        rewind(cache, [len(held) - len(tokens) + new for held, tokens in zip(cached, known)])
        input_ids, attention_mask = (x.to(input_device(self.assistant.assistant_model)) for x in left_padded(known))
        self.assistant.shrink(range(len(known)), num_cached(cache) + new - input_ids.shape[1])
        return input_ids, attention_mask if len(known) > 1 else None

    def _translated(self, known: list[int], drafted: list[int]) -> list[int]:
        """The target's tokens of a draft behind `known`."""
        ends = (i for i, token in enumerate(drafted, start=1) if token in self.assistant.eos_token_ids)
        tokens = self._to_target(known, drafted[: next(ends, None)])
        beyond = (i for i, token in enumerate(tokens) if token >= self.vocab_size)
        return tokens[: next(beyond, None)]


class _Translation:
    """From one tokenizer's tokens to those that another has for their text."""

    #: Tokens whose text shows how what follows is cut.
    CONTEXT = 16

    def __init__(self, source: PreTrainedTokenizerBase, destination: PreTrainedTokenizerBase):
        self.source, self.destination = source, destination
        known = destination.added_tokens_encoder
        added = source.added_tokens_decoder.items()
        self.left_out = {i for i, token in added if token.special and token.content not in known}

    def __call__(self, before: list[int], tokens: list[int]) -> list[int]:
        """Of `tokens` behind `before`, both the source's."""
        context = before[-self.CONTEXT :]
        # By difference: alone, tokens might lose the space or the half of a character that they begin with.
        head, text = self.text(context), self.text(context + tokens)
        of_head, of_text = (self._encoded(x) for x in (head, text))
        if of_text[: len(of_head)] == of_head:
            return of_text[len(of_head) :]
        # It goes on with a word whose first part is a token already.
        return self._encoded(text[len(head) :])

    def text(self, tokens: list[int]) -> str:
        """Without what isn't a whole character yet."""
        told = [token for token in tokens if token not in self.left_out]
        return self.source.decode(told, clean_up_tokenization_spaces=False).rstrip("\N{REPLACEMENT CHARACTER}")

    def _encoded(self, text: str) -> list[int]:
        return self.destination.encode(text, add_special_tokens=False, verbose=False)


def _num_shared(a: list[int], b: list[int]) -> int:
    """Length of the prefix that two lists have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
