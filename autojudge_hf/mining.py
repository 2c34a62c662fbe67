# SPDX-License-Identifier: Apache-2.0
"""Mining: finds the mismatches between two models and which of them are important (semi-greedy search)."""

from __future__ import annotations

import datetime
import hashlib
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig

from .checks import checked_draft_length
from .configuration import GREEDY_SETTINGS, public_name
from .early_exit import first_layers
from .mined_examples import FinishedExample, MinedExamples
from .mined_features import FEATURES_DTYPES, described, described_layout, feature_layout
from .model_properties import (
    drafts_from_target,
    eos_token_ids,
    max_positions,
    reads_targets_cache,
    reads_targets_layers,
    unwrapped,
)
from .mtp import heads_of
from .search import SemiGreedySearch
from .supported import (
    DRAFTERS,
    check_drafters,
    check_is_model,
    check_models,
    check_one_vocabulary,
    check_reads_layers,
    check_reads_text,
)
from .tasks.task import Task, checked_examples, name_of, prompt_ids


if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


def mine_mismatches(
    model: PreTrainedModel,
    assistant_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    task: Task,
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    output_dir: str | Path | None = None,
    num_assistant_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    state_position: str = "candidate",
    assistant_states: bool = False,
    logit_features: bool = False,
    assistant_logit_features: bool = False,
    features_dtype: str | None = "float32",
) -> datasets.Dataset:
    """Runs the semi-greedy search (AutoJudge, arXiv 2504.20039, algorithm 1) on every example.

    Start from the target's greedy response. At the earliest position where the assistant would have written another
    token, put that token and let the target continue. If the new answer is equivalent to the target's own, the
    mismatch is unimportant and the search goes on from the new response; otherwise it is important and the target's
    token stays. Only positions to the right of the last decision are looked at again.

    An assistant that reads the text is asked at every position. One that drafts from the target's states (DFlash), and
    the target's own heads, are asked draft by draft, as in decoding: a draft goes on behind a harmless mismatch, and
    behind an important one the next begins.

    Both models decode greedily, or sample at `temperature`, whatever their generation configs say; EOS ids are the
    target's.

    An example on which the task fails, or that the target has no answer to, is skipped with a warning; the same call
    tries the former again.

    Under `accelerate launch` the processes share the examples between them, through `output_dir`, and each returns the
    whole dataset.

    Args:
        model (`PreTrainedModel`): the target.
        assistant_model (`PreTrainedModel`, *optional*): the assistant; `None`: what the target's generation config
            says, `use_mtp` or `assistant_early_exit`.
        tokenizer (`PreTrainedTokenizerBase`): theirs.
        dataset (iterable of mappings): the task's examples.
        task (`Task`): prompts, answers, equivalence.
        max_new_tokens (`int`): limit of the whole response, in tokens.
        batch_size (`int`, *optional*, defaults to 16): examples decoded at once, and their answers extracted together,
            in a thread, while another such batch is decoded. An example that is finished makes room for the next. The
            result doesn't depend on it.
        output_dir (`str` or `Path`, *optional*): where finished examples are kept. The same call with the same
            folder goes on after an interruption.
        num_assistant_tokens (`int`, *optional*): draft length of the (lossless) decoding. Changes only the speed, but
            for those that draft from the target's states: then as many as you will decode with.
        temperature (`float`, *optional*, defaults to 0.0): 0 is greedy. Above, both models draw with the same noise
            (Gumbel-max), which follows from `seed` and the tokens so far: a mismatch is a difference between the
            models, not between two throws of dice.
        seed (`int`, *optional*, defaults to 0): of the noise.
        state_position (`str`, *optional*, defaults to `"candidate"`): see `JudgeConfig`.
        assistant_states (`bool`, *optional*, defaults to `False`): put the assistant's state in front of the
            target's.
        logit_features (`bool`, *optional*, defaults to `False`): put what the target's logits say behind the
            states; see `JudgeConfig`.
        assistant_logit_features (`bool`, *optional*, defaults to `False`): and what the assistant's logits add.
        features_dtype (`str`, *optional*, defaults to `"float32"`): `"float16"` halves the disk space. `None` keeps
            tokens only, a few hundred bytes a mismatch, and [`compute_features`] finds the features from them.

    Returns:
        `datasets.Dataset`: a row a mismatch, in the order of examples and positions, with the columns `example_id`,
        `input_ids` (prompt and response before the mismatch), `prompt_length`, `position` (absolute: the length of
        `input_ids`), `candidate_token_id`, `target_token_id`, `candidate_token`, `target_token`, `label` (1:
        important), `features`, and the constant `pair`, JSON that says what was mined and how.

    Raises:
        ValueError: for an empty prompt or one that leaves no room in a model's context, and for an `output_dir` that
            isn't empty and wasn't written under the same settings.
    """
    _check_arguments(max_new_tokens, batch_size, features_dtype, seed, temperature)
    temperature = float(temperature)  # as it is compared and written down
    examples = checked_examples(dataset, task)
    if assistant_model is None:
        drafters = GenerationConfig(**{name: getattr(model.generation_config, name) for name in DRAFTERS})
        check_drafters(model, None, drafters)
        if drafters.assistant_early_exit is not None:
            assistant_model = first_layers(model, drafters.assistant_early_exit)
    else:
        check_is_model(assistant_model)
        drafters = GenerationConfig()
    _check_drafter(model, assistant_model, assistant_states or assistant_logit_features)
    draft_length = checked_draft_length(num_assistant_tokens, model, assistant_model, drafters)
    if isinstance(draft_length, str):
        raise ValueError(f"`num_assistant_tokens` of mining must be an int of at least 1, got {draft_length!r}.")
    reads_states = assistant_model is None or drafts_from_target(assistant_model)
    readers = [model] if reads_states else [model, assistant_model]
    prompts = [
        _fitting_prompt(i, example, task, tokenizer, readers, max_new_tokens) for i, example in enumerate(examples)
    ]
    assistant = assistant_model if assistant_states else None
    layout = feature_layout(state_position, model, assistant, logit_features, assistant_logit_features)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    pair = {
        "target": described(model),
        "assistant": described(assistant_model or model),
        "features": None if features_dtype is None else described_layout(layout),
        "features_dtype": features_dtype or "float32",
        "decoding_settings": {**GREEDY_SETTINGS, **sampling},
        "task": name_of(task),
    }
    # What a folder of finished examples has to agree on, too: a name doesn't fix the weights.
    identity = {
        "max_new_tokens": max_new_tokens,
        "seed": seed if sampling else None,
        "eos_token_ids": sorted(eos_token_ids(model)),
        "target_weights": _fingerprint(model),
        "assistant_weights": _fingerprint(assistant_model or heads_of(unwrapped(model))),
    }
    if reads_states:
        identity["num_assistant_tokens"] = draft_length
    search = SemiGreedySearch(
        model,
        assistant_model,
        tokenizer,
        task,
        max_new_tokens=max_new_tokens,
        num_assistant_tokens=draft_length,
        temperature=temperature,
        seed=seed,
        layout=layout,
    )
    from accelerate import PartialState  # half a second that nobody else should wait for

    state = PartialState()
    if state.num_processes > 1 and output_dir is None:
        raise ValueError(
            f"{state.num_processes} processes mine together through a folder that all of them see: give `output_dir`."
        )
    with state.main_process_first():
        store = MinedExamples(output_dir, pair, prompts, identity, locks=state.is_main_process)
    # A share may take hours longer than another's, where the group's own barrier gives up after minutes.
    everyone = _group_that_waits() if state.num_processes > 1 else None
    started, counts = time.perf_counter(), Counter()
    hook = model.register_forward_pre_hook(lambda *_: counts.update({"target forwards": 1}))
    try:
        own = range(state.process_index, len(examples), state.num_processes)
        share = [(i, examples[i], prompts[i]) for i in own]
        _mine(search, share, store, batch_size, counts, keeps_features=features_dtype is not None)
        for is_mains_turn in (True, False):
            if everyone is not None:
                torch.distributed.barrier(everyone)
            if state.is_main_process == is_mains_turn:
                finished = store.finished()
                mined = store.dataset(finished)
    finally:
        hook.remove()
        store.close()
        if everyone is not None:
            torch.distributed.destroy_process_group(everyone)
    took = (
        f"{counts['target forwards']} target forwards and {time.perf_counter() - started:.0f} seconds in this "
        f"process, {_peak_memory(model.device)}"
    )
    _report(finished.values(), len(examples), took if state.is_main_process else None)
    return mined


