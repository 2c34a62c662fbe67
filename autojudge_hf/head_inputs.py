# SPDX-License-Identifier: Apache-2.0
"""The last hidden states, taken from where a model's head reads them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from .model_properties import input_device, is_compiled, unwrapped


if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


class HeadInputs(contextlib.AbstractContextManager):
    """What a model's output embeddings read: the last states, without the cost of capturing every layer's.

    One serves all forwards of a call, since to find the module and hook it for each takes longer than to read it.

    Attributes:
        are_captured (`bool`): whether every layer's have to be captured after all, since a forward that the caller
            compiled may run a graph from before there was a hook.
        newest (`torch.FloatTensor` of shape `(b, n, h)`): what the newest of this thread's forwards read.

    Raises:
        ValueError: for a compiled model whose head reads something else than the last of all layers' states.
    """

    def __init__(self, model: PreTrainedModel):
        self.model, self._hook = model, None
        self.are_captured = is_compiled(model)
        if self.are_captured and not head_reads_last_states(model):
            raise ValueError(
                f"The states that a judge reads can't be had from a compiled {type(unwrapped(model)).__name__}. Pass "
                "it as it was before `torch.compile`."
            )

    def listen(self) -> None:
        """Hooks the module, unless that was done; forwards that are compiled never ask for it."""
        if self._hook is None:
            self._hook = _tell_what_the_head_reads(self.model, self._keep)

    def _keep(self, states: torch.Tensor) -> None:
        self.newest = states

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()


def _tell_what_the_head_reads(model: PreTrainedModel, tell: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """A hook for the forwards of this thread; to be removed."""
    thread = threading.get_ident()

    def see(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if threading.get_ident() == thread:
            tell(inputs[0])

    return model.get_output_embeddings().register_forward_pre_hook(see)


#: Of models that were asked already.
_reads_last_states: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
# How compiled forwards run is said for the whole process, and of two threads that say so the last would leave it so.
_asking = threading.Lock()


@torch.no_grad()
def head_reads_last_states(model: PreTrainedModel) -> bool:
    """Whether a model's head reads the last of its hidden states as they are; some scale or mix them first."""
    with _asking:
        if model not in _reads_last_states:
            _reads_last_states[model] = _ask_whether_head_reads_last_states(model)
        return _reads_last_states[model]


def _ask_whether_head_reads_last_states(model: PreTrainedModel) -> bool:
    token, seen = torch.zeros(1, 1, dtype=torch.long, device=input_device(model)), []
    hook = _tell_what_the_head_reads(model, seen.append)
    # Where graphs have no hooks. (To ask for that takes seconds in a process that compiles nothing.)
    uncompiled = torch.compiler.set_stance("force_eager") if is_compiled(model) else contextlib.nullcontext()
    try:
        with uncompiled:
            states = model(input_ids=token, output_hidden_states=True, return_dict=True).hidden_states
    finally:
        hook.remove()
    return states is not None and torch.equal(states[-1], seen[-1])
