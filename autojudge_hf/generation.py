# SPDX-License-Identifier: Apache-2.0
"""The decoding loop, its output, and `model.generate(..., judge=)`."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

from .candidate_generator import JudgeCandidateGenerator
from .configuration import checked_threshold, decoding_settings
from .features import judge_inputs
from .forward import cached_forward, hidden_size
from .modeling import Judge
from .verification import Verification, harmless, verify_greedy, verify_sampled


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
    candidates, runs the target once over them, and commits a prefix and the target's next token.

    Args:
        model (`PreTrainedModel`): the target.
        input_ids (`torch.LongTensor` of shape `(1, prompt_length)`): the prompt.
        logits_processor, stopping_criteria, generation_config: as `generate` prepares them.
        judge (`Judge`, *optional*): `None` accepts no mismatch.
        assistant_model (`PreTrainedModel`): the drafter.
        judge_threshold (`float`, *optional*): accept a mismatch below this score; default `judge.config.threshold`.
        num_assistant_tokens (`int`, *optional*): candidates per cycle; default: the assistant's generation config.
        streamer (`BaseStreamer`, *optional*): gets each cycle's tokens.
        model_kwargs: what `generate` prepared for the forward: cache, attention mask.

    Returns:
        [`JudgeDecoderOnlyOutput`] if `generation_config.return_dict_in_generate`, else the sequences, a
        `torch.LongTensor` of shape `(1, length)`.

    Raises:
        ValueError: before any forward, for whatever isn't supported or doesn't fit.
    """
    num_assistant_tokens = _checked_draft_length(num_assistant_tokens, assistant_model)
    threshold = checked_judge(judge, judge_threshold, model, assistant_model, generation_config)
    _check_supported(model, assistant_model, input_ids, generation_config, model_kwargs)

    cache, attention_mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
    cache.activate_past_recording()
    judges = judge is not None and threshold > 0.0
    reads_target = judges and judge.reads_states and judge.config.hidden_size is not None
    reads_assistant = judges and judge.reads_states and judge.config.assistant_hidden_size is not None
    stop = _StopRule(stopping_criteria)
    drafter = JudgeCandidateGenerator(
        assistant_model,
        model,
        logits_processor,
        num_assistant_tokens,
        max_length=stop.max_length,
        eos_token_ids=stop.eos_token_ids,
        do_sample=generation_config.do_sample,
        attention_mask=attention_mask,
        output_states=reads_assistant,
    )
    keep_scores = generation_config.return_dict_in_generate and generation_config.output_scores
    keep_logits = generation_config.return_dict_in_generate and generation_config.output_logits
    scores, raw_logits = () if keep_scores else None, () if keep_logits else None
    counts = torch.zeros(4, dtype=torch.long)

    prefill = True
    while True:
        # The first cycle is the prefill: no candidates, the target's first token.
        length = input_ids.shape[1]
        sequence, assistant_logits = (input_ids, None) if prefill else drafter.get_candidates(input_ids)
        candidate_ids = sequence[:, length:]
        k = candidate_ids.shape[1]

        if attention_mask is not None:
            missing = sequence.shape[1] - attention_mask.shape[1]
            attention_mask = torch.nn.functional.pad(attention_mask, (0, missing), value=1)
        outputs = cached_forward(
            model,
            sequence[:, cache.get_seq_length() :],
            cache,
            attention_mask,
            num_logits=k + 1,
            output_hidden_states=reads_target and k > 0,
        )
        new_logits = outputs.logits[:, -k - 1 :].to(input_ids.device, torch.float32)
        processed = _process(logits_processor, sequence, new_logits, length)

        is_harmless = None
        if judges and k > 0:
            target_states = outputs.hidden_states[-1][:, -k - 1 :] if reads_target else None
            inputs = judge_inputs(candidate_ids, processed, target_states, drafter.states, judge.config.state_position)
            is_harmless = harmless(judge(inputs), threshold)
        verification = _verify(generation_config.do_sample, candidate_ids, processed, assistant_logits, is_harmless)

        num_accepted = int((verification.matched | verification.judged).sum())
        new_tokens = torch.cat([candidate_ids[:, :num_accepted], verification.next_token[:, None]], dim=1)
        num_kept, finished = stop(input_ids, new_tokens, scores)
        input_ids = torch.cat([input_ids, new_tokens[:, :num_kept]], dim=1)
        # The newest token's keys and values aren't in the cache yet; those of rejected candidates are.
        cache.crop(-(k + 1 - num_kept))
        if attention_mask is not None:
            attention_mask = attention_mask[:, : input_ids.shape[1]]

        if keep_scores:
            scores += tuple(processed[:, i] for i in range(num_kept))
        if keep_logits:
            raw_logits += tuple(new_logits[:, i] for i in range(num_kept))
        if streamer is not None:
            streamer.put(new_tokens[:, :num_kept].cpu())
        if not prefill:
            matched, judged = (mask[:, :num_kept].sum() for mask in verification[:2])
            counts += torch.tensor([1, k, matched, judged])
        if finished:
            break
        prefill = False

    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    forwards, candidates, matches, judged = counts[:, None]
    return JudgeDecoderOnlyOutput(
        sequences=input_ids,
        scores=scores,
        logits=raw_logits,
        past_key_values=cache,
        num_target_forwards=forwards,
        num_candidates=candidates,
        num_matches=matches,
        num_judge_accepted=judged,
    )


