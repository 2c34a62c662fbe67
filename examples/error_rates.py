# SPDX-License-Identifier: Apache-2.0
"""How often calibration lets a judge pass whose true drop is just the budget; exactly, not by simulation.

    python examples/error_rates.py

The chances of all numbers of answers lost are added up, where none are gained: by the score test that
`calibrate_threshold` uses, and by the upper end of a bootstrap interval.
"""

from __future__ import annotations

import argparse

from scipy.stats import binom

from autojudge_hf.calibration import is_within_budget
from autojudge_hf.evaluation import paired_interval


def error_rates(budget: float, n: int) -> tuple[float, float]:
    """Of the score test and of the bootstrap, at 97.5 %."""
    rates = [0.0, 0.0]
    for lost in range(round(n * budget) + 1):  # more of them never pass
        lossless, judged = [True] * n, [False] * lost + [True] * (n - lost)
        passes = is_within_budget(lossless, judged, budget), paired_interval(lossless, judged)[1] <= budget
        rates = [rate + binom.pmf(lost, n, budget) * passed for rate, passed in zip(rates, passes)]
    return tuple(rates)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n", 1)[0]).parse_args()
    print("| budget, problems | score test | bootstrap |\n| --- | --- | --- |")
    for points, n in ((1, 400), (1, 1000), (1, 2000), (5, 200), (5, 1000)):
        score, bootstrap = error_rates(points / 100, n)
        print(f"| {points} {'point' if points == 1 else 'points'}, {n} | {score:.1%} | {bootstrap:.1%} |")


if __name__ == "__main__":
    main()
