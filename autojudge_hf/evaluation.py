# SPDX-License-Identifier: Apache-2.0
"""What a judge costs in accuracy and gains in speed, measured by decoding."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .checks import check_is_judge, checked_judge
from .draft_length import clock
from .features import of_candidates
from .forward import eos_token_ids, input_device
from .generation import JudgeDecoderOnlyOutput, judge_decoding
from .rows import left_padded
from .tasks.task import Task, answers_or_errors, checked_examples


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .modeling import Judge


logger = logging.getLogger(__name__)


def evaluate_judge(
    model: PreTrainedModel,
    assistant_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    task: Task,
    judge: Judge,
    *,
    thresholds: Iterable[float | str],
    num_assistant_tokens: int | Literal["adaptive"] | None = None,
    max_new_tokens: int,
    batch_size: int = 1,
) -> list[dict[str, Any]]:
    """Decodes a dataset lossless and at each threshold, under the settings that the judge was mined under.

    Args:
        model, assistant_model, tokenizer, dataset, task: as in `mine_mismatches`; `task.is_correct` grades.
        judge (`Judge`): the judge to measure.
        thresholds (`Iterable[float | str]`): values of `judge_threshold`, or their names in the judge's config.
        num_assistant_tokens (`int` or `"adaptive"`, *optional*): candidates per cycle, the lossless row's included.
        max_new_tokens (`int`): limit of a response, in tokens.
        batch_size (`int`, *optional*, defaults to 1): prompts decoded at once.

    Returns:
        `list[dict]`: the lossless row, then one per threshold, with `threshold` (`None`: lossless), and what
        [`measure_decoding`] says.

    Raises:
        ValueError: before any decoding, for a judge that doesn't fit, a threshold outside [0, 1], no examples.
    """
    options = {"thresholds": thresholds, "num_assistant_tokens": num_assistant_tokens}
    options |= {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    return list(rows_one_by_one(model, assistant_model, tokenizer, dataset, task, judge, **options))


def rows_one_by_one(
    model: PreTrainedModel,
    assistant_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    task: Task,
    judge: Judge,
    *,
    thresholds: Iterable[float | str],
    num_assistant_tokens: int | str | None,
    lossless: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """The rows of `evaluate_judge` as they are measured; the lossless one may be known already."""
    examples = checked_examples(dataset, task)
    check_is_judge(judge)
    settings = dict(judge.config.decoding_settings)
    if not settings["do_sample"]:
        settings["top_k"] = 50  # `generate`'s default: it warns of any other without sampling
    config = GenerationConfig(**settings)
    values = [checked_judge(judge, threshold, model, assistant_model, config) for threshold in listed(thresholds)]
    measure = functools.partial(measure_decoding, model, tokenizer, examples, task, **options)
    # Mining knows no stop strings either, which the model's own config may have.
    shared = {"assistant_model": assistant_model, **settings, "stop_strings": None, "return_dict_in_generate": True}
    loop = functools.partial(
        judge_decoding, assistant_model=assistant_model, num_assistant_tokens=num_assistant_tokens
    )
    yield lossless or {"threshold": None, **measure("lossless", custom_generate=loop, **shared)}
    for threshold in values:
        judged = {"judge": judge, "judge_threshold": threshold, "num_assistant_tokens": num_assistant_tokens}
        yield {"threshold": threshold, **measure(f"threshold {threshold:.3g}", **judged, **shared)}


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
    for example in examples:
        try:
            task.is_correct(example, None)  # fails now where the gold answer is missing
        except (TypeError, AttributeError):
            pass  # that no answer isn't one says nothing
        except KeyError as error:
            if error.args != (None,):  # nor that it is no key
                raise
    texts, num_tokens, num_forwards = ([None] * len(examples) for _ in range(3))
    accepted = rejected = seconds = 0
    is_counted = False
    # Rows of a batch wait for its longest.
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i])) if batch_size > 1 else range(len(examples))
    batches = [order[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    decode = functools.partial(decode_batch, model, max_new_tokens=max_new_tokens, **generate_kwargs)
    for number, batch in enumerate(tqdm(batches, desc=description, unit="batch")):
        inputs = _inputs(model, tokenizer, [prompts[i] for i in batch])
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
    if failed := [error for error in verdicts if isinstance(error, Exception)]:
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


def _graded(task: Task, examples: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[bool | Exception]:
    """Whether each response is right; where the task fails on one, its error."""
    verdicts: list[bool | Exception] = []
    for example, answer in zip(examples, answers_or_errors(task, examples, texts)):
        try:
            if not isinstance(answer, Exception):
                answer = answer is not None and bool(task.is_correct(example, answer))
            verdicts.append(answer)
        except Exception as error:  # a user's code, which may raise anything
            verdicts.append(error)
    return verdicts


def evaluation_summary(
    rows: Sequence[Mapping[str, Any]],
    *,
    dataset: str,
    split: str,
    num_assistant_tokens: int | Literal["adaptive"] | None = None,
) -> list[dict[str, Any]]:
    """What `evaluate_judge` measured, for `judge.config.evaluation`, and so for the judge's card, plot and metadata.

    Args:
        rows (`Sequence`): of `evaluate_judge`, the lossless one first.
        dataset, split (`str`): Hub id or name of the examples' dataset, and their split.
        num_assistant_tokens (`int`, *optional*): as it was measured with.

    Returns:
        `list[dict]`: per row its `threshold`, `accuracy`, the `drop` from the lossless accuracy with its paired 95 %
        interval (`drop_low`, `drop_high`), `tokens_per_cycle`, `speedup` (tokens per second to lossless),
        `mean_response_length` (tokens), and what the arguments say.
    """
    check_names(dataset=dataset, split=split)
    lossless = rows[0]
    if lossless["threshold"] is not None:
        raise ValueError(f"The first row must be the lossless one, got that of threshold {lossless['threshold']}.")
    summary = []
    for row in rows:
        low, high = paired_interval(lossless["correct"], row["correct"])
        summary.append(
            {
                "dataset": dataset,
                "split": split,
                "num_examples": len(row["correct"]),
                "num_assistant_tokens": num_assistant_tokens,
                "threshold": row["threshold"],
                "accuracy": row["accuracy"],
                "drop": lossless["accuracy"] - row["accuracy"],
                "drop_low": low,
                "drop_high": high,
                "tokens_per_cycle": row["tokens_per_cycle"],
                "speedup": row["tokens_per_second"] / lossless["tokens_per_second"],
                "mean_response_length": row["mean_response_length"],
            }
        )
    return summary


def listed(thresholds: Iterable[float | str]) -> list[float | str]:
    if isinstance(thresholds, str) or not isinstance(thresholds, Iterable):
        raise ValueError(f"`thresholds` must be a list, such as [0.05, 0.1], got {thresholds!r:.50}.")
    return list(thresholds)


def check_names(**names: Any) -> None:
    """Raises a `ValueError` for what can't stand in a judge's card as a name."""
    for argument, value in names.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"`{argument}` must be a name, for the judge's card, got {value!r:.50}.")


def paired_interval(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, float]:
    """95 % bootstrap interval of `mean(first) - mean(second)` over the same examples."""
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    rng = np.random.default_rng(0)
    # The mean of a bootstrap sample only depends on how often each value is drawn.
    values, counts = np.unique(difference, return_counts=True)
    draws = rng.multinomial(len(difference), counts / len(difference), size=10_000)
    low, high = np.quantile(draws @ values / len(difference), [0.025, 0.975])
    return float(low), float(high)


@torch.no_grad()
def highlight_accepted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequence: torch.LongTensor, prompt_length: int
) -> str:
    """The response of a greedily decoded `sequence`, with the tokens the target wouldn't have written in colour.

    One forward of the target over the whole sequence of shape `(length,)`; in a judged response these tokens are the
    mismatches that the judge accepted. Colours are ANSI codes, for a terminal.
    """
    sequence = sequence.to(input_device(model))
    response = sequence[prompt_length:]
    logits = model(sequence[None, :-1]).logits[:, prompt_length - 1 :]
    best, written = logits.amax(dim=-1), of_candidates(logits, response[None])
    # In half precision a tie falls either way, with two roundings in between at most.
    (is_own,) = written >= best - 2 * torch.finfo(logits.dtype).eps * best.abs()
    parts = []
    for token, own in zip(response.tolist(), is_own.tolist()):
        if token in tokenizer.all_special_ids:
            continue
        text = tokenizer.decode([token])
        parts.append(text if own else f"\033[30;43m{text}\033[0m")
    return "".join(parts)


def _inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Padded on the left, without a word to the tokenizer: not every one has a padding token."""
    texts = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    input_ids, attention_mask = left_padded(texts, tokenizer.pad_token_id or 0)
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
