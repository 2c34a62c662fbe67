# SPDX-License-Identifier: Apache-2.0
"""How much faster at which loss? Every judge on the embedded pair, compared in one run: a table and a plot.

    python examples/compare_judges.py --output_dir runs/compare

Judges learn from training problems. Thresholds and draft lengths are chosen on validation problems: thresholds by the
accuracy they cost, at most 1 point and at most 5, draft lengths by the clock. Fresh test problems, decoded once at
each judge's two thresholds, give the table. The oracle knows the search's own labels of the first of these; what is
told of its share is told of those. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import positive_int
from embedded_pair import MAX_NEW_TOKENS, load_pair
from measure_judge import TASKS, decode, mine, take, untimed
from measure_oracle import cycles, ways_of_the_search
from tqdm import tqdm

from autojudge_hf import (
    AutoJudge,
    JudgeConfig,
    JudgeTrainer,
    JudgeTrainingArguments,
    calibrate_threshold,
    evaluation_summary,
    select_features,
    symbol_token_ids,
)
from autojudge_hf.plots import plot_trade_off


#: Name, type and features. The paper's judge reads both models' states of the candidate.
LEARNED = {
    "mlp": ("mlp", {"state_position": "both", "assistant_hidden_size": None, "assistant_logit_features": False}),
    "paper": (
        "linear",
        {"state_position": "candidate", "logit_features": False, "assistant_logit_features": False},
    ),
}
#: Thresholds to try on validation problems, narrowed down there.
THRESHOLDS = {
    "mlp": (0.05, 0.08, 0.11, 0.15, 0.2, 0.3),
    "paper": (0.01, 0.02, 0.03, 0.05, 0.1, 0.15),
    "margin": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.92, 0.95),
    "kl": (0.05, 0.15, 0.3, 0.6),
    "entropy": (0.5, 0.8, 0.92, 0.97),
    # Up to rank 2, 3 and 4; 2, 4 and 9.
    "top_k": (0.6, 0.7, 0.8),
    "rule": (0.6, 0.76, 0.9),
}
MAX_DROPS = {"1 point": 0.01, "5 points": 0.05}
BATCH_SIZE = 32


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What an earlier run has written to `path`, or else `make()`."""
    if not path.exists():
        value = make()
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value))
        part.replace(path)
    return json.loads(path.read_text())


def mine_all(task: str, seed: int, n: int, folder: Path):
    """Mismatches of `n` training problems, with all that any judge here reads."""
    features = {"state_position": "both", "assistant_states": True}
    features |= {"logit_features": True, "assistant_logit_features": True}
    return mine(task, take(task, "train", seed, n), folder, **features)


def train(name: str, mined, folder: Path) -> None:
    """Chooses C by cross-validation, and saves the judge."""
    judge_type, layout = LEARNED[name]
    grid = [0.03, 0.01, 0.003] if judge_type == "mlp" else [1.0, 0.1, 0.01, 0.001]
    arguments = JudgeTrainingArguments(
        output_dir=str(folder / name),
        judge_type=judge_type,
        num_folds=5,
        C_grid=grid,
        max_iter=400,
    )
    trainer = JudgeTrainer(arguments, select_features(mined, **layout))
    trainer.train()
    print(f"{name}: ROC-AUC {trainer.state.best_metric:.4f} across folds, C {trainer.judge.config.training['C']}")
    trainer.save_model()


def calibrate(
    name: str,
    lossless: dict,
    task: str,
    problems: list[dict],
    folder: Path,
    draft_length: int,
    confidence: float,
    max_drops: Mapping[str, float] = MAX_DROPS,
) -> list[dict]:
    """Runs in a process of its own: chooses the thresholds of the judge in `folder`, and saves it."""
    torch.set_num_threads(1)
    model, draft, tokenizer = load_pair()
    if name in LEARNED:
        judge = AutoJudge.from_pretrained(folder / "trained" / name)
    else:
        symbols = symbol_token_ids(tokenizer) if name == "rule" else []
        judge = AutoJudge.from_config(JudgeConfig(judge_type=name, important_token_ids=symbols))
    rows = calibrate_threshold(
        model,
        draft,
        tokenizer,
        problems,
        TASKS[task][0],
        judge,
        thresholds=THRESHOLDS[name],
        max_drops=max_drops,
        confidence=confidence,
        lossless=lossless,
        dataset_name=TASKS[task][2],
        num_assistant_tokens=draft_length,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=BATCH_SIZE,
    )
    judge.config.evaluation = untimed(judge.config.evaluation)
    judge.save_pretrained(folder / "calibrated" / name)
    return rows


