# SPDX-License-Identifier: Apache-2.0
"""The decoding loop, its output, and `model.generate(..., judge=)`."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationMixin, LogitsProcessorList, StoppingCriteriaList, StopStringCriteria
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

from .candidate_generator import JudgeCandidateGenerator
from .configuration import checked_threshold, decoding_settings
from .features import judge_inputs
from .forward import cached_forward, hidden_size, max_positions, rewind, shrink
from .modeling import Judge
from .rows import RowProcessors, Rows, StopRule
from .verification import harmless, verify_greedy, verify_sampled


if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.generation.streamers import BaseStreamer


logger = logging.getLogger(__name__)


@dataclass
class JudgeDecoderOnlyOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., judge=, return_dict_in_generate=True)` returns: stock fields, and four counts per row.

    A response's first token comes from the prefill. Every verification cycle then commits its accepted candidates
    and one token of the target's own, unless the response ends within the cycle's candidates.

    Args:
        num_target_forwards (`torch.LongTensor` of shape `(batch_size,)`): verification cycles, prefill not counted.
        num_candidates (`torch.LongTensor` of shape `(batch_size,)`): tokens that the assistant proposed.
        num_matches (`torch.LongTensor` of shape `(batch_size,)`): committed because the target agreed.
        num_judge_accepted (`torch.LongTensor` of shape `(batch_size,)`): committed because the judge called the
            mismatch harmless.
    """

    num_target_forwards: torch.LongTensor | None = None
    num_candidates: torch.LongTensor | None = None
    num_matches: torch.LongTensor | None = None
    num_judge_accepted: torch.LongTensor | None = None

    def summary(self) -> str:
        """One line for a reader: what the whole batch's drafts came to."""
        names = ("num_target_forwards", "num_candidates", "num_matches", "num_judge_accepted")
        cycles, candidates, matched, judged = (int(getattr(self, name).sum()) for name in names)
        return (
            f"{(cycles + matched + judged) / max(1, cycles):.1f} tokens per cycle: {cycles} cycles, {candidates} "
            f"candidates, {matched} matched, {judged} accepted by the judge, {candidates - matched - judged} rejected"
        )


