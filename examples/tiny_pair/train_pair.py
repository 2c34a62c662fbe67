# SPDX-License-Identifier: Apache-2.0
"""Trains the embedded pair from nothing: the tokenizer, the target, the draft.

    python examples/tiny_pair/train_pair.py tokenizer
    python examples/tiny_pair/train_pair.py target
    python examples/tiny_pair/train_pair.py draft

Every batch is fresh: lists to copy at first, then word problems and programs of the `lm` split, which shares no
problem with those that are mined or tested. The loss is on the responses only.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from make_problems import problems
from make_programs import programs
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from autojudge_hf.tasks import GSM8K, LiveCodeBench
from autojudge_hf.tasks.livecodebench import SYSTEM as SYSTEM_PROMPT


HERE = Path(__file__).parent
BEGIN, END, SYSTEM, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Words keep their leading space; so do numbers, which are one token up to 99.
WORD_PATTERN = r" ?\p{L}+| ?\p{N}{1,2}|\s*[\r\n]| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PYTHON_MODULES = [
    "ast",
    "bisect",
    "calendar",
    "collections",
    "dataclasses",
    "fractions",
    "heapq",
    "random",
    "statistics",
    "string",
    "textwrap",
]
SHAPES = {
    "target": {"num_hidden_layers": 8, "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6},
    "draft": {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4},
}
# Three stages. Copying short lists of random tokens teaches attention to find what followed a token before, which text
# alone teaches a model of this size only after hours. Plain solutions make no free choice, so that every bit of the
# loss is about numbers. The rest of the steps is on solutions as they are.
COPY_STEPS = {"target": 800, "draft": 600}
PLAIN_STEPS = {"target": 500, "draft": 400}
FREE_STEPS = {"target": 1600, "draft": 1500}
IGNORE = -100


def response(answer: str) -> str:
    """A GSM8K answer in the words the prompt asks for."""
    return answer.replace("#### ", "The final answer is ")


def sums(rng: random.Random) -> str:
    """Nothing but sums, as dense as can be: two dozen where a solution has half a dozen."""
    lines = []
    for _ in range(24):
        a, b, k = rng.randint(3, 45), rng.randint(2, 15), rng.choice((2, 2, 3, 4))
        lines.append(
            rng.choice(
                (
                    f"{a} + {b} = {a + b}.",
                    f"{b} + {a} = {a + b}.",
                    f"{a + b} - {b} = {a}.",
                    f"{a + b} - {a} = {b}.",
                    f"{b} * {k} = {b * k}.",
                    f"{k} * {b} = {b * k}.",
                    f"{b * k} / {k} = {b}.",
                    f"{2 * (a % 31)} / 2 = {a % 31}.",
                )
            )
        )
    return " ".join(lines)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every word of both tasks is one token, any other text a few."""
    stories, programming = problems("lm", seed), programs("lm", seed)
    gsm8k, livecodebench, corpus = GSM8K(), LiveCodeBench(), []
    for _ in range(4000):
        story, program = next(stories), next(programming)
        corpus += [gsm8k.instruction(story), response(story["answer"])]
        corpus += [SYSTEM_PROMPT, livecodebench.instruction(program), program["answer"]]
    corpus += [f"{n} {n}" for n in range(100)] * 300
    for name in PYTHON_MODULES:
        corpus.append(inspect.getsource(importlib.import_module(name)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[BEGIN, END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )


def batches(
    tokenizer: PreTrainedTokenizerBase, seed: int, batch_size: int, program_share: float, plain: bool
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Endless `(input_ids, labels)` of similar lengths, labels shifted, -100 outside the responses.

    A third of the rows that aren't programs are sums if `plain`, else all are word problems.
    """
    stories, programming, rng = problems("lm", seed, plain), programs("lm", seed, plain), random.Random(seed)
    gsm8k, livecodebench = GSM8K(), LiveCodeBench()
    while True:
        rows = []
        for _ in range(32 * batch_size):
            if rng.random() < program_share:
                example = next(programming)
                prompt, answer = livecodebench.prompt(example, tokenizer), example["answer"]
            elif plain and rng.random() < 1 / 3:
                answer, messages = sums(rng), [{"role": "user", "content": "Do some sums."}]
                prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            else:
                example = next(stories)
                prompt, answer = gsm8k.prompt(example, tokenizer), response(example["answer"])
            prompt = tokenizer.encode(prompt, add_special_tokens=False)
            reply = tokenizer.encode(answer + END, add_special_tokens=False)
            rows.append((prompt + reply, [IGNORE] * len(prompt) + reply))
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(ids) for ids, _ in group)
            ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in group])
            labels = torch.tensor([row + [IGNORE] * (longest - len(row)) for _, row in group])
            yield ids[:, :-1], labels[:, 1:]


def copies(vocab_size: int, seed: int, batch_size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Endless `(input_ids, labels)`: short lists of random tokens, three times over; labels on the repetitions."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    while True:
        length = rng.randint(4, 12)
        rows = []
        for _ in range(6 * batch_size):
            # From few different tokens, where one token of context says little, to as many as there are.
            tokens = torch.randint(vocab_size, (rng.choice((6, 12, 50, 200, 1000)),), generator=generator)
            rows.append(tokens[torch.randint(len(tokens), (length,), generator=generator)])
        ids = torch.stack(rows).repeat(1, 3)
        labels = ids.clone()
        labels[:, :length] = IGNORE
        yield ids[:, :-1], labels[:, 1:]


@torch.no_grad()
def look_back(model: LlamaForCausalLM) -> None:
    """Starts two heads of the first layer as heads that look at the last token and at the one before.

    One coordinate is the same in all embeddings, and the rotary embedding of what it gives as query and key makes
    their product largest at the wanted distance. Training does the rest, and is free to undo it.
    """
    config, attention = model.config, model.model.layers[0].self_attn
    size = config.hidden_size // config.num_attention_heads
    model.model.embed_tokens.weight[:, 0] = 3 * config.initializer_range
    angles = 10_000.0 ** (-torch.arange(6) * 2 / size)
    for head, distance in ((0, 1), (1, 2)):
        query, key = torch.zeros(size), torch.zeros(size)
        query[:6], query[size // 2 : size // 2 + 6] = torch.cos(distance * angles), -torch.sin(distance * angles)
        key[:6] = 1.0
        rows = slice(head * size, (head + 1) * size)
        for projection, values in ((attention.q_proj, query), (attention.k_proj, key)):
            projection.weight[rows] = 0.0
            projection.weight[rows, 0] = 2.4 * values


@torch.no_grad()
def resume(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Takes the weights in `folder`, which may be of another tokenizer: a token that it lacks starts as its parts."""
    trained = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained_tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    known, old = trained_tokenizer.get_vocab(), trained.model.embed_tokens.weight
    new = torch.empty_like(model.model.embed_tokens.weight)
    for token, i in tokenizer.get_vocab().items():
        parts = [known[token]] if token in known else trained_tokenizer.encode(tokenizer.decode([i]))
        new[i] = old[parts].mean(dim=0)
    model.load_state_dict(trained.state_dict())
    model.model.embed_tokens.weight.copy_(new)


def train_model(name: str, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_key_value_heads=SHAPES[name]["num_attention_heads"],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPES[name],
    )
    model = LlamaForCausalLM(config)
    look_back(model)
    if args.resume_from is not None:
        resume(model, tokenizer, args.resume_from)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    has_fast_bf16 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    started, tokens, running = time.perf_counter(), 0, None
    streams = [
        copies(len(tokenizer), args.seed, args.batch_size),
        batches(tokenizer, args.seed, args.batch_size, args.program_share, plain=True),
        batches(tokenizer, args.seed + 1, args.batch_size, args.program_share, plain=False),
    ]
    free_from, steps = args.copy_steps + args.plain_steps, args.copy_steps + args.plain_steps + args.free_steps
    progress = tqdm(range(steps), desc=name, mininterval=5)
    for step in progress:
        ids, labels = next(streams[(step >= args.copy_steps) + (step >= free_from)])
        # Warm up, hold until the solutions are as they are, then go down to zero.
        scale = min((step + 1) / 100, 1.0, (steps - step) / max(1, args.free_steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * scale
        wanted = labels != IGNORE
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_fast_bf16):
            states = model.model(input_ids=ids, use_cache=False).last_hidden_state[wanted]
            logits = model.lm_head(states)
        loss = nn.functional.cross_entropy(logits.float(), labels[wanted])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += ids.numel()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if step % 200 == 0 or step == steps - 1:
            minutes = (time.perf_counter() - started) / 60
            tqdm.write(f"step {step} loss {running:.4f} tokens {tokens / 1e6:.2f}M minutes {minutes:.1f}")
    after = model.state_dict()
    model.load_state_dict({name: torch.lerp(after[name], before[name], args.keep) for name in after})
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("part", choices=["tokenizer", "target", "draft"])
    parser.add_argument("--out", type=Path, help="folder to write (default: beside this script)")
    parser.add_argument("--resume_from", type=Path, help="folder of weights to start from")
    parser.add_argument("--keep", type=float, default=0.0, help="share of the weights it started from in the result")
    parser.add_argument("--program_share", type=float, default=0.5, help="share of programs among the problems")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--copy_steps", type=int, help=f"default: {COPY_STEPS}")
    parser.add_argument("--plain_steps", type=int, help=f"default: {PLAIN_STEPS}")
    parser.add_argument("--free_steps", type=int, help=f"default: {FREE_STEPS}")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part == "tokenizer":
        tokenizer = train_tokenizer(args.seed)
        for name in SHAPES:
            tokenizer.save_pretrained(args.out or HERE / name)
        return
    args.out = args.out or HERE / args.part
    for name, defaults in (("copy_steps", COPY_STEPS), ("plain_steps", PLAIN_STEPS), ("free_steps", FREE_STEPS)):
        if getattr(args, name) is None:
            setattr(args, name, defaults[args.part])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE / args.part)
    model = train_model(args.part, tokenizer, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    sys.exit(main())