def test(point: tuple[str, float | None], task: str, problems: list[dict], folder: Path, draft_length: int) -> dict:
    """Runs in a process of its own: one point of the final pass."""
    torch.set_num_threads(1)
    name, threshold = point
    judge = None if threshold is None else AutoJudge.from_pretrained(folder / "calibrated" / name)
    path = folder / f"test-{name}-{threshold}.json"
    return kept(path, lambda: decode(task, problems, judge, threshold, draft_length, BATCH_SIZE))


def tuned_length(task: str, problems: list[dict], judge, threshold: float | None, lengths: list[int]) -> int:
    """The draft length with the most tokens per second, one problem at a time."""
    return max(lengths, key=lambda k: decode(task, problems, judge, threshold, k, 1)["tokens_per_second"])


def oracle(task: str, problems: list[dict], folder: Path, draft_length: int) -> list[list[int]]:
    """Tokens and cycles of each problem if only important mismatches end a draft."""
    ways = ways_of_the_search(task, problems, folder / "oracle")
    return [[end - start - 1, cycles(start, end, important, draft_length)] for start, end, important in ways]


def per_cycle(row: dict, n: int | None = None) -> float:
    """Tokens per cycle, of the first `n` problems."""
    return sum(row["num_tokens"][:n]) / sum(row["num_target_forwards"][:n])


def oracle_rate(best: list[list[int]]) -> float:
    tokens, number = map(sum, zip(*best))
    return tokens / number


def share_of_gap(lossless: dict, judged: dict, best: list[list[int]]) -> tuple[float, float, float]:
    """How far the judge comes from lossless to oracle tokens per cycle, with the 95 % bootstrap interval."""
    n = len(best)
    counts = [[row["num_tokens"][:n], row["num_target_forwards"][:n]] for row in (lossless, judged)]
    counts = np.array([*counts, list(zip(*best))])
    drawn = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=2000)
    # What was measured, then the samples of problems.
    tokens, cycles_of = np.moveaxis(counts @ np.concatenate([np.ones((1, n)), drawn]).T, 1, 0)
    low, got, high = tokens / cycles_of
    shares = (got - low) / (high - low)
    return shares[0], *np.quantile(shares[1:], [0.025, 0.975])


def clock(ways: dict, validation: list[dict], tested: list[dict], args) -> tuple[dict, dict]:
    """Each way's best draft length, and problems (not tokens: longer answers are no gain) per second, to lossless."""
    lengths = {
        (name, t): kept(
            Path(args.output_dir) / f"length-{name}-{t}.json",
            partial(tuned_length, args.task, validation[: args.num_timed], judge, t, args.draft_lengths),
        )
        for (name, t), judge in ways.items()
    }
    speeds = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way, judge in ways.items():
            row = decode(args.task, tested[: args.num_timed], judge, way[1], lengths[way], 1)
            speeds[way].append(row["tokens_per_second"] / row["mean_response_length"])
    lossless = speeds["lossless", None]
    return lengths, {way: statistics.median(a / b for a, b in zip(own, lossless)) for way, own in speeds.items()}