@torch.no_grad()
def judge_decoding(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    judge: Judge | None = None,
    assistant_model: PreTrainedModel | None = None,
    judge_threshold: float | None = None,
    num_assistant_tokens: int | None = None,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> JudgeDecoderOnlyOutput | torch.LongTensor:
    """Assisted decoding that keeps harmless mismatches; lossless with `judge=None`.

    A decoding method for `generate(custom_generate=functools.partial(judge_decoding, judge=...,
    assistant_model=...), assistant_model=...)`; `generate(judge=...)` is the short form. Each cycle drafts
    candidates, runs the target once over them, and commits a prefix and the target's next token; how many tokens
    that is differs from row to row, and a greedy row gives what it gives alone.

    Args:
        model (`PreTrainedModel`): the target.
        input_ids (`torch.LongTensor` of shape `(b, prompt_length)`): the prompts, padded on the left.
        logits_processor, stopping_criteria, generation_config: as `generate` prepares them.
        judge (`Judge`, *optional*): `None` accepts no mismatch.
        assistant_model (`PreTrainedModel`): the drafter.
        judge_threshold (`float`, *optional*): accept a mismatch below this score; default `judge.config.threshold`.
        num_assistant_tokens (`int`, *optional*): candidates per cycle; default: the assistant's generation config.
        streamer (`BaseStreamer`, *optional*): gets each cycle's tokens; for a single prompt.
        model_kwargs: what `generate` prepared for the forward: cache, attention mask.

    Returns:
        [`JudgeDecoderOnlyOutput`] if `generation_config.return_dict_in_generate`, else the sequences, a
        `torch.LongTensor` of shape `(b, length)`.

    Raises:
        ValueError: before any forward, for whatever isn't supported or doesn't fit.
    """
    num_assistant_tokens = _checked_draft_length(num_assistant_tokens, assistant_model)
    threshold = checked_judge(judge, judge_threshold, model, assistant_model, generation_config)
    _check_supported(model, assistant_model, input_ids, generation_config, streamer, model_kwargs)

    cache = model_kwargs["past_key_values"]
    cache.activate_past_recording()
    judges = judge is not None and threshold > 0.0
    reads_target = judges and judge.reads_states and judge.config.hidden_size is not None
    reads_assistant = judges and judge.reads_states and judge.config.assistant_hidden_size is not None
    rows = Rows(input_ids, model_kwargs.get("attention_mask"))
    stop = StopRule(stopping_criteria)
    processors = RowProcessors(logits_processor, len(input_ids))
    drafter = JudgeCandidateGenerator(
        assistant_model,
        model,
        num_assistant_tokens,
        do_sample=generation_config.do_sample,
        eos_token_ids=stop.eos_token_ids,
        output_states=reads_assistant,
    )
    max_length = min((n for n in (max_positions(model), max_positions(assistant_model)) if n), default=math.inf)
    kept_logits = _KeptLogits(generation_config, len(input_ids))
    counts = torch.zeros(len(input_ids), 4, dtype=torch.long)

    prefill = True
    while rows.active:
        # The first cycle is the prefill: no candidates, the target's first token.
        sequence, assistant_logits, room = rows.input_ids, None, [0] * len(rows.active)
        if not prefill:
            # A cycle commits one token more than it has candidates, and the newest one needs no position yet.
            room = [stop.room(rows, j) - 1 for j in range(len(rows.active))]
            longest_draft = min(max(room), max(0, max_length - max(rows.lengths)))
            process = functools.partial(processors, rows)
            sequence, assistant_logits = drafter.get_candidates(sequence, rows.attention_mask, longest_draft, process)
        candidate_ids = sequence[:, rows.input_ids.shape[1] :]
        k = candidate_ids.shape[1]
        lengths = _draft_lengths(candidate_ids, room, stop.eos_token_ids)

        attention_mask = rows.attention_mask
        if attention_mask is not None:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, k), value=1)
        outputs = cached_forward(
            model,
            sequence[:, cache.get_seq_length() :],
            cache,
            attention_mask,
            num_logits=k + 1,
            output_hidden_states=reads_target and k > 0,
        )
        logits = outputs.logits[:, -k - 1 :].to(input_ids.device, torch.float32)
        processed = processors(rows, candidate_ids, logits)

        is_harmless = None
        if judges and k > 0:
            target_states = outputs.hidden_states[-1][:, -k - 1 :] if reads_target else None
            inputs = judge_inputs(candidate_ids, processed, target_states, drafter.states, judge.config.state_position)
            is_harmless = harmless(judge(inputs), threshold)
            if not torch.isfinite(inputs.features).all():
                _warn_once("Hidden states with NaN or infinity: the judge rejects the candidates they belong to.")
        if generation_config.do_sample:
            verification = verify_sampled(candidate_ids, processed, assistant_logits, is_harmless, lengths)
        else:
            verification = verify_greedy(candidate_ids, processed, is_harmless, lengths)

        blocks, finished = [], []
        for j, block in enumerate(verification.committed(candidate_ids)):
            num_kept, done = stop(rows, j, block)
            blocks.append(block[:num_kept])
            finished.append(done)
            row = rows.active[j]
            kept_logits.add(row, processed[j, :num_kept], logits[j, :num_kept])
            if not prefill:
                matched, judged = (mask[j, :num_kept].sum() for mask in (verification.matched, verification.judged))
                counts[row] += torch.tensor([1, lengths[j], matched, judged])
        if streamer is not None:
            streamer.put(torch.tensor(blocks))
        # The newest token's keys and values aren't in the cache yet; those of rejected candidates are.
        rewind(cache, [k + 1 - len(block) for block in blocks])
        drafter.rewind([len(block) for block in blocks])
        columns = rows.input_ids.shape[1] + max(map(len, blocks))
        rows.commit(blocks, finished)
        if rows.active and len(input_ids) > 1:
            unfinished = [j for j, done in enumerate(finished) if not done]
            unneeded = columns - rows.input_ids.shape[1]
            shrink(cache, unfinished, cache.get_seq_length() - unneeded)
            shrink(drafter.cache, unfinished, drafter.cache.get_seq_length() - unneeded)
        prefill = False

    if streamer is not None:
        streamer.end()
    pad_token_id = getattr(generation_config, "_pad_token_tensor", None)
    sequences = rows.sequences(0 if pad_token_id is None else int(pad_token_id))
    if not generation_config.return_dict_in_generate:
        return sequences
    forwards, candidates, matches, judged = counts.T
    return JudgeDecoderOnlyOutput(
        sequences=sequences,
        scores=kept_logits.scores,
        logits=kept_logits.logits,
        past_key_values=cache if len(input_ids) == 1 else None,
        num_target_forwards=forwards,
        num_candidates=candidates,
        num_matches=matches,
        num_judge_accepted=judged,
    )


