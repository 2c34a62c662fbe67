# SPDX-License-Identifier: Apache-2.0
"""What the forwards of a cycle take at real sizes, beside the time to read the weights, by how they are compiled.

    python examples/time_forwards.py --pair llama --num_layers 8
    python examples/time_forwards.py --pair tiny --device cpu --compiled no default --prompt_length 16

A token of the draft, a verification, one that also returns hidden states, and a judge's answer; `times reading` is to
the bandwidth of a copy in the same run. The models are those of `benchmark_gpu.py`. The four are timed in turn, many
calls in a row each, so that the host can run ahead as it does in a cycle. Which way is fastest depends on the card:
what wins here can be passed to `generate` as `compile_config`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from arguments import positive_int
from benchmark_gpu import (
    MAX_LENGTH,
    bandwidth,
    forget_graphs,
    graphs_made,
    mean_judge,
    parse_arguments,
    planted_pair,
    print_row,
    timed,
    weight_bytes,
)
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, PreTrainedModel
from transformers.generation import CompileConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from autojudge_hf.caches import rewind
from autojudge_hf.fixed_cache import take_fixed_cache
from autojudge_hf.forward import cached_forward, fixed_draft
from autojudge_hf.head_inputs import HeadInputs, head_reads_last_states
from autojudge_hf.judging import Judging


def captured(**options: bool) -> GenerationConfig:
    """Captured as CUDA graphs, and with more of the compiler's options."""
    options = {"triton.cudagraphs": True, **options}
    return GenerationConfig(compile_config=CompileConfig(dynamic=False, mode=None, options=options))


TUNED = {"coordinate_descent_tuning": True}
#: Small kernels that don't wait for each other are one.
JOINED = {"combo_kernels": True}
#: A kernel is launched before the one that it waits for has ended; since Hopper.
OVERLAPPING = {"triton.enable_pdl": True}
WAYS = {
    "no": GenerationConfig(disable_compile=True),
    "default": GenerationConfig(),
    "untuned": captured(),
    "tuned": captured(**TUNED),
    "joined": captured(**TUNED, **JOINED),
    "overlapping": captured(**TUNED, **OVERLAPPING),
    "joined_overlapping": captured(**TUNED, **JOINED, **OVERLAPPING),
    "max_autotune": captured(**TUNED, max_autotune=True),
    # Weights become constants: those that read the same input are joined, at the price of a second copy.
    "freezing": captured(**TUNED, freezing=True),
}


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa` without a copy of keys and values for each head that shares them: its queries are more rows."""
    shared_by = query.shape[1] // key.shape[1]
    if attention_mask is None or attention_mask.shape[1] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows = query.unflatten(1, (-1, shared_by)).flatten(2, 3)
    mask = attention_mask.repeat(1, 1, shared_by, 1)
    output = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return output.unflatten(2, (shared_by, -1)).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)


def forwards(
    model: PreTrainedModel, draft: PreTrainedModel, generation_config: GenerationConfig, args
) -> dict[str, Callable[[], Any]]:
    """Each of them leaves the caches as they were."""
    k = args.draft_length
    prompt = 1 + torch.arange(args.prompt_length, device=args.device)[None]
    block = 1 + args.prompt_length + torch.arange(k + 1, device=args.device)[None]
    caches = []
    for of, widths in ((model, [k + 1]), (draft, [1, 2])):
        cache = take_fixed_cache(1, generation_config, of, args.prompt_length + 2 * k, widths)
        cached_forward(of, prompt, cache)
        caches.append(cache)
    cache, draft_cache = caches

    def drafting() -> torch.Tensor:
        candidate_ids = fixed_draft(draft, block[:, :1], draft_cache, None, k, args.vocab_size)
        rewind(draft_cache, [k])
        return candidate_ids

    def verification(head: HeadInputs | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        outputs = cached_forward(model, block, cache, num_logits=k + 1, head=head)
        rewind(cache, [k + 1])
        return outputs.logits.float(), outputs.states

    with_states = functools.partial(verification, HeadInputs(model))
    judging = Judging(mean_judge(model), 0.5, torch.device(args.device))
    judge = functools.partial(judging, block[:, 1:], *with_states(), None, None)
    return {"draft": drafting, "verification": verification, "with states": with_states, "judge": judge}


def repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def milliseconds(calls: dict[str, Callable[[], Any]], args) -> dict[str, float]:
    """Medians of rounds in which each has its turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name, call in calls.items():
            repeat(call, args.repeats)  # what ran before has left its mark on caches and clocks
            seconds, _ = timed(args.device, functools.partial(repeat, call, args.repeats))
            taken[name].append(1e3 * seconds / args.repeats)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--compiled", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--attn_implementation", choices=["sdpa", "grouped", "eager"], default="sdpa")
    parser.add_argument("--draft_length", type=positive_int, default=16)
    parser.add_argument("--prompt_length", type=positive_int, default=128)
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--repeats", type=positive_int, default=20, help="calls in a row")
    args = parse_arguments(parser, pairs=("llama", "qwen", "tiny"))
    if (longest := args.prompt_length + 2 * args.draft_length) >= MAX_LENGTH:
        parser.error(
            f"--prompt_length and twice --draft_length must be less than {MAX_LENGTH} together, got {longest}."
        )

    model, draft, _ = planted_pair(args)
    for x in (model, draft):
        x.set_attn_implementation(args.attn_implementation)
    head_reads_last_states(model)  # decoding asks, too, before anything is compiled
    args.vocab_size = min(model.config.vocab_size, draft.config.vocab_size)
    rate = bandwidth(args.device, weight_bytes(model))
    reading, reading_draft = 1e3 * weight_bytes(model) / rate, 1e3 * weight_bytes(draft) / rate
    print(f"{args.pair}, {args.dtype}, {args.device}, {args.attn_implementation}; copies: {rate / 1e9:.0f} GB/s")
    print(f"verifications of {args.draft_length + 1} tokens; weights: {reading:.2f} and {reading_draft:.2f} ms\n")
    header = "compiled|draft token, ms|times reading|verification, ms|times reading|with states, ms|judge, ms"
    header += "|first calls, s|new graphs"
    print_row(header.split("|"))
    print_row(["---"] * (header.count("|") + 1))
    for name in args.compiled:
        forget_graphs()
        first, calls = timed(args.device, functools.partial(forwards, model, draft, WAYS[name], args))
        # The second call may still record graphs.
        first += sum(timed(args.device, call)[0] for _ in range(2) for call in calls.values())
        graphs = graphs_made(args.device)
        taken = milliseconds(calls, args)
        token = taken["draft"] / args.draft_length
        cells = [name, f"{token:.2f}", f"{token / reading_draft:.2f}", f"{taken['verification']:.2f}"]
        cells += [f"{taken['verification'] / reading:.2f}", f"{taken['with states']:.2f}", f"{taken['judge']:.2f}"]
        cells += [f"{first:.1f}", graphs_made(args.device) - graphs]
        print_row(cells)


if __name__ == "__main__":
    main()
