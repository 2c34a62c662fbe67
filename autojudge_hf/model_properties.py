# SPDX-License-Identifier: Apache-2.0
"""What decoding has to know of a model: what its forward takes, where it is, how much it holds."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING

import torch
import transformers
from transformers.cache_utils import DynamicCache, LinearAttentionLayer
from transformers.generation import GenerateDecoderOnlyOutput


if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What `generate` calls a cache: `past_key_values` until transformers 5.23.
CACHE_NAME = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
# Until then a list of layers was taken for all (5.15), or counted otherwise, and left the last one out.
CHOOSES_HIDDEN_STATES = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
#: Hybrids, in whose layers with a state several tokens go on from where the last ones left it. Not every family's do.
WITH_STATES = (
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "lfm2",
    "lfm2_moe",
    "olmo_hybrid",
    "granitemoehybrid",
    "bamba",
    "nemotron_h",
    "falcon_h1",
    "kimi_linear",
    "bailing_hybrid",
    "lfm3",
    "lara_mini",
    "zaya",
    "zamba2",
)
# These reckon positions from the mask, or from distances alone.
ALIBI = ("bloom", "mpt")


@functools.lru_cache
def _parameters(model_class: type) -> frozenset[str]:
    return frozenset(inspect.signature(model_class.forward).parameters)


def forward_parameters(model: PreTrainedModel) -> frozenset[str]:
    """What a model's forward takes by name; `torch.compile` and PEFT wrap it in one that doesn't say."""
    accepted = _parameters(type(model))
    if "position_ids" in accepted:  # nearly always, and looked up twice a forward
        return accepted
    return _parameters(type(unwrapped(model)))


def goes_on_from_states(model: PreTrainedModel) -> bool:
    """Whether a forward of several tokens would go on from the states that the last one left, if there are some."""
    return model.config.get_text_config(decoder=True).model_type in WITH_STATES


def keeps_states(model: PreTrainedModel) -> bool:
    """Whether some of its layers have a state in place of keys and values, and it goes on from these."""
    if not goes_on_from_states(model):
        return False
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return any(isinstance(layer, LinearAttentionLayer) for layer in cache.layers)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether tokens have the positions that a forward is told, or none at all: a model may count for itself."""
    return "position_ids" in forward_parameters(model) or model.config.model_type in ALIBI


def reads_targets_cache(model: PreTrainedModel) -> bool:
    """Whether an assistant has no keys and values of its own, and reads the target's (Gemma 4's assistants)."""
    return "shared_kv_states" in forward_parameters(model)


def reads_targets_layers(model: PreTrainedModel) -> bool:
    """Whether an assistant has no embeddings of its own, and reads the states of the target's layers (DFlash)."""
    return "noise_embeds" in forward_parameters(model)


def num_mtp_layers(model: PreTrainedModel) -> int:
    """How many heads for tokens further on a model's checkpoint has, which it leaves there."""
    return getattr(model.config.get_text_config(decoder=True), "num_mtp_layers", None) or 0


def drafts_from_target(model: PreTrainedModel) -> bool:
    """Whether an assistant drafts from what the target has just computed, in one of these two ways."""
    return reads_targets_cache(model) or reads_targets_layers(model)


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """What `torch.compile` and PEFT wrap."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether somebody compiled the model's forward, in one of the three ways that torch has for it."""
    return any(
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or (
            hasattr(module.forward, "_torchdynamo_orig_callable")
            and not getattr(module.forward, "_torchdynamo_disable", False)
        )
        for module in (model, unwrapped(model))
    )


def input_device(model: PreTrainedModel) -> torch.device:
    """Where to put a model's tokens. Offloaded ones have no device of their own, and take them from anywhere."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence the model has positions for, or `None` where its config doesn't say."""
    config = model.config.get_text_config(decoder=True)
    # MPT's has another name.
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def vocab_size(model: PreTrainedModel) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def of_vocabulary(logits: torch.Tensor, size: int) -> torch.Tensor:
    """Logits for `size` tokens. Pairs may pad one vocabulary to different sizes; a token that lacks has no chance."""
    missing = size - logits.shape[-1]
    if missing == 0:
        return logits
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing > 0 else logits[..., :size]


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the last hidden state: what the output embeddings read, which may be narrower than the layers (OPT)."""
    width = model.config.get_text_config(decoder=True).hidden_size
    return getattr(model.get_output_embeddings(), "in_features", width)


def behind_head(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    """What a model makes of what its output embeddings give: some scale that, or cap it softly."""
    config = model.config.get_text_config(decoder=True)
    for name in ("output_multiplier", "logit_scale"):  # Muse Glimmer, Cohere
        logits = logits * (getattr(config, name, None) or 1.0)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return logits if cap is None else cap * torch.tanh(logits / cap)


def eos_token_ids(model: PreTrainedModel) -> set[int]:
    """The tokens that end a response, as the model's generation config lists them."""
    ids = model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
