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
        num_assistant_tokens (`int`): of the assistant's tokens, and at most so many of the target's.
        tokenizer, assistant_tokenizer (`PreTrainedTokenizerBase`): of the target, and of the assistant.

    Raises:
        ValueError: for a tokenizer that has more tokens than its model.
    """

    #: Tokens whose text shows how what follows is cut.
    CONTEXT = 16
    #: Tokens of a response that are settled at once. What isn't is told anew for each draft, since the end of a text
    #: may be cut in another way once it goes on.
    SETTLED = 64

    def __init__(
        self,
        assistant_model: PreTrainedModel,
        model: PreTrainedModel,
        num_assistant_tokens: int,
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
        self.tokenizer, self.assistant_tokenizer = tokenizer, assistant_tokenizer
        eos = eos_token_ids(assistant_model)
        self.assistant = JudgeCandidateGenerator(
            assistant_model, assistant_model, num_assistant_tokens, do_sample=False, eos_token_ids=eos
        )
        self.rows: list[_Row] = []
        self._not_to_assistant = _special_tokens_unlike(tokenizer, assistant_tokenizer)
        self._not_to_target = _special_tokens_unlike(assistant_tokenizer, tokenizer)

    def drafts(self, rows: list[torch.LongTensor], max_candidates: int) -> list[list[int]]:
        texts = [row.tolist() for row in rows]
        self.rows = self.rows or [self._begun(tokens[:-1]) for tokens in texts]
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

    def _begun(self, prompt: list[int]) -> _Row:
        tokens = self.assistant_tokenizer(self._told(prompt), verbose=False)["input_ids"]
        if tokens[:2] == 2 * [self.assistant_tokenizer.bos_token_id]:  # the text's own, and what the tokenizer adds
            del tokens[0]
        return _Row(len(prompt), tokens, cached=[])

    def _known(self, row: _Row, tokens: list[int]) -> list[int]:
        """A row of the target's tokens in the assistant's."""
        while len(tokens) - row.num_settled > 2 * self.SETTLED:
            row.settled = self._continued(row.settled, tokens[row.num_settled :][: self.SETTLED])
            row.num_settled += self.SETTLED
        last = self.assistant.vocab_size - 1
        return [min(token, last) for token in self._continued(row.settled, tokens[row.num_settled :])] or [last]

    def _continued(self, settled: list[int], tokens: list[int]) -> list[int]:
        before = self.assistant_tokenizer.decode(settled[-self.CONTEXT :], clean_up_tokenization_spaces=False)
        return settled + _tokens_behind(self.assistant_tokenizer, before, self._told(tokens))

    def _told(self, tokens: list[int]) -> str:
        return _text(self.tokenizer, tokens, self._not_to_assistant)

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
        context = known[-self.CONTEXT :]
        before = _text(self.assistant_tokenizer, context, self._not_to_target)
        text = _text(self.assistant_tokenizer, context + drafted[: next(ends, None)], self._not_to_target)
        text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character that isn't finished
        if not text.startswith(before):
            return []
        tokens = _tokens_behind(self.tokenizer, before, text[len(before) :])
        beyond = (i for i, token in enumerate(tokens) if token >= self.vocab_size)
        return tokens[: next(beyond, None)]


def _special_tokens_unlike(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> set[int]:
    """Those whose text is nothing special to the other."""
    of_other = other.added_tokens_encoder
    added = tokenizer.added_tokens_decoder
    return {i for i, token in added.items() if token.special and token.content not in of_other}


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int], left_out: set[int]) -> str:
    return tokenizer.decode([token for token in tokens if token not in left_out], clean_up_tokenization_spaces=False)


def _tokens_behind(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """Tokens of a text that goes on where another ends."""
    head, tokens = (tokenizer.encode(x, add_special_tokens=False) for x in (before, before + text))
    if tokens[: len(head)] == head:
        return tokens[len(head) :]
    # It goes on with a word whose first part is a token already.
    return tokenizer.encode(text, add_special_tokens=False)


def _num_shared(a: list[int], b: list[int]) -> int:
    """Length of the prefix that two lists have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