def _draft_lengths(candidate_ids: torch.LongTensor, room: list[int], eos_token_ids: set[int]) -> torch.LongTensor:
    """How many of each row's candidates count: up to its room and its first EOS token, which a draft ends at."""
    lengths = []
    for candidates, limit in zip(candidate_ids.tolist(), room):
        ends = (i for i, token in enumerate(candidates, start=1) if token in eos_token_ids)
        lengths.append(min(next(ends, len(candidates)), limit))
    return torch.tensor(lengths, dtype=torch.long, device=candidate_ids.device)


class _KeptLogits:
    """`output_scores` and `output_logits`: a tensor of shape `(b, v)` per token, zeros behind a row's end."""

    def __init__(self, generation_config: GenerationConfig, batch_size: int):
        dict_output = generation_config.return_dict_in_generate
        self._scores = [[] for _ in range(batch_size)] if dict_output and generation_config.output_scores else None
        self._logits = [[] for _ in range(batch_size)] if dict_output and generation_config.output_logits else None

    def add(self, row: int, scores: torch.Tensor, logits: torch.Tensor) -> None:
        for kept, new in ((self._scores, scores), (self._logits, logits)):
            if kept is not None:
                kept[row].append(new)

    @property
    def scores(self) -> tuple[torch.Tensor, ...] | None:
        return self._by_token(self._scores)

    @property
    def logits(self) -> tuple[torch.Tensor, ...] | None:
        return self._by_token(self._logits)

    @staticmethod
    def _by_token(kept: list[list[torch.Tensor]] | None) -> tuple[torch.Tensor, ...] | None:
        if kept is None:
            return None
        rows = [torch.cat(blocks) for blocks in kept]
        return torch.nn.utils.rnn.pad_sequence(rows).unbind(0)


def _checked_draft_length(num_assistant_tokens: int | None, assistant_model: PreTrainedModel | None) -> int:
    if assistant_model is None:
        raise ValueError(
            "Judge decoding needs a drafter: expected `assistant_model=<a smaller model with the same tokenizer>`, "
            "got None."
        )
    if num_assistant_tokens is None:
        num_assistant_tokens = assistant_model.generation_config.num_assistant_tokens
        return 20 if num_assistant_tokens is None else int(num_assistant_tokens)
    if not isinstance(num_assistant_tokens, int) or isinstance(num_assistant_tokens, bool) or num_assistant_tokens < 1:
        raise ValueError(f"`num_assistant_tokens` must be an int of at least 1, got {num_assistant_tokens!r}.")
    return num_assistant_tokens


