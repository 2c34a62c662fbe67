# SPDX-License-Identifier: Apache-2.0
"""How many candidates a cycle drafts: a fixed number, or the one that promises the most tokens per second."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch


if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


ADAPTIVE = "adaptive"
DEFAULT_DRAFT_LENGTH = 20  # what stock `generate` falls back to


def clock(device: torch.device) -> float:
    """Seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class FixedDraftLength:
    """Always the same number.

    Args:
        value (`int`): candidates per cycle.
    """

    def __init__(self, value: int):
        self.value = self.longest = value
        #: How many tokens a verification of fixed shape has.
        self.widths = [value + 1]

    def now(self, device: torch.device) -> float:
        """A fixed length needs no timing."""
        return 0.0

    def update(self, lengths: Sequence[int], accepted: Sequence[int], draft: float, verify: float) -> None:
        """Nothing to learn."""


class AdaptiveDraftLength:
    """Picks the draft length by what was accepted and by what a draft and a verification have cost so far.

    If a candidate is accepted with probability a, whatever came before, k candidates commit
    `(1 - a^(k + 1)) / (1 - a)` tokens per cycle on average (arXiv 2211.17192, equation 1), at the price of k drafted
    tokens and one target forward. The length with the most tokens per second is next.

    Args:
        value (`int`, *optional*, defaults to 8): candidates of the first cycle, of which nothing is known yet.
        lengths (`tuple[int]`, *optional*): what to choose from, in ascending order.

    Example:
        >>> schedule = AdaptiveDraftLength(8)
        >>> for _ in range(50):
        ...     schedule.update(lengths=[8], accepted=[1], draft=8.0, verify=2.0)  # bad drafts, and expensive ones
        >>> schedule.value
        1
    """

    #: Near enough to each other that none in between would gain.
    LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    #: For forwards of a fixed shape, each of which is compiled.
    FEW_LENGTHS = (1, 2, 4, 8, 16, 32)
    # Weight that a cycle keeps when the next one comes: the last fifty or so count.
    MEMORY = 0.98

    def __init__(self, value: int = 8, lengths: tuple[int, ...] = LENGTHS):
        self.value, self.lengths, self.longest = value, lengths, lengths[-1]
        self.widths = [1 + length for length in lengths]
        # As if a first cycle had seen four accepted candidates and a rejected one.
        self._accepted, self._rejected = 4.0, 1.0
        # Sums of logarithms: a forward that was compiled took a thousand times as long as the next one will.
        self._draft, self._verify, self._cycles = 0.0, 0.0, 0.0

    def now(self, device: torch.device) -> float:
        return clock(device)

    def update(self, lengths: Sequence[int], accepted: Sequence[int], draft: float, verify: float) -> None:
        """Learns from a cycle, and sets `value` for the next.

        Args:
            lengths (`Sequence[int]`): candidates of each row.
            accepted (`Sequence[int]`): how many of them were committed.
            draft, verify (`float`): seconds for all candidates, and for the target's forward and all that follows.
        """
        if not max(lengths, default=0):
            return
        for name in ("_accepted", "_rejected", "_draft", "_verify", "_cycles"):
            setattr(self, name, self.MEMORY * getattr(self, name))
        self._accepted += sum(accepted) / len(lengths)
        self._rejected += sum(a < n for a, n in zip(accepted, lengths)) / len(lengths)
        # (A clock may stand still.)
        self._draft += math.log(max(draft, 1e-9) / max(lengths))
        self._verify += math.log(max(verify, 1e-9))
        self._cycles += 1.0
        self.value = max(self.lengths, key=self._tokens_per_second)

    def _tokens_per_second(self, k: int) -> float:
        a = self._accepted / (self._accepted + self._rejected)
        tokens = sum(a**i for i in range(k + 1))
        draft, verify = (math.exp(total / self._cycles) for total in (self._draft, self._verify))
        return tokens / (k * draft + verify)


#: Of a target and its drafter, by what else decides how much is accepted and what a forward costs.
_learned: WeakKeyDictionary[PreTrainedModel, WeakKeyDictionary[PreTrainedModel, dict[Hashable, AdaptiveDraftLength]]]
_learned = WeakKeyDictionary()


def draft_schedule(
    num_assistant_tokens: int | str,
    model: PreTrainedModel,
    assistant_model: PreTrainedModel | None,
    generation_config: GenerationConfig,
    circumstances: Hashable,
) -> FixedDraftLength | AdaptiveDraftLength:
    """The schedule for a fixed number, or an adaptive one.

    The latter goes on from call to call of a pair, since one response is over before much is known. A model without an
    assistant is its own; calls under other `circumstances`, where more is accepted or a forward costs another time,
    have a schedule of their own.
    """
    if num_assistant_tokens != ADAPTIVE:
        return FixedDraftLength(num_assistant_tokens)
    is_static = generation_config.cache_implementation == "static"
    lengths = AdaptiveDraftLength.FEW_LENGTHS if is_static else AdaptiveDraftLength.LENGTHS
    of_pair = _learned.setdefault(model, WeakKeyDictionary()).setdefault(assistant_model or model, {})
    config = generation_config
    drafter = config.assistant_early_exit, config.prompt_lookup_num_tokens, config.use_mtp
    return of_pair.setdefault((is_static, drafter, circumstances), AdaptiveDraftLength(lengths=lengths))