def report(judges: dict, results: dict, best: list[list[int]], lengths: dict, times: dict, args) -> None:
    """Prints the table, draws the plots (validation's has all thresholds that were tried), and saves the judges."""
    folder, lossless = Path(args.output_dir), {"threshold": None, **results["lossless", None]}
    base, gain = per_cycle(lossless), oracle_rate(best) / per_cycle(lossless, len(best))
    print(f"\n{len(lossless['correct'])} test problems, used once; draft length {args.draft_length}; 95 % intervals")
    print(f"oracle: {len(best)} of them; clock: problems per second, own draft length, batch 1, 2 threads, fp32\n")
    header = "judge, budget|accuracy|drop, points|tokens per cycle|mismatches accepted|of oracle's gain"
    header = [*header.split("|"), "draft length", "problems per second, to lossless"]
    table = [header, ["---"] * len(header)]
    table.append(
        ["lossless", f"{lossless['accuracy']:.1%}", "", f"{base:.2f}", "", "0%", lengths["lossless", None], "1"]
    )
    curves = {}
    for name, judge in judges.items():
        rows = [lossless, *({"threshold": t, **row} for (n, t), row in results.items() if n == name)]
        curves[name] = evaluation_summary(
            rows, dataset=TASKS[args.task][2], split="test", num_assistant_tokens=args.draft_length
        )
        for row, figures in zip(rows[1:], curves[name][1:]):
            t = row["threshold"]
            budgets = " and ".join(budget for budget, value in judge.config.thresholds.items() if value == t)
            drop, low, high = (100 * figures[key] for key in ("drop", "drop_low", "drop_high"))
            share, least, most = share_of_gap(lossless, row, best)
            cells = [f"{name}, {budgets}", f"{row['accuracy']:.1%}", f"{drop:.1f} [{low:.1f}, {high:.1f}]"]
            cells += [f"{per_cycle(row):.2f} ({per_cycle(row) / base:.2f}x)", f"{row['mismatches_accepted']:.0%}"]
            cells += [f"{share:.0%} [{least:.0%}, {most:.0%}]", lengths[name, t], f"{times[name, t]:.2f}"]
            table.append(cells)
    # At the ratio that was measured on its own problems.
    table.append(["oracle", "the target's", "0", f"{base * gain:.2f} ({gain:.2f}x)", "", "100%", "", ""])
    print("\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in table))
    start = next(iter(curves.values()))[0]
    curves["oracle"] = [start, {**start, "tokens_per_cycle": base * gain}]
    plot_trade_off({name: curve for name, curve in curves.items() if len(curve) > 1}, folder / "trade_off.png")
    plot_trade_off({name: judge.config.evaluation for name, judge in judges.items()}, folder / "validation.png")
    for name, judge in judges.items():
        # For its card: both curves.
        judge.config.evaluation += untimed(curves[name])
        judge.save_pretrained(folder / "judges" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--task", choices=list(TASKS), default="gsm8k")
    parser.add_argument("--output_dir", default="runs/compare")
    parser.add_argument("--judges", nargs="+", choices=THRESHOLDS, default=list(THRESHOLDS), help="which to compare")
    parser.add_argument("--seed", type=int, default=21, help="of training and validation problems")
    parser.add_argument("--test_seed", type=int, default=31)
    parser.add_argument("--num_mined", type=positive_int, default=1500)
    parser.add_argument("--num_validation", type=positive_int, default=1000)
    parser.add_argument("--num_test", type=positive_int, default=2000)
    parser.add_argument("--confidence", type=float, default=0.975, help="that thresholds keep to what they may cost")
    parser.add_argument("--num_oracle", type=positive_int, default=300, help="of the test problems")
    parser.add_argument("--num_timed", type=positive_int, default=60, help="problems for each reading of the clock")
    parser.add_argument("--draft_length", type=positive_int, default=32, help="where the clock doesn't matter")
    parser.add_argument("--draft_lengths", type=positive_int, nargs="+", default=[8, 16, 32], help="for the clock")
    parser.add_argument("--rounds", type=positive_int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(2)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "judges")}
    if (before := kept(folder / "settings.json", lambda: settings)) != settings:
        parser.error(f"{folder} holds a run with {before}, got {settings}. Another --output_dir keeps them apart.")
    mined = mine_all(args.task, args.seed, args.num_mined, folder / "mined")
    for name in args.judges:
        if name in LEARNED and not (folder / "trained" / name).exists():
            train(name, mined, folder / "trained")

    validation = take(args.task, "validation", args.seed, args.num_validation)
    tested = take(args.task, "test", args.test_seed, args.num_test)
    shared = {"task": args.task, "folder": folder, "draft_length": args.draft_length}
    path = folder / "validation-lossless.json"
    lossless = kept(path, lambda: decode(args.task, validation, None, None, args.draft_length, BATCH_SIZE))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        start = {"threshold": None, **lossless}
        known = {"lossless": start, "problems": validation, "confidence": args.confidence}
        missing = [name for name in args.judges if not (folder / "calibrated" / name).exists()]
        list(pool.map(partial(calibrate, **known, **shared), missing))
        judges = {name: AutoJudge.from_pretrained(folder / "calibrated" / name) for name in args.judges}
        ways: dict[tuple[str, float | None], Any] = {("lossless", None): None}
        for name, judge in judges.items():
            ways |= {(name, t): judge for t in sorted({*judge.config.thresholds.values()}) if t > 0.0}
        passes = pool.map(partial(test, problems=tested, **shared), ways)
        results = dict(zip(ways, tqdm(passes, total=len(ways), desc="final pass", unit="point")))
    tested_by_oracle = tested[: args.num_oracle]
    best = kept(folder / "oracle.json", lambda: oracle(args.task, tested_by_oracle, folder, args.draft_length))
    lengths, times = clock(ways, validation, tested, args)
    report(judges, results, best, lengths, times, args)


if __name__ == "__main__":
    main()