def _process(
    logits_processor: LogitsProcessorList, sequence: torch.Tensor, logits: torch.Tensor, length: int
) -> torch.Tensor:
    """The target's logits as `generate` would see them: position i behind the tokens before candidate i."""
    if not logits_processor:
        return logits
    processed = [logits_processor(sequence[:, : length + i], logits[:, i].clone()) for i in range(logits.shape[1])]
    return torch.stack(processed, dim=1)


def _verify(
    do_sample: bool,
    candidate_ids: torch.Tensor,
    target_logits: torch.Tensor,
    assistant_logits: torch.Tensor | None,
    is_harmless: torch.Tensor | None,
) -> Verification:
    if not do_sample:
        return verify_greedy(candidate_ids, target_logits, is_harmless)
    if assistant_logits is None:
        assistant_logits = target_logits[:, :0]
    return verify_sampled(candidate_ids, target_logits, assistant_logits, is_harmless)


class _StopRule:
    """Where a committed block ends the response: at its first prefix that a stopping criterion accepts.

    Length and EOS are known for a whole block at once; any other criterion has to see every prefix.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        self.max_length = min(c.max_length for c in criteria if isinstance(c, MaxLengthCriteria))
        eos_criteria = [c for c in criteria if isinstance(c, EosTokenCriteria)]
        self.eos_token_ids = {token for c in eos_criteria for token in c.eos_token_id.flatten().tolist()}
        self.others = StoppingCriteriaList(
            c for c in criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))
        )

    def __call__(self, input_ids: torch.Tensor, new_tokens: torch.Tensor, scores: tuple | None) -> tuple[int, bool]:
        """How many of `new_tokens` stay, and whether the response is finished."""
        length = input_ids.shape[1]
        for i, token in enumerate(new_tokens[0].tolist(), start=1):
            if token in self.eos_token_ids or length + i >= self.max_length:
                return i, True
            if self.others and self.others(torch.cat([input_ids, new_tokens[:, :i]], dim=1), scores).all():
                return i, True
        return new_tokens.shape[1], False


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
    model_kwargs: dict[str, Any],
) -> None:
    cache = model_kwargs.get("past_key_values")
    known = {"past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
    other = sorted(k for k, v in model_kwargs.items() if v is not None and k not in known)
    reasons = {
        "encoder-decoder models": model.config.is_encoder_decoder or assistant_model.config.is_encoder_decoder,
        "stateful models, which can't take tokens back": model._is_stateful or assistant_model._is_stateful,
        f"batches (got {input_ids.shape[0]} rows; decode one prompt at a time)": input_ids.shape[0] > 1,
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
