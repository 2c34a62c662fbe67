# SPDX-License-Identifier: Apache-2.0
"""A model's own first layers, as its assistant."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from transformers import PreTrainedModel


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A model of the first `num_layers` layers of `model` and its head, of the same tensors; `model` stays as it is.

    Raises:
        ValueError: for other than 1 to all but one of the layers, or a model whose layers aren't one list.
    """
    total = model.config.get_text_config(decoder=True).num_hidden_layers
    # Modules of its own, since hooks that decoding sets on shared ones would fire for both. Tensors stay the same
    # ones, and so do the caller's hooks, which see every forward, as in stock `generate`, and those of accelerate,
    # which hold the weights of an offloaded model.
    shared = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        shared += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        shared += [module._hf_hook] if hasattr(module, "_hf_hook") else []
    early = copy.deepcopy(model, {id(x): x for x in shared})
    children = early.base_model._modules
    lists = [name for name, x in children.items() if isinstance(x, torch.nn.ModuleList) and len(x) == total]
    # Gemma 3n's embeddings have a part for each layer.
    has_parts = bool(getattr(early.config.get_text_config(decoder=True), "hidden_size_per_layer_input", None))
    if has_parts or len(lists) != 1 or not isinstance(num_layers, int) or not 1 <= num_layers < total:
        raise ValueError(
            f"`assistant_early_exit` must be a number of layers from 1 to {total - 1} of a model with one list of "
            f"layers, and no embeddings of their own, got {num_layers!r} for a {type(model).__name__}."
        )
    children[lists[0]] = children[lists[0]][:num_layers]
    early.config.get_text_config(decoder=True).num_hidden_layers = num_layers
    return early
