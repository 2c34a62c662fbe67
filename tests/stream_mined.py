# SPDX-License-Identifier: Apache-2.0
"""Writes wide features as mining does, reads them back, and says what memory that took.

    python tests/stream_mined.py --num_rows 145729 --width 6144

The defaults are the paper's numbers: 3.6 GB of float32. Needs three times that on disk.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from autojudge_hf.mined_examples import MinedExample, MinedExamples


ROWS_PER_EXAMPLE = 20


def allocated():
    """Memory in MB that the process itself holds; pages of files that the system maps for it don't count."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) // 1024


def stream(num_rows, width):
    """Returns whether all rows came back, and the most memory that was allocated on the way, in MB."""
    num_examples = -(-num_rows // ROWS_PER_EXAMPLE)
    row = {"prompt_length": 1, "candidate_token_id": 1, "target_token_id": 2, "input_ids": [0]}
    row |= {"candidate_token": "a", "target_token": "b", "label": 0}

    def values(number):
        return np.full(width, number, dtype=np.float32)

    peak = 0
    with tempfile.TemporaryDirectory() as folder:
        pair = {"features_dtype": "float32"}
        store = MinedExamples(f"{folder}/mined", pair, [[i] for i in range(num_examples)], identity={})
        for example in range(num_examples):
            numbers = range(example * ROWS_PER_EXAMPLE, min(num_rows, (example + 1) * ROWS_PER_EXAMPLE))
            rows = [{**row, "example_id": example, "position": n, "features": values(n)} for n in numbers]
            store.save(example, MinedExample(rows))
            peak = max(peak, allocated())
        expected = 0
        for batch in store.dataset(store.finished()).with_format("numpy").iter(batch_size=500):
            numbers = np.arange(expected, expected + len(batch["position"]))
            if not (batch["features"] == numbers[:, None]).all() or not (batch["position"] == numbers).all():
                return False, 0
            expected += len(numbers)
            peak = max(peak, allocated())
        store.close()
    return expected == num_rows, peak


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--num_rows", type=int, default=145_729)
    parser.add_argument("--width", type=int, default=6144)
    args = parser.parse_args()
    started = time.perf_counter()
    same, peak = stream(args.num_rows, args.width)
    print(f"{'same' if same else 'DIFFERENT'} rows, {peak} MB at the peak, {time.perf_counter() - started:.0f} s")
