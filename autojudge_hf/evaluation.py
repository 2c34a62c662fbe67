# SPDX-License-Identifier: Apache-2.0
"""What a judge costs in accuracy and gains in speed, measured by decoding."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .checks import checked_judge
from .forward import eos_token_ids
from .generation import judge_decoding
from .modeling import Judge
from .tasks import Task


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_judge(
    model: PreTrainedModel,
    assistant_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    task: Task,
    judge: Judge,
    *,
    thresholds: Sequence[float],
    num_assistant_tokens: int | None = None,
    max_new_tokens: int,
    batch_size: int = 1,
) -> list[dict[str, Any]]:
    """Decodes a dataset lossless and at each threshold, under the settings that the judge was mined under.

    Args:
        model, assistant_model, tokenizer, dataset, task: as in `mine_mismatches`; `task.is_correct` grades.
        judge (`Judge`): the judge to measure.
        thresholds (`Sequence[float]`): values of `judge_threshold`.
        num_assistant_tokens (`int`, *optional*): candidates per cycle, the lossless row's included.
        max_new_tokens (`int`): limit of a response, in tokens.
        batch_size (`int`, *optional*, defaults to 1): prompts decoded at once.

    Returns:
        `list[dict]`: the lossless row, then one per threshold, with `threshold` (`None`: lossless), `accuracy`,
        `tokens_per_cycle`, `tokens_per_second`, `mean_response_length` (tokens), `correct` (one bool per example, for
        paired comparisons) and `texts` (the responses).

    Raises:
        ValueError: before any decoding, for a judge that doesn't fit, a threshold outside [0, 1], no examples.
    """
    examples = list(dataset)
    settings = dict(judge.config.decoding_settings)
    if not settings["do_sample"]:
        settings["top_k"] = 50  # `generate`'s default: it warns of any other without sampling
    for threshold in thresholds:
        checked_judge(judge, threshold, model, assistant_model, GenerationConfig(**settings))
    measure = functools.partial(
        measure_decoding, model, tokenizer, examples, task, max_new_tokens=max_new_tokens, batch_size=batch_size
    )
    shared = {"assistant_model": assistant_model, **settings, "return_dict_in_generate": True}
    lossless = functools.partial(
        judge_decoding, assistant_model=assistant_model, num_assistant_tokens=num_assistant_tokens
    )
    rows = [{"threshold": None, **measure("lossless", custom_generate=lossless, **shared)}]
    for threshold in thresholds:
        options = {"judge": judge, "judge_threshold": threshold, "num_assistant_tokens": num_assistant_tokens}
        rows.append({"threshold": threshold, **measure(f"threshold {threshold:.3g}", **options, **shared)})
    return rows


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
        `dict`: `accuracy`, `tokens_per_cycle`, `tokens_per_second`, `mean_response_length`, `correct`, `texts`.

    Raises:
        ValueError: for no examples.
    """
    if not examples:
        raise ValueError("Expected at least one example to decode, got none.")
    texts, num_tokens, num_forwards, seconds = [], 0, 0, 0.0
    eos = eos_token_ids(model)
    batches = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    decode = functools.partial(_decode, model, max_new_tokens=max_new_tokens, **generate_kwargs)
    for number, batch in enumerate(tqdm(batches, desc=description, unit="batch")):
        prompts = [task.prompt(example, tokenizer) for example in batch]
        inputs = tokenizer(
            prompts, return_tensors="pt", padding=batch_size > 1, padding_side="left", add_special_tokens=False
        ).to(model.device)
        if number == 0:
            decode(inputs)
        _synchronize(model)
        started = time.perf_counter()
        sequences, forwards, free_tokens = decode(inputs)
        _synchronize(model)
        seconds += time.perf_counter() - started
        for sequence in sequences:
            response = _trimmed(sequence[inputs["input_ids"].shape[1] :], eos)
            num_tokens += len(response) - free_tokens
            texts.append(tokenizer.decode(response, skip_special_tokens=True))
        num_forwards += forwards
    answers = task.extract_answers(examples, texts)
    correct = [task.is_correct(example, answer) for example, answer in zip(examples, answers)]
    all_tokens = num_tokens + (len(examples) if free_tokens else 0)
    return {
        "accuracy": float(np.mean(correct)),
        "tokens_per_cycle": num_tokens / max(1, num_forwards),
        "tokens_per_second": all_tokens / seconds,
        "mean_response_length": all_tokens / len(examples),
        "correct": correct,
        "texts": texts,
    }


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


def paired_interval(
    first: Sequence[bool], second: Sequence[bool], *, num_samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % bootstrap interval of `mean(first) - mean(second)` over the same examples."""
    difference = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    rng = np.random.default_rng(seed)
    # The mean of a bootstrap sample only depends on how often each value is drawn.
    values, counts = np.unique(difference, return_counts=True)
    draws = rng.multinomial(len(difference), counts / len(difference), size=num_samples)
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
    sequence = sequence.to(model.device)
    choices = model(sequence[None, :-1]).logits[0, prompt_length - 1 :].argmax(dim=-1)
    response = sequence[prompt_length:]
    parts = []
    for token, own in zip(response.tolist(), (choices == response).tolist()):
        if token in tokenizer.all_special_ids:
            continue
        text = tokenizer.decode([token])
        parts.append(text if own else f"\033[30;43m{text}\033[0m")
    return "".join(parts)


def _decode(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], **kwargs: Any) -> tuple[Any, int, int]:
    """Sequences, target forwards, and how many tokens of each row no counted forward committed."""
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
    counted = getattr(output, "num_target_forwards", None)
    if counted is None:
        return sequences.tolist(), calls * len(sequences), 0
    return sequences.tolist(), int(counted.sum()), 1


def _trimmed(response: list[int], eos: set[int]) -> list[int]:
    """Without the padding behind the first EOS token."""
    ends = [i for i, token in enumerate(response) if token in eos]
    return response[: ends[0] + 1] if ends else response


def _synchronize(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