def _check_arguments(
    max_new_tokens: int, batch_size: int, features_dtype: str | None, seed: int, temperature: float
) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an int of at least 1, got {value!r}.")
    if features_dtype not in (*FEATURES_DTYPES, None):
        raise ValueError(f"`features_dtype` must be one of {[*FEATURES_DTYPES, None]}, got {features_dtype!r}.")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"`seed` must be an int of 64 bits, got {seed!r:.50}.")
    if not isinstance(temperature, (int, float)) or not 0.0 <= temperature < math.inf:
        raise ValueError(f"`temperature` must be 0 (greedy) or a positive number, got {temperature!r}.")


def _check_drafter(model: PreTrainedModel, assistant_model: PreTrainedModel | None, reads_assistant: bool) -> None:
    """Raises a `ValueError` for what the search can't ask, and for features that nobody computes."""
    if assistant_model is None:
        check_models(model)
        if not model.generation_config.use_mtp:
            raise ValueError(
                "Mining needs a model to ask: expected an `assistant_model`, or `use_mtp=True` or "
                "`assistant_early_exit=<layers>` in the target's generation config, got None of them."
            )
    else:
        check_models(model, assistant_model)
        if reads_targets_cache(assistant_model):
            raise ValueError(
                f"Mining doesn't support {type(assistant_model).__name__}, which reads the target's cache. Mine with "
                "an assistant that reads the text: a judge that reads the target alone serves either."
            )
        if reads_targets_layers(assistant_model):
            check_reads_layers(model, assistant_model)
        else:
            check_one_vocabulary(model, assistant_model)
    if reads_assistant:
        check_reads_text(assistant_model)


