# SPDX-License-Identifier: Apache-2.0
"""The semi-greedy search: which mismatches of a pair are important, on several examples at once."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
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

from .configuration import JudgeConfig
from .features import judge_inputs
from .generation import judge_decoding
from .mined_examples import MinedExample
from .mined_rows import inner_text
from .mismatches import Search, StateReader, TextReader
from .model_properties import (
    CACHE_NAME,
    drafts_from_target,
    eos_token_ids,
    input_device,
    keeps_states,
    of_vocabulary,
    vocab_size,
)
from .prefixes import prefixes_of
from .rows import MaxRowLengths
from .tasks.task import Task, abandoned, answers_or_errors


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Candidates that repeat the former response cost nothing to draft, and little to verify.
LONGEST_REPETITION = 48


class SemiGreedySearch:
    """Algorithm 1 of AutoJudge (arXiv 2504.20039) for one pair of models, many examples in flight.

    In every round each example in flight has one trial: one pass of the target over what is new in its prefix, which
    also gives what a judge would see of the candidate; one lossless continuation, all of them as a batch; and a look
    for the next mismatch. Prefixes stay cached.

    Args:
        model (`PreTrainedModel`): the target.
        assistant_model (`PreTrainedModel`, *optional*): the assistant; `None`: the target's own heads draft.
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
        assistant_model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        *,
        max_new_tokens: int,
        num_assistant_tokens: int,
        temperature: float,
        seed: int,
        layout: JudgeConfig,
    ):
        self.model = model
        self.tokenizer, self.task = tokenizer, task
        self.max_new_tokens = max_new_tokens
        self.num_assistant_tokens = num_assistant_tokens
        self.temperature = temperature
        self.processors = LogitsProcessorList([GumbelNoise(temperature, seed)] if temperature > 0 else [])
        self.layout = layout
        self.eos_token_ids = eos_token_ids(model)
        self._target = prefixes_of(model)
        shared = self.processors, num_assistant_tokens
        if assistant_model is None or drafts_from_target(assistant_model):
            self._drafter = StateReader(model, assistant_model, self._target, *shared, max_new_tokens)
        else:
            self._drafter = TextReader(model, assistant_model, *shared, self.eos_token_ids)
        models = [model] if assistant_model is None else [model, assistant_model]
        # States are decoded for one prompt at a time.
        self._one_at_a_time = any(map(keeps_states, models))

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

    def _start(self, example_id: int, example: Mapping[str, Any], prompt: list[int]) -> Search:
        # By itself, for a pass is as wide as its longest row.
        self._target.run({example_id: prompt[:-1] or prompt}, num_last=1)
        self._drafter.start(example_id, prompt)
        return Search(example_id, example, prompt, trial=prompt, position=len(prompt))

    def _try(self, searches: list[Search], grader: Executor) -> tuple[list[Search], list[list[int]], Future]:
        """One trial each: the searches, the responses, and the answers to come."""
        self._see_candidates(searches)
        responses = self._continue(searches)
        texts = [
            self.tokenizer.decode(response[len(s.prompt) :], skip_special_tokens=True)
            for s, response in zip(searches, responses)
        ]
        return searches, responses, grader.submit(answers_or_errors, self.task, [s.example for s in searches], texts)

    def _see_candidates(self, searches: list[Search]) -> None:
        """Runs the candidates through the target behind their prefixes, as a verification cycle would."""
        trials = {s.example_id: s.trial for s in searches if s.sequence is not None}
        if not trials:
            return
        outputs = self._target.run(trials, num_last=2, output_states=True)
        device = input_device(self.model)
        states = assistant_logits = None
        temperature = self.temperature or 1.0
        if self.layout.assistant_hidden_size or self.layout.assistant_logit_features:
            seen = self._drafter.run(trials)
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

    def _continue(self, searches: list[Search]) -> list[list[int]]:
        """The target's greedy continuations of all trials, written by the lossless loop on the cached prefixes."""
        unfinished = [
            s for s in searches if self._room(s) > 0 and (s.sequence is None or s.trial[-1] not in self.eos_token_ids)
        ]
        responses: dict[int, list[int]] = {}
        size = 1 if self._one_at_a_time else max(1, len(unfinished))
        for start in range(0, len(unfinished), size):
            responses |= self._continue_together(unfinished[start : start + size])
        return [responses.get(s.example_id, s.trial) for s in searches]

    def _continue_together(self, unfinished: list[Search]) -> dict[int, list[int]]:
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
        output = judge_decoding(
            self.model,
            input_ids,
            self.processors,
            criteria,
            # Candidates come from a response.
            GenerationConfig(do_sample=False, prompt_lookup_num_tokens=LONGEST_REPETITION),
            candidate_generator=self._drafter.of_continuations(unfinished),
            num_assistant_tokens=max(self.num_assistant_tokens, LONGEST_REPETITION),
            attention_mask=attention_mask,
            **{CACHE_NAME: cache},
        )
        responses = {}
        for (i, trial), limit, tokens in zip(trials.items(), limits, output[:, input_ids.shape[1] :].tolist()):
            ends = (n for n, token in enumerate(tokens, start=1) if token in self.eos_token_ids)
            responses[i] = trial + tokens[: next(ends, limit)]
        return responses

    def _room(self, s: Search) -> int:
        return len(s.prompt) + self.max_new_tokens - len(s.trial)

    def _decide(
        self, searches: list[Search], responses: list[list[int]], answers: Future
    ) -> tuple[list[Search], dict[int, MinedExample]]:
        """Takes the trials' answers in: the searches that go on, each with its next trial, and what is finished."""
        finished: dict[int, MinedExample] = {}
        for s, response, answer in zip(searches, responses, answers.result()):
            if skipped := self._label(s, response, answer):
                finished[s.example_id] = skipped
        searches = [s for s in searches if s.example_id not in finished]
        found = self._drafter.find_mismatches(searches)
        finished |= {s.example_id: MinedExample(s.rows) for s in searches if s.example_id not in found}
        for example_id in finished:
            self._target.forget(example_id)
            self._drafter.forget(example_id)
        return [s for s in searches if s.example_id in found], finished

    def _label(self, s: Search, response: list[int], answer: Any) -> MinedExample | None:
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
