# SPDX-License-Identifier: Apache-2.0
"""Trains the embedded pair from nothing: the tokenizer, the target, the draft.

    python examples/tiny_pair/train_pair.py tokenizer
    python examples/tiny_pair/train_pair.py target
    python examples/tiny_pair/train_pair.py draft

Every batch is fresh: word problems of the `lm` split, which shares no problem with those that are mined or tested.
The loss is on the responses only.
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
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from autojudge_hf.tasks import GSM8K


HERE = Path(__file__).parent
BEGIN, END, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
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
    "draft": {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 2},
}
# Plain solutions first: they make no free choice, so that every bit of the loss is about who has what. Mixed wordings
# from the start leave a small model copying the wrong person's number for a very long time.
PLAIN_STEPS = {"target": 1200, "draft": 500}
STEPS = {"target": 3000, "draft": 3000}
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
    """Byte-level BPE: every word of the word problems is one token, any other text (Python too) a few."""
    stream = problems("lm", seed)
    task, corpus = GSM8K(), []
    for _ in range(4000):
        example = next(stream)
        corpus += [task.instruction(example), response(example["answer"])]
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
        special_tokens=[BEGIN, END, USER, ASSISTANT],
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
    tokenizer: PreTrainedTokenizerBase, seed: int, batch_size: int, plain: bool
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Endless `(input_ids, labels)` of similar lengths, labels shifted, -100 outside the responses.

    A third of the plain rows are sums.
    """
    stream, task, rng = problems("lm", seed, plain), GSM8K(), random.Random(seed)
    while True:
        rows = []
        for _ in range(32 * batch_size):
            if plain and rng.random() < 1 / 3:
                answer, messages = sums(rng), [{"role": "user", "content": "Do some sums."}]
                prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            else:
                example = next(stream)
                prompt, answer = task.prompt(example, tokenizer), response(example["answer"])
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
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    started, tokens, running = time.perf_counter(), 0, None
    streams = [batches(tokenizer, args.seed + i, args.batch_size, plain=i == 0) for i in (0, 1)]
    progress = tqdm(range(args.steps), desc=name, mininterval=5)
    for step in progress:
        ids, labels = next(streams[step >= args.plain_steps])
        # Warm up, hold while the solutions are plain, then go down to zero.
        scale = min((step + 1) / 100, 1.0, (args.steps - step) / (args.steps - args.plain_steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * scale
        wanted = labels != IGNORE
        with torch.autocast("cpu", dtype=torch.bfloat16):
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
        if step % 200 == 0 or step == args.steps - 1:
            minutes = (time.perf_counter() - started) / 60
            tqdm.write(f"step {step} loss {running:.4f} tokens {tokens / 1e6:.2f}M minutes {minutes:.1f}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("part", choices=["tokenizer", "target", "draft"])
    parser.add_argument("--out", type=Path, help="folder to write (default: beside this script)")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}")
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain_steps", type=int, help=f"default: {PLAIN_STEPS}")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part == "tokenizer":
        tokenizer = train_tokenizer(args.seed)
        for name in SHAPES:
            tokenizer.save_pretrained(args.out or HERE / name)
        return
    args.out = args.out or HERE / args.part
    args.steps = args.steps or STEPS[args.part]
    args.plain_steps = PLAIN_STEPS[args.part] if args.plain_steps is None else args.plain_steps
    if args.steps <= args.plain_steps:
        parser.error(f"--steps must be more than the {args.plain_steps} plain ones, got {args.steps}")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE / args.part)
    model = train_model(args.part, tokenizer, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    sys.exit(main())