def checked_judge(
    judge: Judge | None,
    judge_threshold: float | None,
    model: PreTrainedModel,
    assistant_model: PreTrainedModel,
    generation_config: GenerationConfig,
) -> float:
    """The threshold to decode with, after checking that the judge fits the pair.

    Raises:
        ValueError: for something else than a judge, a judge of other hidden sizes, a threshold outside [0, 1].
    """
    if judge is None:
        if judge_threshold is not None:
            raise ValueError(f"`judge_threshold={judge_threshold}` needs a `judge`, got None.")
        return 0.0
    if not isinstance(judge, Judge):
        raise ValueError(
            f"`judge` must be a judge, got {type(judge).__name__}. Load one with `AutoJudge.from_pretrained(...)`."
        )
    for name, size, actual in (
        ("target", judge.config.hidden_size, hidden_size(model)),
        ("assistant", judge.config.assistant_hidden_size, hidden_size(assistant_model)),
    ):
        if size is not None and size != actual:
            raise ValueError(
                f"The judge doesn't fit this {name}: it was trained on hidden states of size {size}, and the {name}'s "
                f"have {actual}. It was made for {judge.config.base_model_name_or_path} with "
                f"{judge.config.assistant_model_name_or_path}: use that pair, or train a judge for this one."
            )
    threshold = judge.config.threshold
    if judge_threshold is not None:
        threshold = checked_threshold(judge_threshold, "judge_threshold")
    mined, actual = judge.config.decoding_settings, decoding_settings(generation_config)
    differences = [f"{name}={actual[name]} (mined: {mined[name]})" for name in actual if mined[name] != actual[name]]
    if threshold > 0.0 and judge.reads_states and differences:
        _warn_once(
            "The judge was mined under other decoding settings, so its threshold may not mean the same here: "
            + ", ".join(differences)
            + ". Pass the mined values to `generate`, or mine under these."
        )
    return threshold


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _check_supported(
    model: PreTrainedModel,
    assistant_model: PreTrainedModel,
    input_ids: torch.Tensor,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> None:
    cache = model_kwargs.get("past_key_values")
    mask = model_kwargs.get("attention_mask")
    is_padded_right = mask is not None and not mask[:, -1].all()
    known = {"past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
    other = sorted(k for k, v in model_kwargs.items() if v is not None and k not in known)
    reasons = {
        "encoder-decoder models": model.config.is_encoder_decoder or assistant_model.config.is_encoder_decoder,
        "stateful models, which can't take tokens back": model._is_stateful or assistant_model._is_stateful,
        "prompts padded on the right (set `padding_side='left'`)": is_padded_right,
        "continuing from a cache with several prompts": len(input_ids) > 1 and cache and cache.get_seq_length() > 0,
        "streamers with several prompts": len(input_ids) > 1 and streamer is not None,
        "beam search": (generation_config.num_beams or 1) > 1,
        "`num_return_sequences` above 1": (generation_config.num_return_sequences or 1) > 1,
        "`guidance_scale`": generation_config.guidance_scale not in (None, 1),
        "watermarks": generation_config.watermarking_config is not None,
        "`use_cache=False`": cache is None,
        f"the cache {type(cache).__name__}": cache is not None and type(cache) is not DynamicCache,
        "`output_hidden_states` and `output_attentions`": bool(
            generation_config.output_hidden_states or generation_config.output_attentions
        ),
        f"the model inputs {other}": bool(other),
    }
    refused = [reason for reason, applies in reasons.items() if applies]
    if refused:
        raise ValueError("Judge decoding doesn't support " + "; nor ".join(refused) + ".")


def _with_judge(generate):
    """Wraps `GenerationMixin.generate`: takes `judge`, and without one runs the original untouched."""
    signature = inspect.signature(generate)

    @functools.wraps(generate)
    def wrapper(self, *args, judge=None, **kwargs):
        if judge is None:
            return generate(self, *args, **kwargs)
        options = {name: kwargs.pop(name, None) for name in ("judge_threshold", "num_assistant_tokens")}
        if kwargs.pop("custom_generate", None) is not None:
            raise ValueError("Pass either `judge` or `custom_generate`: each brings its own decoding loop.")
        arguments = signature.bind(self, *args, **kwargs).arguments
        extra = arguments.pop("kwargs", {})
        # Checked before `generate` prepares anything.
        assistant_model = arguments.get("assistant_model")
        _checked_draft_length(options["num_assistant_tokens"], assistant_model)
        _stop_strings_to_criterion(arguments, extra)
        decode = functools.partial(
            judge_decoding,
            judge=judge,
            assistant_model=assistant_model,
            streamer=arguments.get("streamer"),
            **options,
        )
        return generate(**arguments, custom_generate=decode, **extra)

    wrapper._wraps_judge = True
    return wrapper


def _stop_strings_to_criterion(arguments: dict[str, Any], extra: dict[str, Any]) -> None:
    """Makes stop strings a stopping criterion: `generate` loses the tokenizer on the way to a custom loop."""
    config = arguments.get("generation_config")
    stop_strings = extra.pop("stop_strings", None) or getattr(config, "stop_strings", None)
    if not stop_strings:
        return
    tokenizer = extra.pop("tokenizer", None)
    if tokenizer is None:
        raise ValueError(f"`stop_strings={stop_strings!r}` needs the `tokenizer`: pass it to `generate` too.")
    if config is not None:
        arguments["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    criteria = arguments.get("stopping_criteria") or []
    arguments["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, stop_strings)])


def install_judge_argument() -> None:
    """Teaches `GenerationMixin.generate` the `judge` argument. Does nothing the second time."""
    if not getattr(GenerationMixin.generate, "_wraps_judge", False):
        GenerationMixin.generate = _with_judge(GenerationMixin.generate)
