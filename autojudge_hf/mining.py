# SPDX-License-Identifier: Apache-2.0
"""Mining: finds the mismatches between two models and which of them are important (semi-greedy search)."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from .candidate_generator import FormerResponse, JudgeCandidateGenerator
from .checks import checked_draft_length
from .configuration import GREEDY_SETTINGS, STATE_POSITIONS, public_name
from .features import judge_inputs
from .forward import Pass, cached_forward, eos_token_ids, hidden_size, max_positions, rewindable_cache, vocab_size
from .generation import judge_decoding
from .mined_examples import MinedExample, MinedExamples, to_dataset


if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .tasks import Task


logger = logging.getLogger(__name__)

# Candidates that repeat the former response cost nothing to draft.
LONGEST_REPETITION = 48


def mine_mismatches(
    model: PreTrainedModel,
    assistant_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    task: Task,
    *,
    max_new_tokens: int,
    batch_size: int = 1,
    output_dir: str | Path | None = None,
    num_assistant_tokens: int | None = None,
    state_position: str = "candidate",
    assistant_states: bool = False,
    logit_features: bool = False,
) -> datasets.Dataset:
    """Runs the semi-greedy search (AutoJudge, arXiv 2504.20039, algorithm 1) on every example.

    Start from the target's greedy response. At the earliest position where the assistant would have written another
    token, put that token and let the target continue. If the new answer is equivalent to the target's own, the
    mismatch is unimportant and the search goes on from the new response; otherwise it is important and the target's
    token stays. Only positions to the right of the last decision are looked at again.

    Both models decode greedily, whatever their generation configs say; EOS ids are the target's.

    Under `accelerate launch` the processes share the examples between them, through `output_dir`, and each returns the
    whole dataset.

    Args:
        model, assistant_model (`PreTrainedModel`): the target and the assistant.
        tokenizer (`PreTrainedTokenizerBase`): theirs.
        dataset (iterable of mappings): the task's examples.
        task (`Task`): prompts, answers, equivalence.
        max_new_tokens (`int`): limit of the whole response, in tokens.
        batch_size (`int`, *optional*, defaults to 1): examples in flight at once, whose answers are extracted
            together. The result doesn't depend on it.
        output_dir (`str` or `Path`, *optional*): where finished examples are kept. The same call with the same
            folder goes on after an interruption.
        num_assistant_tokens (`int`, *optional*): draft length of the (lossless) decoding; changes only the speed.
        state_position (`str`, *optional*, defaults to `"candidate"`): see `JudgeConfig`.
        assistant_states (`bool`, *optional*, defaults to `False`): put the assistant's state in front of the
            target's.
        logit_features (`bool`, *optional*, defaults to `False`): put what the target's logits say behind the
            states; see `JudgeConfig`.

    Returns:
        `datasets.Dataset`: a row a mismatch, in the order of examples and positions, with the columns `example_id`,
        `input_ids` (prompt and response before the mismatch), `prompt_length`, `position` (absolute: the length of
        `input_ids`), `candidate_token_id`, `target_token_id`, `candidate_token`, `target_token`, `label` (1:
        important), `features` (float32), and the constant `pair`, JSON that says what was mined and how.

    Raises:
        ValueError: for a prompt that leaves no room in a model's context, and for an `output_dir` that isn't empty
            and wasn't written under the same settings.
    """
    if state_position not in STATE_POSITIONS:
        raise ValueError(f"`state_position` must be one of {list(STATE_POSITIONS)}, got {state_position!r}.")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an int of at least 1, got {value!r}.")
    examples = list(dataset)
    searcher = _Searcher(
        model,
        assistant_model,
        tokenizer,
        task,
        max_new_tokens,
        num_assistant_tokens,
        state_position,
        assistant_states,
        logit_features,
    )
    prompts = [searcher.prompt_ids(i, example) for i, example in enumerate(examples)]
    pair = searcher.pair()
    from accelerate import PartialState  # half a second that nobody else should wait for

    state = PartialState()
    if state.num_processes > 1 and output_dir is None:
        raise ValueError(
            f"{state.num_processes} processes mine together through a folder that all of them see: give `output_dir`."
        )
    with state.main_process_first():
        store = MinedExamples(output_dir, pair, prompts, searcher.identity(), locks=state.is_main_process)
    try:
        mined = store.load()
        share = range(state.process_index, len(examples), state.num_processes)
        waiting = [i for i in share if i not in mined]
        with tqdm(total=len(mined) + len(waiting), initial=len(mined), desc="mining", unit="problem") as progress:
            counts = sum(map(_counts, mined.values()), Counter())
            for i, example in _search_all(searcher, examples, prompts, waiting, batch_size):
                store.save(i, example)
                mined[i] = example
                counts += _counts(example)
                important = counts["important"] / max(1, counts["mismatches"])
                progress.set_postfix({**counts, "important": f"{important:.1%}"})
                progress.update()
        if state.num_processes > 1:
            state.wait_for_everyone()
            mined = store.load()
            counts = sum(map(_counts, mined.values()), Counter())
    finally:
        store.close()
    if counts["skipped"]:
        reasons = Counter(example.skipped for example in mined.values() if example.skipped)
        listed = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(5))
        logger.warning(f"{counts['skipped']} of {len(examples)} examples were skipped: {listed}")
    return to_dataset([row for i in sorted(mined) for row in mined[i].rows], pair)


def _search_all(
    searcher: _Searcher,
    examples: list[Mapping[str, Any]],
    prompts: list[list[int]],
    waiting: list[int],
    batch_size: int,
) -> Iterator[tuple[int, MinedExample]]:
    """Searches the `waiting` examples, `batch_size` at a time; yields each when it is finished."""
    searches: dict[int, Generator] = {}
    requests: dict[int, str] = {}
    while waiting or searches:
        while waiting and len(searches) < batch_size:
            i = waiting.pop(0)
            searches[i] = searcher.search(i, prompts[i])
            requests[i] = next(searches[i])
        order = sorted(requests)
        answers = _extract(searcher.task, [examples[i] for i in order], [requests[i] for i in order])
        for i, answer in zip(order, answers):
            finished = None
            if isinstance(answer, Exception):
                finished = MinedExample([], f"{type(answer).__name__}: {answer}")
            else:
                try:
                    requests[i] = searches[i].send(answer)
                except StopIteration as end:
                    finished = end.value
            if finished is not None:
                del searches[i], requests[i]
                yield i, finished


def _extract(task: Task, examples: list[Mapping[str, Any]], texts: list[str]) -> list[Any]:
    """The answers; where the task fails on an example, its error instead, so that one example can't stop a run."""
    try:
        return task.extract_answers(examples, texts)
    except Exception as error:  # a user's code, which may raise anything
        if len(examples) == 1:
            return [error]
        return [answer for pair in zip(examples, texts) for answer in _extract(task, [pair[0]], [pair[1]])]


