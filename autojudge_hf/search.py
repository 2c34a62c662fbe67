# SPDX-License-Identifier: Apache-2.0
"""The semi-greedy search: which mismatches of a pair are important, on several examples at once."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from .candidate_generator import FormerResponses
from .configuration import JudgeConfig
from .features import judge_inputs
from .generation import judge_decoding
from .mined_examples import MinedExample
from .mined_rows import inner_text
from .model_properties import CACHE_NAME, eos_token_ids, input_device, keeps_states, of_vocabulary, vocab_size
from .prefixes import prefixes_of
from .rows import MaxRowLengths
from .tasks.task import Task, abandoned, answers_or_errors


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Positions at which the assistant's choice is looked up at once. The next mismatch is mostly nearer.
SCANNED_POSITIONS = 32
# Candidates that repeat the former response cost nothing to draft, and little to verify.
LONGEST_REPETITION = 48


@dataclass
class _Search:
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


class SemiGreedySearch:
    """Algorithm 1 of AutoJudge (arXiv 2504.20039) for one pair of models, many examples in flight.

    In every round each example in flight has one trial: one pass of the target over what is new in its prefix, which
    also gives what a judge would see of the candidate; one lossless continuation, all of them as a batch, drafted by
    the assistant; and a few passes of the assistant that look for the next mismatch. Prefixes stay cached.

    Args:
        model, assistant_model (`PreTrainedModel`): the target and the assistant.
        tokenizer (`PreTrainedTokenizerBase`): theirs.
        task (`Task`): answers and equivalence.
        max_new_tokens (`int`): limit of a whole response, in tokens.
        num_assistant_tokens (`int`): draft length.
        temperature, seed: see `mine_mismatches`.
        layout ([`JudgeConfig`]): which features a mismatch gets.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        assistant_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        max_new_tokens: int,
        num_assistant_tokens: int,
        temperature: float,
        seed: int,
        layout: JudgeConfig,
    ):
        self.model, self.assistant_model = model, assistant_model
        self.tokenizer, self.task = tokenizer, task
        self.max_new_tokens = max_new_tokens
        self.num_assistant_tokens = num_assistant_tokens
        self.temperature = temperature
        self.processors = LogitsProcessorList([GumbelNoise(temperature, seed)] if temperature > 0 else [])
        self.layout = layout
        self.eos_token_ids = eos_token_ids(model)
        self._keep_states = keeps_states(model) or keeps_states(assistant_model)
        self._target, self._assistant = prefixes_of(model), prefixes_of(assistant_model)

    def __call__(
        self, examples: Iterable[tuple[int, Mapping[str, Any], list[int]]], batch_size: int
    ) -> Iterator[tuple[int, MinedExample]]:
        """Searches `(id, example, prompt)`, `batch_size` at a time; yields `(id, result)` as they finish.

        Twice as many are in flight: a thread extracts the answers of one batch while the other is decoded.
        """
        waiting, graded, searches = iter(examples), deque(), []
        over = threading.Event()
        grader = ThreadPoolExecutor(max_workers=1, initializer=abandoned.set, initargs=(over,))
        try:
            while True:
                while len(searches) < batch_size and (new := next(waiting, None)) is not None:
                    searches.append(self._start(*new))
                if searches:
                    graded.append(self._try(searches, grader))
                    searches = []
                    if len(graded) == 1:
                        continue  # while these are graded, decode others
                if not graded:
                    return
                # Two batches become one as soon as it holds them.
                while graded and len(searches) + len(graded[0][0]) <= batch_size:
                    going_on, finished = self._decide(*graded.popleft())
                    searches += going_on
                    yield from finished.items()
        finally:
            over.set()
            grader.shutdown(cancel_futures=True)

    def _start(self, example_id: int, example: Mapping[str, Any], prompt: list[int]) -> _Search:
        # By itself, for a pass is as wide as its longest row.
        for prefixes in (self._target, self._assistant):
            prefixes.run({example_id: prompt[:-1] or prompt}, num_last=1)
        return _Search(example_id, example, prompt, trial=prompt, position=len(prompt))

    def _try(self, searches: list[_Search], grader: Executor) -> tuple[list[_Search], list[list[int]], Future]:
        """One trial each: the searches, the responses, and the answers to come."""
        self._see_candidates(searches)
        responses = self._continue(searches)
        texts = [
            self.tokenizer.decode(response[len(s.prompt) :], skip_special_tokens=True)
            for s, response in zip(searches, responses)
        ]
        return searches, responses, grader.submit(answers_or_errors, self.task, [s.example for s in searches], texts)

    def _see_candidates(self, searches: list[_Search]) -> None:
        """Runs the candidates through the target behind their prefixes, as a verification cycle would."""
        trials = {s.example_id: s.trial for s in searches if s.sequence is not None}
        if not trials:
            return
        outputs = self._target.run(trials, num_last=2, output_states=True)
        device = input_device(self.model)
        states = assistant_logits = None
        temperature = self.temperature or 1.0
        if self.layout.assistant_hidden_size or self.layout.assistant_logit_features:
            seen = self._assistant.run(trials, num_last=2, output_states=True)
            states = seen.states[:, -2:] if self.layout.assistant_hidden_size else None
            logits = seen.logits[:, -2:-1].to(device, torch.float32)
            assistant_logits = of_vocabulary(logits, vocab_size(self.model)) / temperature
        inputs = judge_inputs(
            torch.tensor([trial[-1:] for trial in trials.values()], device=device),
            outputs.logits[:, -2:].float() / temperature,
            outputs.states[:, -2:],
            states,
            assistant_logits,
            self.layout,
        )
        features = dict(zip(trials, inputs.features[:, 0].cpu().numpy()))
        for s in searches:
            s.features = features.get(s.example_id)

    def _continue(self, searches: list[_Search]) -> list[list[int]]:
        """The target's greedy continuations of all trials, written by the lossless loop on the cached prefixes."""
        unfinished = [
            s for s in searches if self._room(s) > 0 and (s.sequence is None or s.trial[-1] not in self.eos_token_ids)
        ]
        responses: dict[int, list[int]] = {}
        # States are decoded for one prompt at a time.
        size = 1 if self._keep_states else max(1, len(unfinished))
        for start in range(0, len(unfinished), size):
            responses |= self._continue_together(unfinished[start : start + size])
        return [responses.get(s.example_id, s.trial) for s in searches]

    def _continue_together(self, unfinished: list[_Search]) -> dict[int, list[int]]:
        """The responses by example, decoded as one batch."""
        trials = {s.example_id: s.trial for s in unfinished}
        input_ids, attention_mask, cache = self._target.batch(trials, num_last=1)
        limits = [self._room(s) for s in unfinished]
        # Called past `generate`, whose configs could bring processors along.
        criteria = StoppingCriteriaList(
            [MaxLengthCriteria(max_length=input_ids.shape[1] + max(limits)), MaxRowLengths(limits)]
        )
        if self.eos_token_ids:
            criteria.append(EosTokenCriteria(eos_token_id=sorted(self.eos_token_ids)))
        drafter = FormerResponses(
            [s.sequence or [] for s in unfinished],
            self.num_assistant_tokens,
            self.assistant_model,
            self.model,
            do_sample=False,
            eos_token_ids=self.eos_token_ids,
            cache=self._assistant.batch(trials, num_last=1)[2],
        )
        output = judge_decoding(
            self.model,
            input_ids,
            self.processors,
            criteria,
            GenerationConfig(do_sample=False),
            assistant_model=self.assistant_model,
            candidate_generator=drafter,
            num_assistant_tokens=max(self.num_assistant_tokens, LONGEST_REPETITION),
            attention_mask=attention_mask,
            **{CACHE_NAME: cache},
        )
        responses = {}
        for (i, trial), limit, tokens in zip(trials.items(), limits, output[:, input_ids.shape[1] :].tolist()):
            ends = (n for n, token in enumerate(tokens, start=1) if token in self.eos_token_ids)
            responses[i] = trial + tokens[: next(ends, limit)]
        return responses

    def _room(self, s: _Search) -> int:
        return len(s.prompt) + self.max_new_tokens - len(s.trial)

    def _decide(
        self, searches: list[_Search], responses: list[list[int]], answers: Future
    ) -> tuple[list[_Search], dict[int, MinedExample]]:
        """Takes the trials' answers in: the searches that go on, each with its next trial, and what is finished."""
        finished: dict[int, MinedExample] = {}
        for s, response, answer in zip(searches, responses, answers.result()):
            if skipped := self._label(s, response, answer):
                finished[s.example_id] = skipped
        searches = [s for s in searches if s.example_id not in finished]
        found = self._next_mismatches(searches)
        finished |= {s.example_id: MinedExample(s.rows) for s in searches if s.example_id not in found}
        for example_id in finished:
            self._target.forget(example_id)
            self._assistant.forget(example_id)
        return [s for s in searches if s.example_id in found], finished

    def _label(self, s: _Search, response: list[int], answer: Any) -> MinedExample | None:
        """Labels the trial by its answer, or takes the target's own; returns what becomes of an example to skip."""
        if isinstance(answer, Exception):
            return _failed(answer)
        if s.sequence is None:
            s.sequence, s.reference = response, answer
            return MinedExample([], "the target's response has no answer") if answer is None else None
        try:
            important = answer is None or not self.task.equivalent(answer, s.reference)
        except (Exception, SystemExit) as error:  # a user's code, which may raise anything
            return _failed(error)
        candidate, target = s.trial[-1], s.sequence[s.position]
        s.rows.append(
            {
                "example_id": s.example_id,
                "input_ids": s.trial[:-1],
                "prompt_length": len(s.prompt),
                "position": s.position,
                "candidate_token_id": candidate,
                "target_token_id": target,
                "candidate_token": inner_text(self.tokenizer, [candidate]),
                "target_token": inner_text(self.tokenizer, [target]),
                "label": int(important),
                "features": s.features,
            }
        )
        if not important:
            s.sequence = response
        s.position += 1
        return None

    def _next_mismatches(self, searches: list[_Search]) -> set[int]:
        """Prepares the next trials: where the assistant's choice first isn't the sequence's. Returns who has one."""
        found: set[int] = set()
        while scanned := [s for s in searches if s.example_id not in found and s.position < len(s.sequence)]:
            ends = {s.example_id: min(s.position + SCANNED_POSITIONS, len(s.sequence)) for s in scanned}
            read = {s.example_id: s.sequence[: ends[s.example_id] - 1] for s in scanned}
            longest = max(ends[s.example_id] - s.position for s in scanned)
            # A token that only the assistant has is no candidate.
            logits = self._assistant.run(read, num_last=longest).logits[..., : vocab_size(self.model)]
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


def _failed(error: BaseException) -> MinedExample:
    return MinedExample([], f"{type(error).__name__}: {error}", failed=True)


class GumbelNoise(LogitsProcessor):
    """Sampling as greedy decoding, by the Gumbel-max trick: what is drawn is the best of the noisy logits.

    The noise follows from the seed and the tokens so far. So runs repeat, whatever is in a batch, and two models draw
    the same token wherever their distributions are alike.

    Args:
        temperature (`float`): above 0.
        seed (`int`): another one gives other draws.
    """

    def __init__(self, temperature: float, seed: int):
        self.temperature, self.seed = temperature, seed

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = np.stack([self._noise(tokens, scores.shape[1]) for tokens in input_ids.tolist()])
        return scores / self.temperature + torch.from_numpy(noise).to(scores)

    def _noise(self, tokens: list[int], size: int) -> np.ndarray:
        # A batch is padded at the front with zeros, which mustn't matter.
        start = next((n for n, token in enumerate(tokens) if token != 0), len(tokens))
        text = np.array([self.seed, *tokens[start:]], dtype=np.int64)
        key = hashlib.blake2b(text.tobytes(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).gumbel(size=size)
