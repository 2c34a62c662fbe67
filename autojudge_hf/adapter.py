# SPDX-License-Identifier: Apache-2.0
"""`model.generate(..., judge=)`: brings the argument to `judge_decoding`."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any

from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria

from .generation import judge_decoding
from .supported import DRAFTERS, check_is_model, check_models


if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


def install_judge_argument() -> None:
    """Teaches `GenerationMixin.generate` the `judge` argument; once, however often the library is imported."""
    generate = GenerationMixin.generate
    wrapper = getattr(generate, "_wraps_judge", None)
    if wrapper is None:
        GenerationMixin.generate = _with_judge(generate)
    elif wrapper is generate and generate.__globals__ is not globals():
        # Of a library that was imported before, whose classes are others.
        GenerationMixin.generate = _with_judge(generate.__wrapped__)


def _with_judge(generate):
    """Wraps `GenerationMixin.generate`: takes `judge`, and without one runs the original untouched."""
    signature = inspect.signature(generate)
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [name for name, parameter in signature.parameters.items() if parameter.kind in kinds]

    @functools.wraps(generate)
    def wrapper(self, *args, judge=None, **kwargs):
        if judge is None:
            return generate(self, *args, **kwargs)
        options = {name: kwargs.pop(name, None) for name in ("judge_threshold", "num_assistant_tokens")}
        if kwargs.pop("custom_generate", None) is not None:
            raise ValueError("Pass either `judge` or `custom_generate`: each brings its own decoding loop.")
        signature.bind(self, *args, **kwargs)  # raises for an argument that is given twice
        # (A wrapper of somebody else's may have no names for what it passes on.)
        kwargs |= dict(zip(names[1:], args))
        args = args[len(names[1:]) :]
        if kwargs.get("synced_gpus"):
            raise ValueError("Judge decoding doesn't support `synced_gpus`: ranks differ in their number of forwards.")
        if kwargs.get("cache_implementation") == "paged":
            # `generate` would go another way before it sees whose loop to run.
            raise ValueError("Judge decoding doesn't support `cache_implementation='paged'` (continuous batching).")
        # What `generate` would begin to run, or fail on, before the loop can refuse it.
        check_models(self)
        if kwargs.get("assistant_model") is not None:
            check_is_model(kwargs["assistant_model"])
        _stop_strings_to_criterion(self, kwargs)
        decode = functools.partial(
            judge_decoding,
            judge=judge,
            assistant_model=kwargs.get("assistant_model"),
            tokenizer=kwargs.get("tokenizer"),
            assistant_tokenizer=kwargs.pop("assistant_tokenizer", None),
            streamer=kwargs.get("streamer"),
            **options,
        )
        return generate(self, *args, **with_loop(self, decode, kwargs))

    wrapper._wraps_judge = wrapper
    return wrapper


def with_loop(model: PreTrainedModel, loop: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords that have `generate` run a loop of ours, which brings its own `assistant_model`.

    To models that it calls stateful, `generate` refuses every drafter before it looks whose loop it is to run: the
    loop gets them past it.
    """
    if not model._is_stateful:
        return {**kwargs, "custom_generate": loop}
    own = model.generation_config
    config = kwargs.get("generation_config") or own
    drafters = {}
    for name in DRAFTERS:  # as `generate` merges them
        value = kwargs[name] if name in kwargs else getattr(config, name)
        if value is None and name not in kwargs:
            value = getattr(own, name)
        if value:
            drafters[name] = value

    def decode(*args, generation_config, **model_kwargs):
        generation_config.update(**drafters)
        return loop(*args, generation_config=generation_config, **model_kwargs)

    return {**kwargs, "assistant_model": None, **dict.fromkeys(drafters), "custom_generate": decode}


def _stop_strings_to_criterion(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Makes stop strings a stopping criterion: `generate` loses the tokenizer on the way to a custom loop."""
    own = model.generation_config
    config = kwargs.get("generation_config") or own
    # As `generate` merges them: what the call says, be it None, then its config, then the model's.
    stop_strings = kwargs.get("stop_strings", config.stop_strings or own.stop_strings)
    if not stop_strings:
        return
    tokenizer = kwargs.get("tokenizer")
    if tokenizer is None:
        raise ValueError(f"`stop_strings={stop_strings!r}` needs the `tokenizer`: pass it to `generate` too.")
    if config.stop_strings is not None:
        kwargs["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    kwargs["stop_strings"] = None  # or the model's own config would bring them back
    criteria = kwargs.get("stopping_criteria") or []
    kwargs["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, stop_strings)])
