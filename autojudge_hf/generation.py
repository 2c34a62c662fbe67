# SPDX-License-Identifier: Apache-2.0
"""The decoding loop."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import TYPE_CHECKING, Any

import torch

from .caches import leave_behind, make_rewindable, num_cached, rewind, rewindable_cache, shrink, use_up
from .candidate_generator import JudgeCandidateGenerator
from .certain_drafts import PromptLookup
from .checks import checked_draft_length, checked_judge, warn_once
from .dflash import DFlashCandidateGenerator
from .draft_length import draft_schedule
from .early_exit import first_layers
from .fixed_cache import FixedCache, give_fixed_cache_back, take_fixed_cache, why_not_fixed
from .forward import cached_forward, last_chunk
from .head_inputs import HeadInputs, head_reads_last_states
from .judging import Judging
from .model_properties import (
    CACHE_NAME,
    input_device,
    max_positions,
    reads_targets_cache,
    reads_targets_layers,
    takes_positions,
)
from .mtp import MTPCandidateGenerator
from .other_tokenizer import OtherTokenizer, is_other_tokenizer
from .outputs import JudgeDecoderOnlyOutput, KeptOutputs
from .rows import RowProcessors, Rows, StopRule
from .shared_cache import SharedCacheCandidateGenerator
from .supported import check_supported
from .verification import verify_greedy, verify_sampled


if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        StoppingCriteriaList,
    )
    from transformers.cache_utils import Cache
    from transformers.generation.streamers import BaseStreamer

    from .drafter import Drafter
    from .modeling import Judge


#: A state goes back to where a whole draft was accepted, and what was committed since is read again. Behind so many
#: tokens a cycle drafts nothing, so that nothing of it is taken back.
LONGEST_REREAD = 32


@torch.no_grad()
def judge_decoding(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    judge: Judge | None = None,
    assistant_model: PreTrainedModel | None = None,
    judge_threshold: float | str | None = None,
    num_assistant_tokens: int | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    streamer: BaseStreamer | None = None,
    candidate_generator: Drafter | None = None,
    **model_kwargs: Any,
) -> JudgeDecoderOnlyOutput | torch.LongTensor:
    """Assisted decoding that keeps harmless mismatches; lossless with `judge=None`.

    A decoding method for `generate(custom_generate=functools.partial(judge_decoding, judge=...,
    assistant_model=...), assistant_model=...)`; `generate(judge=...)` is the short form, and the only one for drafters
    of models that `generate` calls stateful, bar an assistant that the loop alone is told of. Each cycle drafts
    candidates, runs the target once over them, and commits a prefix and the target's next token; how many tokens
    that is differs from row to row, and a greedy row gives what it gives alone.

    Args:
        model (`PreTrainedModel`): the target.
        input_ids (`torch.LongTensor` of shape `(b, prompt_length)`): the prompts, padded on the left.
        logits_processor, stopping_criteria, generation_config: as `generate` prepares them.
        judge (`Judge`, *optional*): `None` accepts no mismatch.
        assistant_model (`PreTrainedModel`, *optional*): the drafter. Without one, `generation_config` says which:
            `prompt_lookup_num_tokens`, `assistant_early_exit` or `use_mtp`.
        judge_threshold (`float` or `str`, *optional*): accept a mismatch below this score, or below that of this name
            in `judge.config.thresholds`; default `judge.config.threshold`.
        num_assistant_tokens (`int` or `"adaptive"`, *optional*): candidates per cycle; default: the drafting
            model's generation config, or `prompt_lookup_num_tokens`. [`AdaptiveDraftLength`] says what `"adaptive"`
            does.
        tokenizer, assistant_tokenizer (`PreTrainedTokenizerBase`, *optional*): of the target, and of an assistant
            whose own is another one; [`OtherTokenizer`] drafts with it.
        streamer (`BaseStreamer`, *optional*): gets each cycle's tokens; for a single prompt.
        candidate_generator ([`Drafter`], *optional*): drafts in the assistant's place.
        model_kwargs: what `generate` prepared for the forward: cache, attention mask.

    Returns:
        [`JudgeDecoderOnlyOutput`] if `generation_config.return_dict_in_generate`, else the sequences, a
        `torch.LongTensor` of shape `(b, length)`.

    Raises:
        ValueError: before any forward, for whatever isn't supported or doesn't fit.
    """
    has_other_tokenizer = is_other_tokenizer(tokenizer, assistant_tokenizer)
    check_supported(model, assistant_model, has_other_tokenizer, input_ids, generation_config, streamer, model_kwargs)
    num_assistant_tokens = checked_draft_length(num_assistant_tokens, model, assistant_model, generation_config)
    own_assistant = assistant_model
    if generation_config.assistant_early_exit is not None:
        assistant_model = first_layers(model, generation_config.assistant_early_exit)
    threshold = checked_judge(judge, judge_threshold, model, assistant_model, generation_config, has_other_tokenizer)
    tokenizers = (tokenizer, assistant_tokenizer) if has_other_tokenizer else None
    # Of the target's tokens.
    is_reader = assistant_model is not None and not has_other_tokenizer and not reads_targets_layers(assistant_model)
    readers = [model, assistant_model] if is_reader else [model]

    device = input_device(model)  # looked up once: it takes longer than moving a tensor to where it is
    judging = Judging(judge, threshold, input_ids.device)
    circumstances = (judging.judge_type, round(threshold, 2), len(input_ids))
    draft_length = draft_schedule(num_assistant_tokens, model, own_assistant, generation_config, circumstances)
    rows = Rows(input_ids, model_kwargs.get("attention_mask"))
    stop = StopRule(stopping_criteria, input_ids)
    processors = RowProcessors(logits_processor, len(input_ids), stop.eos_token_ids)
    max_length = min((limit for limit in map(max_positions, readers) if limit), default=math.inf)
    with contextlib.ExitStack() as at_end:
        cache, assistant_cache = model_kwargs[CACHE_NAME], None
        if generation_config.cache_implementation == "static":
            budget = max(stop.max_new_tokens)
            fixed = functools.partial(_fixed_or_growing, at_end, len(input_ids), generation_config)
            longest = max(input_ids.shape[1] + budget, generation_config.max_cache_len or 0)
            cache = fixed(model, longest, draft_length.widths, judging.reads_target)
            if is_reader:
                # The newest token, and one more where the last candidate was accepted. A row that has no room left
                # drafts as far as the others.
                length = longest + min(draft_length.longest, budget)
                assistant_cache = fixed(assistant_model, length, [1, 2], judging.reads_assistant)
        else:
            make_rewindable(cache)
        if not isinstance(cache, FixedCache):
            # However it ends: a cache of the caller's has what is committed, or nothing.
            at_end.callback(
                lambda: leave_behind(cache, rows.input_ids.shape[1] - 1) if len(input_ids) == 1 else use_up(cache)
            )
        drafter = candidate_generator or _drafter(
            at_end,
            model,
            assistant_model,
            tokenizers,
            generation_config,
            judging,
            stop.eos_token_ids,
            cache,
            assistant_cache,
        )
        reads_states = judging.reads_target or drafter.reads_target_states
        target_head = at_end.enter_context(HeadInputs(model)) if reads_states else None
        kept = KeptOutputs(generation_config, len(input_ids))

        prefill = True
        while rows.active:
            started = draft_length.now(device)
            # The first cycle is the prefill: no candidates, the target's first token.
            sequence, assistant_logits, room = rows.input_ids, None, [0] * len(rows.active)
            if not prefill:
                # A cycle commits one token more than it has candidates, and the newest one needs no position yet.
                room = [stop.room(rows, j) - 1 for j in range(len(rows.active))]
                longest_draft = min(draft_length.value, max(room), max(0, max_length - max(rows.lengths)))
                if rows.input_ids.shape[1] - num_cached(cache) > LONGEST_REREAD:
                    longest_draft = 0
                process = functools.partial(processors, rows, room) if any(processors.processors) else None
                limits = [min(longest_draft, n) for n in room]
                sequence, assistant_logits = drafter.get_candidates(sequence, rows.attention_mask, limits, process)
            drafted = draft_length.now(device)
            candidate_ids = sequence[:, rows.input_ids.shape[1] :]
            k = candidate_ids.shape[1]

            attention_mask = rows.attention_mask
            if attention_mask is not None:
                attention_mask = torch.nn.functional.pad(attention_mask, (0, k), value=1).to(device)
            tokens = sequence[:, num_cached(cache) :].to(device)
            if prefill and generation_config.prefill_chunk_size is not None:
                tokens = last_chunk(model, tokens, cache, attention_mask, generation_config.prefill_chunk_size)
            outputs = cached_forward(
                model,
                tokens,
                cache,
                attention_mask,
                num_logits=k + 1,
                head=target_head if k > 0 or drafter.reads_target_states else None,
                output_hidden_states=kept.hidden_states is not None or drafter.target_layers or False,
            )
            logits = outputs.logits[:, -k - 1 :].to(input_ids.device, torch.float32)
            states = None if outputs.states is None else outputs.states[:, -k - 1 :]
            hidden_states = outputs.hidden_states
            if hidden_states is not None and not prefill:  # and not what is read again
                hidden_states = tuple(None if layer is None else layer[..., -k - 1 :, :] for layer in hidden_states)
            lengths = [min(k, *limits) for limits in zip(room, drafter.lengths or room)]
            processed = processors(rows, lengths, candidate_ids, logits)
            if generation_config.do_sample:
                verification = verify_sampled(candidate_ids, processed, assistant_logits, lengths)
            else:
                verification = verify_greedy(candidate_ids, processed)

            is_harmless = None
            if judging.wants(verification.matches):
                is_harmless = judging(candidate_ids, processed, states, drafter.states, assistant_logits)
            blocks, finished = [], []
            outcomes = verification.accept(candidate_ids, is_harmless, lengths, stop.eos_token_ids)
            for j, outcome in enumerate(outcomes):
                row, block = rows.active[j], outcome.block
                scores = kept.scores(row, processed[j, : len(block)]) if stop.others else None
                num_kept, done = stop(rows, j, block, scores)
                blocks.append(block[:num_kept])
                finished.append(done)
                kept.add(row, num_kept, processed, logits, hidden_states, j)
                if not prefill:
                    kept.count(row, outcome, num_kept)
            verified = draft_length.now(device)
            if streamer is not None:
                streamer.put(torch.tensor(blocks))
            # The newest token's keys and values aren't in the cache yet; those of rejected candidates are.
            rewind(cache, [k + 1 - len(block) for block in blocks])
            drafter.rewind([len(block) for block in blocks], states, hidden_states)
            columns = rows.input_ids.shape[1] + max(map(len, blocks))
            split = started if drafter.drafts_at_once else drafted
            draft_length.update(
                [outcome.num_candidates for outcome in outcomes],
                [len(outcome.judged) for outcome in outcomes],
                split - started,
                verified - split,
            )
            unfinished = rows.commit(blocks, finished)
            if unfinished and len(input_ids) > 1:
                unneeded = columns - rows.input_ids.shape[1]
                shrink(cache, unfinished, num_cached(cache) - unneeded)
                drafter.shrink(unfinished, unneeded)
            prefill = False

    if streamer is not None:
        streamer.end()
    if not judging.saw_only_finite_states():
        warn_once("Hidden states with NaN or infinity: the judge rejects the candidates they belong to.")
    pad_token_id = getattr(generation_config, "_pad_token_tensor", None)
    sequences = rows.sequences(0 if pad_token_id is None else int(pad_token_id))
    if not generation_config.return_dict_in_generate:
        return sequences
    # A batch's cache has lost the rows that finished first.
    reusable = {CACHE_NAME: cache} if len(input_ids) == 1 else {}
    return JudgeDecoderOnlyOutput(sequences, **kept.output(), **reusable)


def _drafter(
    at_end: contextlib.ExitStack,
    model: PreTrainedModel,
    assistant_model: PreTrainedModel | None,
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None,
    generation_config: GenerationConfig,
    judging: Judging,
    eos_token_ids: set[int],
    cache: Cache,
    assistant_cache: Cache | None,
) -> Drafter:
    """Where candidates come from, by what there is to draft with."""
    options = {"do_sample": generation_config.do_sample, "output_logits": judging.reads_assistant_logits}
    if generation_config.use_mtp:
        return MTPCandidateGenerator(model, **options)
    if assistant_model is None:
        return PromptLookup(model, generation_config)
    pair = assistant_model, model
    if tokenizers is not None:
        return OtherTokenizer(*pair, *tokenizers)
    if reads_targets_layers(assistant_model):
        return DFlashCandidateGenerator(*pair, **options)
    options["eos_token_ids"] = eos_token_ids
    if reads_targets_cache(assistant_model):
        return SharedCacheCandidateGenerator(*pair, cache=cache, **options)
    head = at_end.enter_context(HeadInputs(assistant_model)) if judging.reads_assistant else None
    return JudgeCandidateGenerator(*pair, cache=assistant_cache, head=head, **options)


def _fixed_or_growing(
    at_end: contextlib.ExitStack,
    num_rows: int,
    generation_config: GenerationConfig,
    model: PreTrainedModel,
    length: int,
    widths: Sequence[int],
    reads_states: bool,
) -> Cache:
    reason = why_not_fixed(model)
    if reason is None and not takes_positions(model):
        # Padding behind the tokens must have no positions that a model lacks.
        reason = "counts positions for itself"
    if reason is None and reads_states and not head_reads_last_states(model):
        # What is compiled has no hooks.
        reason = "mixes the states that a judge reads before its head sees them"
    if reason is not None:
        warn_once(f"{type(model).__name__} {reason}: in place of a static cache it gets a growing one.")
        return rewindable_cache(model)
    cache = take_fixed_cache(num_rows, generation_config, model, length, widths)
    at_end.callback(give_fixed_cache_back, model, cache)
    return cache
