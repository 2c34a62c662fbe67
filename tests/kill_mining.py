# SPDX-License-Identifier: Apache-2.0
"""Kills a miner at random moments, and compares what the survivors mine with an undisturbed run.

    python tests/kill_mining.py --kills 20

A small random pair, so that starting the process is what takes the time.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def mine(folder, num_examples):
    from conftest import random_llama, similar_model
    from test_mining import mine_random

    model = random_llama(eos_token_id=[30, 31])
    examples = [{"text": f"3 {i % 30} 15 9 {(i * 5) % 32} {i % 11}"} for i in range(num_examples)]
    return mine_random((model, similar_model(model)), examples, output_dir=folder, batch_size=4)


def survives(kills, num_examples, seed=0):
    """Whether the dataset mined through `kills` kills is the undisturbed one; and how many examples each left."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as work:
        folder, left = Path(work) / "mined", []
        for _ in range(kills):
            miner = subprocess.Popen(
                [sys.executable, __file__, "--folder", str(folder), "--num_examples", str(num_examples)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            # It says when it begins; the imports before aren't worth killing.
            miner.stdout.readline()
            time.sleep(rng.uniform(0.0, 2.5))
            miner.kill()
            miner.wait()
            left.append(len(list(folder.glob("example-*.parquet"))))
        rows, undisturbed = (mine(f, num_examples) for f in (folder, None))
        # To rounding, which depends on what else is in a batch.
        same = np.allclose(rows["features"][:], undisturbed["features"][:], atol=1e-4)
        rows, undisturbed = (r.remove_columns("features")[:] for r in (rows, undisturbed))
        return same and rows == undisturbed and len(rows["label"]) > 0, left


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--num_examples", type=int, default=400)
    parser.add_argument("--folder", help="mine into this folder instead: what is killed")
    args = parser.parse_args()
    if args.folder is not None:
        import test_mining  # noqa: F401

        print("mining", flush=True)
        mine(args.folder, args.num_examples)
    else:
        same, left = survives(args.kills, args.num_examples)
        print(f"examples on disk after each kill: {left}")
        print("identical dataset" if same else "DIFFERENT dataset")
        sys.exit(not same)