def _mine(
    search: SemiGreedySearch,
    share: list[tuple[int, Mapping[str, Any], list[int]]],
    store: MinedExamples,
    batch_size: int,
    counts: Counter,
    *,
    keeps_features: bool,
) -> None:
    """Searches what isn't finished of this process' share (example ids, examples, prompts), and saves it."""
    # Where the task failed it may be mended by now.
    finished = {i: example for i, example in store.finished().items() if not example.failed}
    waiting = [(i, example, prompt) for i, example, prompt in share if i not in finished]
    for example in finished.values():
        counts.update(example.counts)
    total = len(finished) + len(waiting)
    with tqdm(total=total, initial=len(finished), desc="mining", unit="problem") as progress:
        for i, example in search(waiting, batch_size):
            if not keeps_features:
                example.rows = [{**row, "features": []} for row in example.rows]
            store.save(i, example)
            counts.update(example.counts)
            important = counts["important"] / max(1, counts["mismatches"])
            progress.set_postfix({**counts, "important": f"{important:.1%}"})
            progress.update()


def _group_that_waits() -> torch.distributed.ProcessGroup:
    """All processes, however long one waits for the others; one that ends with an error still ends the waiting."""
    return torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=365))


def _report(finished: Collection[FinishedExample], num_examples: int, took: str | None) -> None:
    """Warns of what was skipped; says what was mined, and what it took, in the process that is told that."""
    reasons = Counter(example.skipped for example in finished if example.skipped)
    if reasons:
        listed = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(5))
        logger.warning(f"{reasons.total()} of {num_examples} examples were skipped: {listed}")
    if took is not None:
        mismatches, important = (sum(x.counts.get(name, 0) for x in finished) for name in ("mismatches", "important"))
        # To where the progress bar is, as its last word.
        tqdm.write(
            f"mined {len(finished)} examples ({reasons.total()} skipped): {mismatches} mismatches, "
            f"{important / max(1, mismatches):.1%} important; {took}",
            file=sys.stderr,
        )


def _fitting_prompt(
    example_id: int,
    example: Mapping[str, Any],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    models: Iterable[PreTrainedModel],
    max_new_tokens: int,
) -> list[int]:
    ids = prompt_ids(example_id, task.prompt(example, tokenizer), tokenizer)
    for model in models:
        limit = max_positions(model)
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"Example {example_id}: its prompt of {len(ids)} tokens and {max_new_tokens} new ones exceed the "
                f"{limit} positions of {public_name(model.config.name_or_path)}. Lower `max_new_tokens` or leave the "
                "example out."
            )
    return ids


def _peak_memory(device: torch.device) -> str:
    """The most that was allocated on a GPU, or else held by the process, so far."""
    if device.type == "cuda":
        peak = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
        return f"at most {peak / 2**30:.1f} GiB of GPU memory"
    if sys.platform == "win32":
        return "memory not measured"
    import resource  # Unix only

    unit = 1 if sys.platform == "darwin" else 1024
    return f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB of memory"


def _fingerprint(model: PreTrainedModel) -> str:
    """A few numbers of every weight, hashed: cheap, and training changes all of them."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if not parameter.is_meta:
            digest.update(parameter.detach().flatten()[:4].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
