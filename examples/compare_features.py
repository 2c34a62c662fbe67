# SPDX-License-Identifier: Apache-2.0
"""Which features tell important mismatches from harmless ones? ROC-AUC of judges that read more and more.

    python examples/compare_features.py --data runs/compare/mined

For mismatches that were mined with all features. Scores are those of grouped cross-validation: no judge has seen the
example it scores. C is each row's best. The gain is over the paper's features, both models' states of the candidate,
with its paired 95 % interval over examples.
"""

from __future__ import annotations

import argparse

import numpy as np
from arguments import positive_int


NO_STATES = {"hidden_size": None, "assistant_hidden_size": None}
NO_LOGITS = {"logit_features": False, "assistant_logit_features": False}
TARGET_ONLY = {"assistant_hidden_size": None}
TARGET_LOGITS = {"logit_features": True, "assistant_logit_features": False}
PAPER = "states of the candidate, both models (the paper's)"
#: Name, layout of the features, and what decoding with them costs in a cycle of k candidates.
ROWS = (
    (PAPER, {"state_position": "candidate", **NO_LOGITS}, "one draft forward"),
    ("the assistant's only", {"state_position": "candidate", "hidden_size": None, **NO_LOGITS}, "one draft forward"),
    ("the target's only", {"state_position": "candidate", **TARGET_ONLY, **NO_LOGITS}, "nothing"),
    ("the target's, before the candidate", {"state_position": "previous", **TARGET_ONLY, **NO_LOGITS}, "nothing"),
    ("the target's, both", {"state_position": "both", **TARGET_ONLY, **NO_LOGITS}, "nothing"),
    ("the target's logits only", {**NO_STATES, **TARGET_LOGITS}, "a softmax of k x vocabulary"),
    ("the target's, both, and its logits", {"state_position": "both", **TARGET_ONLY, **TARGET_LOGITS}, "a softmax"),
    (
        "and the assistant's logits",
        {"state_position": "both", **TARGET_ONLY},
        "two softmaxes, the draft's logits kept",
    ),
    ("and the assistant's states, both", {"state_position": "both"}, "the same and one draft forward"),
)


#: Shares of the important mismatches that are to be rejected.
RECALLS = (0.9, 0.7)


def weights_of(example_ids: np.ndarray, num_samples: int = 500) -> np.ndarray:
    """How often each mismatch counts if examples are drawn with replacement, one row a sample."""
    examples, example_of_row = np.unique(example_ids, return_inverse=True)
    n = len(examples)
    return np.random.default_rng(0).multinomial(n, [1 / n] * n, size=num_samples)[:, example_of_row]


def auc_samples(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """ROC-AUC for each row of `weights`, how often each mismatch counts."""
    order = np.argsort(scores, kind="stable")
    important = (weights * labels)[:, order]
    harmless = (weights * (1 - labels))[:, order]
    below = harmless.cumsum(axis=1)
    return (important * below).sum(axis=1) / (important.sum(axis=1) * harmless.sum(axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", required=True, help="mined mismatches, a file or a miner's folder")
    parser.add_argument("--max_examples", type=positive_int, help="use fewer")
    parser.add_argument("--judge_types", nargs="+", default=["linear"], help="linear, mlp")
    parser.add_argument("--C_grid", type=float, nargs="+", default=[1.0, 0.1, 0.01, 0.001])
    parser.add_argument("--max_iter", type=positive_int, default=2000)
    args = parser.parse_args()

    from autojudge_hf import JudgeTrainer, JudgeTrainingArguments, select_features
    from autojudge_hf.fitting import roc_auc
    from autojudge_hf.mined_examples import read_mismatches
    from autojudge_hf.mined_rows import pair_of

    mined = read_mismatches(args.data)
    features = pair_of(mined)["features"] or {}
    needed = {
        'state_position="both"': features.get("state_position") == "both",
        "assistant_states=True": features.get("assistant_hidden_size") is not None,
        "logit_features=True": features.get("logit_features"),
        "assistant_logit_features=True": features.get("assistant_logit_features"),
    }
    if missing := [argument for argument, is_there in needed.items() if not is_there]:
        parser.error(
            f"--data lacks features that are compared here: mine it with {', '.join(missing)} as well, or find all of "
            "them with `compute_features`."
        )
    if args.max_examples is not None:
        mined = mined.select(np.flatnonzero(np.asarray(mined["example_id"]) < args.max_examples))
    header = ["judge", "reads", "floats", "costs", "ROC-AUC", "gain over the paper's"]
    header += [f"harmless accepted at recall {recall:.0%}" for recall in RECALLS]
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for judge_type in args.judge_types:
        options = {"judge_type": judge_type, "C_grid": args.C_grid, "max_iter": args.max_iter}
        papers = None
        for name, layout, cost in ROWS:
            trainer = JudgeTrainer(JudgeTrainingArguments("unused", **options), select_features(mined, **layout))
            labels = np.asarray(trainer.train_dataset["label"])
            scores = max(trainer.cross_validate(), key=lambda s: roc_auc(labels, s))
            samples = auc_samples(labels, scores, weights_of(np.asarray(trainer.train_dataset["example_id"])))
            papers = samples if papers is None else papers
            gain, (low, high) = np.mean(samples - papers), np.quantile(samples - papers, [0.025, 0.975])
            cells = [judge_type, name, str(trainer.judge.config.num_features), cost, f"{roc_auc(labels, scores):.4f}"]
            cells.append(f"{gain:+.4f} [{low:+.4f}, {high:+.4f}]")
            for recall in RECALLS:
                threshold = np.quantile(scores[labels == 1], 1 - recall)
                cells.append(f"{np.mean(scores[labels == 0] < threshold):.0%}")
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\n{len(labels)} mismatches, {labels.mean():.1%} important")


if __name__ == "__main__":
    main()
