# SPDX-License-Identifier: Apache-2.0
"""Measures how the embedded pair behaves, on problems of any seed: the figures of its README.

python examples/tiny_pair/measure.py --seed 1
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from make_problems import problems
from make_programs import programs
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from autojudge_hf import AutoJudge, JudgeConfig, evaluate_judge, mine_mismatches
from autojudge_hf.forward import cached_forward
from autojudge_hf.head_inputs import HeadInputs
from autojudge_hf.tasks import GSM8K, LiveCodeBench, Task


HERE = Path(__file__).parent
MAX_NEW_TOKENS = 320
C_GRID = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]


def accuracy_and_length(model, tokenizer, task: Task, examples: list[dict], name: str) -> tuple[float, float]:
    """Greedy, in batches."""
    correct, tokens = 0, 0
    for start in tqdm(range(0, len(examples), 50), desc=f"solving, {name}"):
        batch = examples[start : start + 50]
        prompts = [task.prompt(example, tokenizer) for example in batch]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        responses = output[:, inputs["input_ids"].shape[1] :]
        tokens += (responses != tokenizer.pad_token_id).sum().item()
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        answers = task.extract_answers(batch, texts)
        correct += sum(task.is_correct(example, answer) for example, answer in zip(batch, answers))
    return correct / len(examples), tokens / len(examples)


@torch.inference_mode()
def milliseconds(model, num_tokens: int, repeats: int = 100) -> float:
    """Median time of one forward of `num_tokens` behind 200 cached ones."""
    cache = DynamicCache(config=model.config)
    cached_forward(model, torch.randint(100, 1000, (1, 200)), cache)
    times = []
    for _ in range(repeats + 10):
        tokens = torch.randint(100, 1000, (1, num_tokens))
        started = time.perf_counter()
        cached_forward(model, tokens, cache, num_logits=num_tokens)
        times.append(time.perf_counter() - started)
        cache.crop(-num_tokens)
    return 1000 * statistics.median(times[10:])


@torch.inference_mode()
def state_gap(dtype: torch.dtype, rows: list[dict]) -> float:
    """Mean relative difference of a candidate's state between a pass of 2 tokens (mining) and one of 17 (decoding)."""
    model = AutoModelForCausalLM.from_pretrained(HERE / "target", dtype=dtype).eval()
    gaps = []
    for row in rows:
        tokens = torch.tensor([[*row["input_ids"], row["candidate_token_id"], *row["input_ids"][:15]]])
        start, states = row["position"] - 1, []
        for length in (2, 17):
            cache = DynamicCache(config=model.config)
            cached_forward(model, tokens[:, :start], cache)
            block = tokens[:, start : start + length]
            with HeadInputs(model) as head:
                outputs = cached_forward(model, block, cache, num_logits=length, head=head)
            states.append(outputs.states[0, 1].float())
        gaps.append(((states[0] - states[1]).norm() / states[1].norm()).item())
    return statistics.mean(gaps)


def cross_validated_auc(features, labels, groups, scale) -> float:
    """Best ROC-AUC over C, five folds by example, scores pooled."""
    scores = []
    for c in C_GRID:
        classifier = LogisticRegression(C=c, max_iter=2000)
        pipeline = make_pipeline(scale, classifier)
        predicted = cross_val_predict(
            pipeline, features, labels, groups=groups, cv=GroupKFold(5), method="decision_function"
        )
        scores.append(roc_auc_score(labels, predicted))
    return max(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num_problems", type=int, default=500, help="problems solved for the accuracies")
    parser.add_argument("--num_mined", type=int, default=150, help="problems mined for the shares and the AUCs")
    args = parser.parse_args()
    # The AUCs are of five folds by problem.
    for name, least in (("num_problems", 1), ("num_mined", 5)):
        if (number := vars(args)[name]) < least:
            parser.error(f"--{name} must be at least {least}, got {number}.")
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(HERE / "target")
    target, draft = (
        AutoModelForCausalLM.from_pretrained(HERE / role, dtype=torch.float32).eval() for role in ("target", "draft")
    )
    words, code = GSM8K(), LiveCodeBench()
    test, test_code = (
        list(itertools.islice(stream("test", args.seed), args.num_problems)) for stream in (problems, programs)
    )
    train = list(itertools.islice(problems("train", args.seed), args.num_mined))

    solved, length = accuracy_and_length(target, tokenizer, words, test, "target")
    draft_solved, _ = accuracy_and_length(draft, tokenizer, words, test, "draft")
    solved_code, length_code = accuracy_and_length(target, tokenizer, code, test_code, "target, programs")
    draft_solved_code, _ = accuracy_and_length(draft, tokenizer, code, test_code, "draft, programs")
    costs = {(role, n): milliseconds(m, n) for role, m in (("target", target), ("draft", draft)) for n in (1, 17)}
    never = AutoJudge.from_config(JudgeConfig(judge_type="top_k"))
    (lossless,), (lossless_code,) = (
        evaluate_judge(
            target,
            draft,
            tokenizer,
            examples[:60],
            task,
            never,
            thresholds=[],
            num_assistant_tokens=16,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        for task, examples in ((words, test), (code, test_code))
    )
    mined = mine_mismatches(
        target,
        draft,
        tokenizer,
        train,
        words,
        max_new_tokens=MAX_NEW_TOKENS,
        num_assistant_tokens=8,
        logit_features=True,
    )
    labels, groups = np.array(mined["label"][:]), np.array(mined["example_id"][:])
    tokens = np.array([mined["candidate_token_id"][:], mined["target_token_id"][:]]).T
    by_token = cross_validated_auc(tokens, labels, groups, OneHotEncoder(handle_unknown="ignore"))
    features = np.array(mined["features"][:])
    states = features[:, : target.config.hidden_size]
    by_state, by_logits, by_both = (
        cross_validated_auc(x, labels, groups, StandardScaler())
        for x in (states, features[:, states.shape[1] :], features)
    )

    print(f"\nseed {args.seed}, fp32, {torch.get_num_threads()} threads")
    print(
        f"1. solved greedily by target and draft, {len(test)} held-out problems each: "
        f"words {solved:.1%} and {draft_solved:.1%}, programs {solved_code:.1%} and {draft_solved_code:.1%}"
    )
    print(
        f"2. one forward of 1 token: target {costs['target', 1]:.2f} ms, draft {costs['draft', 1]:.2f} ms, "
        f"ratio {costs['target', 1] / costs['draft', 1]:.1f}; of 17 tokens: target {costs['target', 17]:.2f} ms"
    )
    print(
        f"3. lossless tokens per cycle at draft length 16: words {lossless['tokens_per_cycle']:.2f}, "
        f"programs {lossless_code['tokens_per_cycle']:.2f};"
    )
    print(
        f"   {len(train)} word problems mined: {len(mined) / len(train):.1f} mismatches a problem, "
        f"{labels.mean():.1%} important"
    )
    print(f"4. mean response: words {length:.0f} tokens, programs {length_code:.0f}")
    print(
        f"5. ROC-AUC, 5-fold by problem: token identities {by_token:.3f}, target states {by_state:.3f}, "
        f"logit features {by_logits:.3f}, both {by_both:.3f}"
    )
    gaps = [state_gap(dtype, list(mined)[:200]) for dtype in (torch.float32, torch.bfloat16)]
    print(
        f"6. states of a 2-token and a 17-token pass differ by {gaps[0]:.1e} in fp32, {gaps[1]:.1e} in bf16 (relative)"
    )


if __name__ == "__main__":
    main()
