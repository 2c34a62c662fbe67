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
        ValueError: for the assistant's alone, and what is no tokenizer.
    """
    if assistant_tokenizer is None:
        return False
    for name, given in {"tokenizer": tokenizer, "assistant_tokenizer": assistant_tokenizer}.items():
        if not hasattr(given, "added_tokens_encoder"):
            raise ValueError(
                f"Expected a tokenizer of `transformers` as `{name}`, got {type(given).__name__}. An assistant with "
                "another tokenizer takes both: pass `tokenizer`, the target's, and `assistant_tokenizer`."
            )
    if tokenizer is assistant_tokenizer:
        return False
    return len(tokenizer) != len(assistant_tokenizer) or tokenizer.get_vocab() != assistant_tokenizer.get_vocab()


@dataclasses.dataclass
class _Row:
    """What is known of a row: the first `num_settled` of its tokens are `settled`, in the assistant's."""

    num_settled: int
    settled: list[int]
    cached: list[int]  #: What the assistant's cache holds, in its tokens.


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
    #: Places tried for the end of what is settled: it shouldn't be within a token of the assistant's.
    NUM_TRIED = 8

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

    def drafts(self, rows: list[torch.LongTensor], max_candidates: Sequence[int]) -> list[list[int]]:
        texts = [row.tolist() for row in rows]
        self.rows = self.rows or [self._begun(tokens) for tokens in texts]
        known = [self._known(row, tokens) for row, tokens in zip(self.rows, texts)]
        limit = max_positions(self.assistant.assistant_model) or math.inf
        length = min(max(max_candidates), limit - max(map(len, known)))
        if length <= 0:
            return [[] for _ in rows]
        input_ids, attention_mask = self._behind_cached(known)
        sequence, _ = self.assistant.get_candidates(input_ids, attention_mask, [length])
        drafted = sequence[:, input_ids.shape[1] :].tolist()
        for row, tokens, draft in zip(self.rows, known, drafted):
            row.cached = tokens + draft[:-1]  # The last candidate never ran through the assistant.
        # What is behind a row's own limit would change how the rest is cut: it's as if it had been alone.
        return [self._translated(tokens, draft[:n])[:n] for tokens, draft, n in zip(known, drafted, max_candidates)]

    def shrink(self, rows: Sequence[int], unneeded: int) -> None:
        """Keeps some rows of the batch. (The columns to drop are the target's.)"""
        if self.rows:
            self.assistant.shrink(rows, 0)
            self.rows = [self.rows[j] for j in rows]

    def _begun(self, tokens: list[int]) -> _Row:
        # What the assistant's tokenizer puts in front of a text, unless the row begins so already.
        whole, bare = (self.assistant_tokenizer.encode("a", add_special_tokens=flag) for flag in (True, False))
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        front = whole[: next(starts, 0)]
        begins_so = self._to_assistant([], tokens[:1]) == front
        return _Row(num_settled=0, settled=[] if begins_so else front, cached=[])

    def _known(self, row: _Row, tokens: list[int]) -> list[int]:
        """A row of the target's tokens in the assistant's; any for a text of nothing that it knows."""
        new = self._to_assistant(tokens[: row.num_settled], tokens[row.num_settled :])
        known = (row.settled + new) or [0]
        if len(tokens) - row.num_settled > 2 * self.UNSETTLED:
            self._settle(row, tokens, new)
        return known

    def _settle(self, row: _Row, tokens: list[int], new: list[int]) -> None:
        newest = len(tokens) - self.UNSETTLED
        for end in range(newest, newest - self.NUM_TRIED, -1):
            settled = self._to_assistant(tokens[: row.num_settled], tokens[row.num_settled : end])
            if new[: len(settled)] == settled:
                row.num_settled, row.settled = end, row.settled + settled
                return

    def _behind_cached(self, known: list[list[int]]) -> tuple[torch.LongTensor, torch.LongTensor | None]:
        """Leaves the cache what its rows have in common with `known`; tokens and mask, shape `(b, n)`, of all.

        Rows stay aligned at their ends: each has the last `ahead` tokens to run, as many as the one with most.
        """
        assistant, cached = self.assistant, [row.cached for row in self.rows]
        ahead = max(len(tokens) - _num_shared(held, tokens[:-1]) for held, tokens in zip(cached, known))
        rewind(assistant.cache, [len(held) - (len(tokens) - ahead) for held, tokens in zip(cached, known)])
        input_ids, attention_mask = (x.to(input_device(assistant.assistant_model)) for x in left_padded(known))
        # All rows may have padding in front that none needs any more.
        assistant.shrink(range(len(known)), num_cached(assistant.cache) + ahead - input_ids.shape[1])
        # A tokenizer may have tokens that its model lacks; any other will do: only the draft gets worse.
        input_ids = input_ids.clamp(max=assistant.vocab_size - 1)
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
        # Padding of the embeddings: tokenizers in Rust skip what they don't know, those in Python fail.
        self.known = None if source.is_fast else set(source.get_vocab().values())

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
        if self.known is not None:
            told = [token for token in told if token in self.known]
        return self.source.decode(told, clean_up_tokenization_spaces=False).rstrip("\N{REPLACEMENT CHARACTER}")

    def _encoded(self, text: str) -> list[int]:
        return self.destination.encode(text, add_special_tokens=False, verbose=False)


def _num_shared(a: list[int], b: list[int]) -> int:
    """Length of the prefix that two lists have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
