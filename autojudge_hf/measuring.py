# SPDX-License-Identifier: Apache-2.0
"""Decodes examples by one way to call `generate`: how many it gets right, in how many cycles, in what time."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .draft_length import clock
from .generation import JudgeDecoderOnlyOutput
from .model_properties import eos_token_ids, input_device
from .rows import left_padded
from .tasks.task import Task, answers_or_errors, name_of, prompt_ids


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


def measure_decoding(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Mapping[str, Any]],
    task: Task,
    description: str,
    *,
    max_new_tokens: int,
    batch_size: int = 1,
    **generate_kwargs: Any,
) -> dict[str, Any]:
    """Decodes every example with `model.generate(**generate_kwargs)`, grades, and takes the time.

    The first batch is decoded once before the clock starts. Tokens per cycle are new tokens per target forward; the
    counts come from the output where it has them (then the prefill and its token aren't counted), otherwise from the
    model's calls.

    Returns:
        `dict`: `accuracy`, `tokens_per_cycle`, `tokens_per_second`, `mean_response_length` (tokens),
        `mismatches_accepted` (share of the mismatches that the judge kept; `None` without counts), and for paired
        comparisons one value per example: `correct`, `texts`, `num_tokens` and `num_target_forwards`, whose sums are
        the two that tokens per cycle divides.

    Raises:
        ValueError: for no examples.
    """
    if not examples:
        raise ValueError("Expected at least one example to decode, got none.")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"`batch_size` must be an int of at least 1, got {batch_size!r}.")
    prompts = [task.prompt(example, tokenizer) for example in examples]
    tokens = [prompt_ids(i, prompt, tokenizer) for i, prompt in enumerate(prompts)]
    _check_gold_answers(task, examples)
    texts, num_tokens, num_forwards = ([None] * len(examples) for _ in range(3))
    accepted = rejected = seconds = 0
    is_counted = False
    # Rows of a batch wait for its longest.
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i])) if batch_size > 1 else range(len(examples))
    batches = [order[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    decode = functools.partial(decode_batch, model, max_new_tokens=max_new_tokens, **generate_kwargs)
    for number, batch in enumerate(tqdm(batches, desc=description, unit="batch")):
        inputs = _inputs(model, tokenizer, [tokens[i] for i in batch])
        if number == 0:
            decode(inputs)
        started = clock(model.device)
        responses, forwards, decisions = decode(inputs)
        seconds += clock(model.device) - started
        is_counted = decisions is not None
        for i, response, num_cycles in zip(batch, responses, forwards):
            # Where cycles are counted, the prefill isn't one, and its token is free.
            num_tokens[i], num_forwards[i] = len(response) - is_counted, num_cycles
            texts[i] = tokenizer.decode(response, skip_special_tokens=True)
        if is_counted:
            accepted, rejected = accepted + decisions[0], rejected + decisions[1]
    verdicts = _graded(task, examples, texts)
    if failed := [error for error in verdicts if isinstance(error, BaseException)]:
        logger.warning(
            f"{description}: the task failed on {len(failed)} of {len(examples)} examples, which count as wrong: "
            f"{type(failed[0]).__name__}: {failed[0]}"
        )
    correct = [verdict is True for verdict in verdicts]
    all_tokens = sum(num_tokens) + is_counted * len(examples)
    return {
        "accuracy": float(np.mean(correct)),
        "tokens_per_cycle": sum(num_tokens) / max(1, sum(num_forwards)),
        "tokens_per_second": all_tokens / seconds,
        "mean_response_length": all_tokens / len(examples),
        "mismatches_accepted": accepted / max(1, accepted + rejected) if is_counted else None,
        "correct": correct,
        "texts": texts,
        "num_tokens": num_tokens,
        "num_target_forwards": num_forwards,
    }


def _check_gold_answers(task: Task, examples: Sequence[Mapping[str, Any]]) -> None:
    """Fails before any decoding where a gold answer is missing."""
    for i, example in enumerate(examples):
        try:
            task.is_correct(example, None)
        except (TypeError, AttributeError):
            pass  # that no answer isn't one says nothing
        except KeyError as error:
            if error.args != (None,):  # nor that it is no key
                raise
        except ValueError as error:
            raise ValueError(
                f"Example {i} can't be graded: `is_correct` of {name_of(task)}, asked before anything is decoded "
                f"about no answer (`None`, which is wrong), failed with: {error}"
            ) from error


def _graded(task: Task, examples: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[bool | BaseException]:
    """Whether each response is right; where the task fails on one, its error."""
    verdicts: list[bool | BaseException] = []
    for example, answer in zip(examples, answers_or_errors(task, examples, texts)):
        try:
            if not isinstance(answer, Exception):
                answer = answer is not None and bool(task.is_correct(example, answer))
            verdicts.append(answer)
        except (Exception, SystemExit) as error:  # a user's code, which may raise anything
            verdicts.append(error)
    return verdicts


def _inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> dict[str, torch.Tensor]:
    """Padded on the left, without a word to the tokenizer: not every one has a padding token."""
    input_ids, attention_mask = left_padded(prompts, tokenizer.pad_token_id or 0)
    device = input_device(model)
    return {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}


def decode_batch(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], **kwargs: Any
) -> tuple[list[list[int]], list[int], tuple[int, int] | None]:
    """Every row's response, its target forwards, and how many mismatches were accepted and rejected, if counted."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    hook = model.register_forward_pre_hook(count)
    try:
        output = model.generate(**inputs, **kwargs)
    finally:
        hook.remove()
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    eos = eos_token_ids(model)
    responses = [_trimmed(response, eos) for response in sequences[:, inputs["input_ids"].shape[1] :].tolist()]
    if not isinstance(output, JudgeDecoderOnlyOutput):
        return responses, [calls] * len(responses), None
    decisions = int(output.num_judge_accepted.sum()), int(output.num_judge_rejected.sum())
    return responses, output.num_target_forwards.tolist(), decisions


def _trimmed(response: list[int], eos: set[int]) -> list[int]:
    """Without the padding behind the first EOS token."""
    ends = [i for i, token in enumerate(response) if token in eos]
    return response[: ends[0] + 1] if ends else response