def _counts(example: MinedExample) -> Counter:
    if example.skipped:
        return Counter(skipped=1)
    return Counter(mismatches=len(example.rows), important=sum(row["label"] for row in example.rows))


class _Searcher:
    """The search on one example at a time, over one pair of models."""

    def __init__(
        self,
        model: PreTrainedModel,
        assistant_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        max_new_tokens: int,
        num_assistant_tokens: int | None,
        state_position: str,
        assistant_states: bool,
        logit_features: bool,
    ):
        self.model, self.assistant_model = model, assistant_model
        self.tokenizer, self.task = tokenizer, task
        self.max_new_tokens = max_new_tokens
        self.state_position, self.assistant_states = state_position, assistant_states
        self.logit_features = logit_features
        self.draft_length = checked_draft_length(num_assistant_tokens, assistant_model, None).longest
        self.eos_token_ids = eos_token_ids(model)

    def pair(self) -> dict[str, Any]:
        """What a judge has to know of where its data come from."""
        described = {
            role: {
                "name": public_name(model.config.name_or_path),
                "revision": getattr(model.config, "_commit_hash", None),
                "hidden_size": hidden_size(model),
                "dtype": str(model.dtype).removeprefix("torch."),
            }
            for role, model in (("target", self.model), ("assistant", self.assistant_model))
        }
        layout = {
            "state_position": self.state_position,
            "hidden_size": hidden_size(self.model),
            "assistant_hidden_size": hidden_size(self.assistant_model) if self.assistant_states else None,
            "logit_features": self.logit_features,
        }
        return {**described, "features": layout, "decoding_settings": GREEDY_SETTINGS, "task": self.task.name}

    def identity(self) -> dict[str, Any]:
        """What a folder of finished examples has to agree on, beyond `pair`: a name doesn't fix the weights."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "eos_token_ids": sorted(self.eos_token_ids),
            "target_weights": _fingerprint(self.model),
            "assistant_weights": _fingerprint(self.assistant_model),
        }

    def prompt_ids(self, example_id: int, example: Mapping[str, Any]) -> list[int]:
        ids = self.tokenizer.encode(self.task.prompt(example, self.tokenizer), add_special_tokens=False)
        for model in (self.model, self.assistant_model):
            limit = max_positions(model)
            if limit is not None and len(ids) + self.max_new_tokens > limit:
                raise ValueError(
                    f"Example {example_id}: its prompt of {len(ids)} tokens and {self.max_new_tokens} new ones exceed "
                    f"the {limit} positions of {public_name(model.config.name_or_path)}. Lower `max_new_tokens` or "
                    "leave the example out."
                )
        return ids

    def search(self, example_id: int, prompt: list[int]) -> Generator[str, Any, MinedExample]:
        """Algorithm 1. Yields responses as text and is sent their answers."""
        target, assistant = _Prefix(self.model), _Prefix(self.assistant_model)
        sequence = self._continue(prompt, len(prompt), target, assistant, former=[])
        reference = yield self._text(sequence, prompt)
        if reference is None:
            return MinedExample([], "the target's response has no answer")
        rows = []
        position = len(prompt)
        while (found := assistant.first_difference(sequence, position, vocab_size(self.model))) is not None:
            position, candidate = found
            trial, features = self._try(sequence, position, candidate, len(prompt), target, assistant)
            answer = yield self._text(trial, prompt)
            important = not self.task.equivalent(answer, reference)
            rows.append(
                {
                    "example_id": example_id,
                    "input_ids": sequence[:position],
                    "prompt_length": len(prompt),
                    "position": position,
                    "candidate_token_id": candidate,
                    "target_token_id": sequence[position],
                    "candidate_token": self.tokenizer.decode([candidate]),
                    "target_token": self.tokenizer.decode([sequence[position]]),
                    "label": int(important),
                    "features": features,
                }
            )
            if not important:
                sequence = trial
            position += 1
        return MinedExample(rows)

    def _text(self, sequence: list[int], prompt: list[int]) -> str:
        return self.tokenizer.decode(sequence[len(prompt) :], skip_special_tokens=True)

    def _try(
        self,
        former: list[int],
        position: int,
        candidate: int,
        prompt_length: int,
        target: _Prefix,
        assistant: _Prefix,
    ) -> tuple[list[int], np.ndarray]:
        """The response with `candidate` at `position` of the former one, and what a judge sees of that candidate."""
        sequence = [*former[:position], candidate]
        # One pass over the last committed token and the candidate, as in a verification cycle.
        outputs = target.run(sequence, num_last=2, output_states=True)
        states = None
        if self.assistant_states:
            states = assistant.run(sequence, num_last=2, output_states=True).states[:, -2:]
        inputs = judge_inputs(
            torch.tensor([[candidate]], device=self.model.device),
            outputs.logits[:, -2:],
            outputs.states[:, -2:],
            states,
            self.state_position,
            self.logit_features,
        )
        response = self._continue(sequence, prompt_length, target, assistant, former)
        return response, inputs.features[0, 0].cpu().numpy()

    def _continue(
        self, sequence: list[int], prompt_length: int, target: _Prefix, assistant: _Prefix, former: list[int]
    ) -> list[int]:
        """The target's greedy continuation, written by the lossless loop on the cached prefix.

        Candidates are what the former response says, where the new one joins it again, or else the assistant's.
        """
        max_length = prompt_length + self.max_new_tokens
        if len(sequence) == max_length or (len(sequence) > prompt_length and sequence[-1] in self.eos_token_ids):
            return sequence
        target.rewind(sequence, num_last=1)
        assistant.rewind(sequence, num_last=1)
        # Called past `generate`, whose configs could bring processors along: this is plain greedy decoding.
        criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=max_length)])
        if self.eos_token_ids:
            criteria.append(EosTokenCriteria(eos_token_id=sorted(self.eos_token_ids)))
        drafter = JudgeCandidateGenerator(
            self.assistant_model,
            self.model,
            self.draft_length,
            do_sample=False,
            eos_token_ids=self.eos_token_ids,
            cache=assistant.cache,
        )
        output = judge_decoding(
            self.model,
            torch.tensor([sequence], device=self.model.device),
            LogitsProcessorList(),
            criteria,
            GenerationConfig(do_sample=False),
            assistant_model=self.assistant_model,
            candidate_generator=FormerResponse(former, drafter),
            num_assistant_tokens=max(self.draft_length, LONGEST_REPETITION),
            past_key_values=target.cache,
        )
        response = output[0].tolist()
        target.tokens = response[:-1]
        assistant.tokens = response[: assistant.cache.get_seq_length()]
        return response


def _fingerprint(model: PreTrainedModel) -> str:
    """A few numbers of every weight, hashed: cheap, and training changes all of them."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.is_meta:
            digest.update(parameter.detach().flatten()[:4].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Prefix:
    """A model's cache together with the tokens in it, so that only what changed is computed again."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.cache = rewindable_cache(model)
        self.tokens: list[int] = []

    def rewind(self, sequence: list[int], num_last: int) -> None:
        """Leaves in the cache what it shares with `sequence`, less the last `num_last` tokens."""
        shared = 0
        for ours, theirs in zip(self.tokens, sequence[: len(sequence) - num_last]):
            if ours != theirs:
                break
            shared += 1
        self.cache.crop(-(len(self.tokens) - shared))
        self.tokens = self.tokens[:shared]

    def run(self, sequence: list[int], num_last: int, output_states: bool = False) -> Pass:
        """Makes the cache hold `sequence`; outputs cover at least its last `num_last` positions."""
        self.rewind(sequence, num_last)
        # Where the target has more tokens than the assistant, any other token will do, as when drafting.
        tokens = torch.tensor([sequence[len(self.tokens) :]]).clamp(max=vocab_size(self.model) - 1)
        outputs = cached_forward(self.model, tokens, self.cache, num_logits=num_last, output_states=output_states)
        self.tokens = list(sequence)
        return outputs

    def first_difference(self, sequence: list[int], start: int, num_tokens: int) -> tuple[int, int] | None:
        """The first position from `start` on at which the model's argmax isn't the sequence's, and that argmax.

        Of the model's vocabulary only the first `num_tokens` count: those that the other model has, too.
        """
        if start >= len(sequence):
            return None
        logits = self.run(sequence[:-1], num_last=len(sequence) - start).logits[0, start - len(sequence) :]
        choices = logits[:, :num_tokens].argmax(dim=-1).tolist()
        for position, choice in enumerate(choices, start):
            if choice != sequence[position]:
                return position, choice
        return None
