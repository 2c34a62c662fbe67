# SPDX-License-Identifier: Apache-2.0
"""Fits the whole grid of C on made-up rows of the paper's number and width, from Parquet; says what it took.

    python tests/fit_large.py --num_rows 145729 --width 6144

Features are correlated as hidden states are, a tenth of the rows are held out, and a fit that doesn't converge is an
error. Needs twice the features' 3.6 GB on disk.
"""

import argparse
import json
import resource
import tempfile
import time
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.exceptions import ConvergenceWarning

from autojudge_hf import JudgeTrainer, JudgeTrainingArguments
from autojudge_hf.configuration import GREEDY_SETTINGS


ROWS_PER_EXAMPLE, ROWS_PER_FILE, RANK = 20, 8192, 256


def write(folder, num_rows, width, rng):
    """Parquet files of mined rows: directions that vary together, noise, and each feature on a scale of its own."""
    directions = rng.normal(size=(RANK, width)).astype(np.float32)
    scale, offset = (rng.lognormal(size=width).astype(np.float32) for _ in range(2))
    importance = rng.normal(size=RANK) * np.linspace(1, 0, RANK)
    pair = {
        "target": {"name": "target", "revision": None, "hidden_size": width, "dtype": "float32"},
        "assistant": {"name": "draft", "revision": None, "hidden_size": 8, "dtype": "float32"},
        "features": {"state_position": "candidate", "hidden_size": width, "assistant_hidden_size": None},
        "decoding_settings": GREEDY_SETTINGS,
        "task": "made-up",
    }
    for start in range(0, num_rows, ROWS_PER_FILE):
        n = min(ROWS_PER_FILE, num_rows - start)
        hidden = rng.normal(size=(n, RANK)).astype(np.float32) * np.linspace(3, 0.1, RANK, dtype=np.float32)
        features = (hidden @ directions / 16 + rng.normal(size=(n, width)).astype(np.float32)) * scale + offset
        # About a fifth is important, and half of what decides it is chance.
        score = hidden @ importance
        labels = (score / score.std() + rng.normal(size=n) > 1.2).astype(int)
        columns = {
            "example_id": pa.array(np.arange(start, start + n) // ROWS_PER_EXAMPLE),
            "label": pa.array(labels),
            "features": pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), width).cast(
                pa.list_(pa.float32())
            ),
            "pair": pa.array([json.dumps(pair)] * n),
        }
        pq.write_table(pa.table(columns), f"{folder}/rows-{start:07d}.parquet", row_group_size=1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--num_rows", type=int, default=145_729)
    parser.add_argument("--width", type=int, default=6144)
    args = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("error", ConvergenceWarning)
    with tempfile.TemporaryDirectory() as folder:
        write(folder, args.num_rows, args.width, np.random.default_rng(0))
        started = time.perf_counter()
        rows = datasets.Dataset.from_parquet(f"{folder}/*.parquet", cache_dir=f"{folder}/cache")
        trainer = JudgeTrainer(JudgeTrainingArguments(f"{folder}/judge"), rows)
        read = time.perf_counter()
        history = trainer.train().log_history
        trained = time.perf_counter()
    for fit in history[:-1]:
        print(f"C {fit['C']:g}: ROC-AUC {fit['eval_auc']:.4f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{len(rows)} rows of {args.width}, {sum(rows['label']) / len(rows):.1%} important: read in "
        f"{read - started:.0f} s, {len(history) - 1} fits in {trained - read:.0f} s, {peak:.1f} GiB at the peak"
    )


if __name__ == "__main__":
    main()
