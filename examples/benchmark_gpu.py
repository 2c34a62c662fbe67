# SPDX-License-Identifier: Apache-2.0
"""Speed and memory at real sizes, without downloads: random models whose agreement is set beforehand.

    python examples/benchmark_gpu.py --pair llama
    python examples/benchmark_gpu.py --pair tiny --device cpu --draft_lengths 4 --batch_sizes 1 2 --num_tokens 32

Compute and memory traffic are those of the real pair. But what attention and MLP give is zero, and so the next token
only depends on the last: the target counts up, the draft skips a token at a chosen share of all tokens, and the judge
knows by the mean of a hidden state which of these are harmless. The roofline is the time to read the weights
that a cycle reads, at the bandwidth of a copy in the same run; keys, values and the prefill are left out of it, and so
are in what a row loses. What a row writes is compared with what the target would, where that is promised. Graphs that
were compiled and not captured are counted, and so are those that the timed calls compile or record: none should be.
(Stock makes a new static cache for every call, and so records its graphs anew.) The rows of a draft length are timed
in turn. What was compiled is kept until the batch size changes: a first call compiles what the rows before it didn't.
Half an hour or so with all rows, by estimate: on an H100 a first call took 50 to 110 seconds; `--draft_lengths`,
`--batch_sizes` and `--ways` choose some.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from arguments import check_ways, positive_int, share
from torch._dynamo.utils import counters
from torch._inductor import cudagraph_trees
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from autojudge_hf import AutoJudge, Judge, JudgeConfig, judge_decoding
from autojudge_hf.fixed_cache import kept_caches
from autojudge_hf.measuring import decode_batch


LLAMA = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 500000.0, "num_key_value_heads": 8}
QWEN = {"model_type": "qwen2", "vocab_size": 152064, "rope_theta": 1000000.0}
#: Three layers of four have a state in place of keys and values, as in Qwen3.5.
HYBRID = {
    "model_type": "qwen3_5_text",
    "vocab_size": 8192,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
TINY = {"model_type": "llama", "vocab_size": 8192, "num_key_value_heads": 2, "num_attention_heads": 4}
#: Hidden size, layers, heads, MLP width of Llama 3.1 8B and 3.2 1B, Qwen2.5 7B and 0.5B.
PAIRS = {
    "llama": (
        {**LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
        {**LLAMA, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "intermediate_size": 8192},
    ),
    "qwen": (
        {
            **QWEN,
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
        },
        {
            **QWEN,
            "vocab_size": 151936,
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
        },
    ),
    "hybrid": (
        {**HYBRID, "hidden_size": 1024, "num_hidden_layers": 12, "intermediate_size": 3584},
        {**HYBRID, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512},
    ),
    "tiny": (
        {**TINY, "hidden_size": 256, "num_hidden_layers": 3, "intermediate_size": 512},
        {**TINY, "hidden_size": 128, "num_hidden_layers": 1, "intermediate_size": 256},
    ),
}
#: Positions that the models know.
MAX_LENGTH = 8192


class Way(NamedTuple):
    """A row: `draft_length` 0 is the target alone, `arguments` go to `generate`."""

    name: str
    draft_length: int
    batch_size: int
    arguments: dict[str, Any]


def counting_model(sizes: dict[str, Any], skips: torch.Tensor, marked: torch.Tensor | None, args) -> PreTrainedModel:
    """A random model that writes t + 1 after t, or t + 2 where `skips[t]`.

    A token's last hidden state is its embedding, normed, and the head's row for a token the embedding of the token
    before it. Random vectors of these sizes are nearly orthogonal, so that this row wins. The mean of a state is above
    0 for `marked` tokens and below for the others: that is what the judge reads.
    """
    torch.manual_seed(0)
    sizes = {**sizes, "max_position_embeddings": MAX_LENGTH, "tie_word_embeddings": False, "eos_token_id": None}
    config = AutoConfig.for_model(**sizes, bos_token_id=0, pad_token_id=0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=args.dtype).eval()
    model.generation_config.pad_token_id = 0
    embeddings, head = model.get_input_embeddings().weight.data, model.get_output_embeddings().weight.data
    embeddings.normal_()
    if marked is not None:
        embeddings += torch.where(marked[: len(embeddings), None], 0.5, -0.5)
    embeddings /= embeddings.norm(dim=-1, keepdim=True)
    for layer in model.model.layers:
        mixed = layer.self_attn.o_proj if hasattr(layer, "self_attn") else layer.linear_attn.out_proj
        mixed.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    tokens = torch.arange(len(embeddings), device=args.device)
    followers = (tokens + 1 + skips[: len(embeddings)].long()) % len(embeddings)
    # Where two tokens lead to one, it answers to both.
    head.zero_().index_add_(0, followers, embeddings)
    head[:, 0] = 0.0
    return model


def planted_pair(args) -> tuple[PreTrainedModel, PreTrainedModel, torch.Tensor]:
    """Target, draft, and which tokens are important to jump to: `args.agreement` and `args.harmless` are shares."""
    sizes, draft_sizes = PAIRS[args.pair]
    if args.num_layers is not None:
        sizes, draft_sizes = ({**x, "num_hidden_layers": args.num_layers} for x in (sizes, draft_sizes))
    torch.manual_seed(1)
    skips = (torch.rand(sizes["vocab_size"]) > args.agreement).to(args.device)
    # The judge sees the candidate: the token that a skip leads to.
    important = (torch.rand(sizes["vocab_size"]) > args.harmless).to(args.device)
    model = counting_model(sizes, torch.zeros_like(skips), important, args)
    return model, counting_model(draft_sizes, skips, None, args), important


def mean_judge(model: PreTrainedModel) -> Judge:
    """Tells the tokens that are marked by the mean of their state."""
    hidden_size = model.config.hidden_size
    judge = AutoJudge.from_config(JudgeConfig(hidden_size=hidden_size, threshold=0.5))
    weight = torch.full((hidden_size,), 20.0 / hidden_size)
    judge.load_state_dict({"weight": weight, "bias": torch.zeros(1)})
    return judge


def bandwidth(device: str, size: int) -> float:
    """Bytes read and written a second, by copies of `size` bytes, a GiB at most."""
    size = min(2**30, size)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [timed(device, lambda: target.copy_(source))[0] for _ in range(10)]
    return 2 * size / min(seconds)


def timed(device: str, call: Callable[[], Any]) -> tuple[float, Any]:
    if device != "cpu":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, the models' weights among them; `peak` is the most there were."""

    def __init__(self, *models: PreTrainedModel):
        super().__init__()
        weights = [x.untyped_storage() for model in models for x in model.parameters()]
        self._alive = {storage._cdata: storage.nbytes() for storage in weights}
        self.peak = sum(self._alive.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        storages = [x.untyped_storage() for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        if new := {x._cdata: x for x in storages if x._cdata not in self._alive}:
            for address, storage in new.items():
                self._alive[address] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, address)
            self.peak = max(self.peak, sum(self._alive.values()))
        return outputs


def weight_bytes(model: PreTrainedModel) -> int:
    """What a forward reads; of the embeddings it's only a row."""
    embeddings = model.get_input_embeddings().weight
    return (
        sum(p.numel() * p.element_size() for p in model.parameters()) - embeddings.numel() * embeddings.element_size()
    )


def ways_to_decode(draft: PreTrainedModel | None, judge: AutoJudge | None, args) -> list[Way]:
    ways = []
    static = {"cache_implementation": "static"}
    for b in args.batch_sizes:
        ways += [Way("target alone", 0, b, {}), Way("target alone, static", 0, b, static)]
        for k in args.draft_lengths:
            shared = {"assistant_model": draft, "return_dict_in_generate": True}
            # Hybrids, to which stock generation refuses an assistant.
            is_stateful = draft is not None and draft._is_stateful
            of_loop = {**shared, "assistant_model": None} if is_stateful else shared
            loop = functools.partial(judge_decoding, assistant_model=draft, num_assistant_tokens=k)
            if b == 1 and not is_stateful:
                ways.append(Way("stock assisted", k, b, shared))
            for name, cache in (("", {}), (", static", static)):
                ways.append(Way(f"ours lossless{name}", k, b, {**of_loop, **cache, "custom_generate": loop}))
                judged = {**shared, **cache, "judge": judge, "num_assistant_tokens": k}
                # A threshold that is as good as 0 asks the judge and accepts nothing: what judging costs.
                ways.append(Way(f"ours, judge rejects all{name}", k, b, {**judged, "judge_threshold": 1e-30}))
                ways.append(Way(f"ours judged{name}", k, b, judged))
    return ways


def graphs_made(device: str) -> int:
    """Graphs compiled and CUDA graphs recorded so far; one whose inputs moved is recorded anew in silence."""
    graphs = counters["stats"]["unique_graphs"]
    if device != "cpu":
        manager = cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
        graphs += 0 if manager is None else manager.debug_fail_counter
    return graphs


def forget_graphs() -> None:
    torch._dynamo.reset()
    kept_caches.clear()
    gc.collect()


def first_calls(model: PreTrainedModel, draft: PreTrainedModel, way: Way, args) -> dict[str, Any]:
    """Decodes twice, since the second call may still record graphs: a row, and under `generate` the call to time."""
    counters.clear()
    # Token 0 would pass for padding.
    starts = 1 + torch.arange(way.batch_size, device=args.device)[:, None] * 37
    inputs = (starts + torch.arange(args.prompt_length, device=args.device)) % args.vocab_size
    draft.generation_config.num_assistant_tokens = way.draft_length
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    options = {"input_ids": inputs, "do_sample": False, "max_new_tokens": args.num_tokens, **way.arguments}
    first, (responses, forwards, decisions) = timed(args.device, functools.partial(decode_batch, model, options))
    generate = functools.partial(model.generate, **options)
    with LiveBytes(model, draft) if args.device == "cpu" else contextlib.nullcontext() as counted:
        timed(args.device, generate)
    # Ours counts cycles, of which the prefill isn't one; stock drafts from its first forward on.
    new = (args.num_tokens - 1) * way.batch_size
    counted_up = inputs[:, -1:] + 1 + torch.arange(args.num_tokens, device=args.device)
    return {
        "way": way,
        "generate": generate,
        "is_right": responses == (counted_up % model.config.vocab_size).tolist(),
        "graphs_missed": counters["inductor"]["cudagraph_skips"],
        "first": first,
        "tokens_per_cycle": args.num_tokens / forwards[0] if decisions is None else new / sum(forwards),
        "seconds": [],
        "peak": counted.peak if counted else 0,
        "new_graphs": 0,
    }


def time_in_turn(rows: list[dict[str, Any]], args) -> None:
    """A call of each row in every round: what drifts, drifts for all of them."""
    for _ in range(args.rounds):
        for row in rows:
            if args.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            graphs = graphs_made(args.device)
            row["seconds"].append(timed(args.device, row["generate"])[0])
            row["new_graphs"] += graphs_made(args.device) - graphs
            if args.device != "cpu":
                row["peak"] = max(row["peak"], torch.cuda.max_memory_allocated())


def print_row(cells: Sequence[Any]) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def parse_arguments(parser: argparse.ArgumentParser, pairs: Sequence[str] = tuple(PAIRS)) -> argparse.Namespace:
    """The parser's own, and those of the pair. On a CPU it is fp32."""
    parser.add_argument("--pair", choices=pairs, default="llama")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--agreement", type=share, default=0.82, help="share of tokens at which the draft agrees")
    parser.add_argument("--harmless", type=share, default=0.65, help="share of the mismatches that don't matter")
    parser.add_argument(
        "--num_layers", type=positive_int, help="of both models, where fewer will do: they compile faster"
    )
    parser.add_argument("--num_threads", type=positive_int, default=2, help="on a CPU")
    args = parser.parse_args()
    if args.device != "cpu":
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        device = "cuda:0" if args.device == "cuda" else args.device
        if device not in gpus:
            parser.error(
                f"--device {args.device} isn't among the GPUs here: {', '.join(gpus) or 'none'}. "
                "`--pair tiny --device cpu` shows what it would do."
            )
        # Clocks, peaks and graphs are those of the current device.
        torch.cuda.set_device(device)
    args.dtype = torch.float32 if args.device == "cpu" else getattr(torch, args.dtype)
    torch.set_num_threads(args.num_threads)
    return args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--draft_lengths", type=positive_int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--batch_sizes", type=positive_int, nargs="+", default=[1, 8])
    parser.add_argument("--ways", nargs="+", help="only rows whose names have one of these parts")
    parser.add_argument("--prompt_length", type=positive_int, default=128)
    parser.add_argument("--num_tokens", type=positive_int, default=256)
    parser.add_argument("--rounds", type=positive_int, default=3)
    args = parse_arguments(parser)
    check_ways(parser, args.ways, ways_to_decode(None, None, args))

    model, draft, _ = planted_pair(args)
    args.vocab_size = min(model.config.vocab_size, draft.config.vocab_size)
    judge = mean_judge(model)

    rate = bandwidth(args.device, weight_bytes(model))
    read, read_by_draft = weight_bytes(model), weight_bytes(draft)
    print(f"{args.pair}, {args.dtype}, {args.device}; {args.num_tokens} tokens after {args.prompt_length}")
    print(f"copies: {rate / 1e9:.0f} GB/s; weights: {read / 1e9:.2f} and {read_by_draft / 1e9:.2f} GB")
    print("roofline: tokens/s if a cycle took no longer than to read the weights\n")
    held = sum(x.nbytes for x in (*model.parameters(), *draft.parameters()))
    header = (
        "decoding|draft length|batch|tokens per cycle|tokens/s|to roofline|first call, s|peak MB beside the weights"
    )
    header += "|the target's tokens|graphs missed|new graphs"
    print_row(header.split("|"))
    print_row(["---"] * (header.count("|") + 1))
    ways = [
        way
        for way in ways_to_decode(draft, judge, args)
        if not args.ways or any(part in way.name for part in args.ways)
    ]
    batch_size = None
    for (b, k), group in itertools.groupby(ways, key=lambda way: (way.batch_size, way.draft_length)):
        if b != batch_size:
            forget_graphs()
            batch_size = b
        # Minutes each, where they compile.
        group = tqdm(list(group), desc=f"first calls, batch {b}, draft length {k}", unit="row")
        rows = [first_calls(model, draft, way, args) for way in group]
        time_in_turn(rows, args)
        for row in rows:
            name, is_judged = row["way"].name, "judged" in row["way"].name
            speed = b * args.num_tokens / statistics.median(row["seconds"])
            roofline = b * row["tokens_per_cycle"] * rate / (read + k * read_by_draft)
            cells = [name, k or "", b, f"{row['tokens_per_cycle']:.2f}", f"{speed:.0f}", f"{speed / roofline:.2f}"]
            cells += [f"{row['first']:.1f}", f"{(row['peak'] - held) / 1e6:.1f}"]
            cells += ["" if is_judged else "yes" if row["is_right"] else "NO", row["graphs_missed"], row["new_graphs"]]
            print_row(cells)


if __name__ == "__main__":
    main()
