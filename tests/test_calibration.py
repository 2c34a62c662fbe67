# SPDX-License-Identifier: Apache-2.0
"""Choosing thresholds by the accuracy that they cost."""

import bisect

import numpy as np
import pytest
from scipy.stats import binom

import autojudge_hf.calibration
from autojudge_hf import calibrate_threshold, evaluation_summary
from autojudge_hf.calibration import is_within_budget


def calibrated(monkeypatch, judge, correct, **options):
    """`calibrate_threshold` on made-up results: a list of bools, lossless, then for each threshold, 0.1 first."""

    def rows(*args, thresholds, **kwargs):
        assert thresholds == sorted(thresholds)
        for threshold, row in zip([None, *thresholds], correct):
            figures = {"tokens_per_cycle": 5.0, "tokens_per_second": 9.0, "mean_response_length": 7.0}
            yield {"threshold": threshold, "accuracy": float(np.mean(row)), "correct": row, **figures}

    monkeypatch.setattr(autojudge_hf.calibration, "rows_one_by_one", rows)
    thresholds = [0.1 * n for n in range(1, len(correct))][::-1]  # in any order
    options = {"dataset_name": "made-up", "max_new_tokens": 8, "thresholds": thresholds, **options}
    examples = [None] * len(correct[0])
    return calibrate_threshold(None, None, None, examples, None, judge, **options)


def test_threshold_is_the_last_before_the_first_that_costs_too_much(monkeypatch, top_k, caplog):
    right = [True] * 1000
    costs = [0, 0, 10, 30, 0, 200, 0]  # per mille, of which 30 is above the first budget, and 200 above both
    correct = [[False] * n + right[n:] for n in costs]
    top_k.config.evaluation = []
    rows = calibrated(monkeypatch, top_k, correct, max_drops={"cheap": 0.02, "dear": 0.1})
    assert len(rows) == 6  # the last threshold isn't measured any more
    assert top_k.config.thresholds == pytest.approx({"cheap": 0.2, "dear": 0.4})
    assert top_k.config.threshold == pytest.approx(0.2)
    curve = top_k.config.evaluation
    assert [row["drop"] for row in curve] == pytest.approx([n / 1000 for n in costs[:6]])
    assert {row["split"] for row in curve} == {"validation"}
    # Once more, on fewer problems: the curve is replaced, another split's isn't, and what can't be kept is said.
    of_test = [{**row, "split": "test"} for row in curve]
    top_k.config.evaluation += of_test
    calibrated(monkeypatch, top_k, [right[:50], [False] * 9 + right[:41]], max_drops={"cheap": 0.02})
    assert top_k.config.thresholds == {"cheap": 0.0}
    assert top_k.config.evaluation[:-2] == of_test and len(top_k.config.evaluation) == len(of_test) + 2
    assert "isn't sure to keep to ['cheap']" in caplog.text
    # What would go wrong at the end is told at the beginning.
    of_others = {"threshold": None, "correct": right[:7]}
    for rows, options, message in (
        ([right, right], {"confidence": 0.1}, "confidence"),
        ([right], {}, "at least one of `thresholds`"),
        ([right, right], {"thresholds": 0.1}, "`thresholds` must be a list"),
        ([right, right], {"thresholds": ["10 points", "5 points"]}, "`thresholds` must be a number.*'10 points'"),
        ([right, right], {"max_drops": {0.01: 0.01}}, "`max_drops` must map names"),
        ([right, right], {"max_drops": {"1 point": 1}}, "0.01 for 1 point; got .1."),
        ([right, right], {"max_drops": {"none": 0.0}}, "got .0.0. in `max_drops`.*No sample"),
        ([right, right], {"max_drops": {"1 point": "0.01"}}, "0.01 for 1 point; got .'0.01'."),
        ([right, right], {"dataset_name": None}, "`dataset_name`.*None"),
        ([right, right], {"dataset_name": "/"}, "`dataset_name` must be a name"),
        ([right, right], {"split": 3}, "`split` must be a name.*3"),
        ([right, right], {"lossless": of_others}, "lossless row of these 1000 examples, got one of 7"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrated(monkeypatch, top_k, rows, **options)


def test_too_few_problems_to_be_sure(monkeypatch, top_k, caplog):
    """The number told is the least at which a judge that spoils nothing passes."""
    for n in (380, 381):
        caplog.clear()
        calibrated(monkeypatch, top_k, [[True] * n] * 2, max_drops={"1 point": 0.01, "5 points": 0.05})
        told = f"{n} examples are too few to be 97.5% sure of a budget: it takes {{'1 point': 381}}" in caplog.text
        assert told == (top_k.config.thresholds["1 point"] == 0.0) == (n == 380)


@pytest.mark.parametrize("gained", [0.0, 0.002, 0.01, 0.03])
@pytest.mark.parametrize(("budget", "n"), [(0.01, 400), (0.01, 1000), (0.01, 3000), (0.05, 200), (0.05, 1000)])
def test_how_often_a_drop_of_the_budget_passes(budget, n, gained):
    """Exactly, by adding up the chances of all numbers of answers lost and gained that pass; 2.5 % are promised."""

    def passes(lost, won):
        rest = [True] * (n - lost - won)
        return is_within_budget([True] * lost + [False] * won + rest, [False] * lost + [True] * won + rest, budget)

    chance = 0.0
    for won in range(int(binom.ppf(1 - 1e-6, n, gained)) + 1):
        # The more are lost, the worse: the most that pass tell of all.
        most = bisect.bisect_left(range(n - won), True, key=lambda lost: not passes(lost, won)) - 1
        of_others = (gained + budget) / (1 - gained)
        chance += binom.pmf(won, n, gained) * binom.cdf(most, n - won, of_others)
    assert 0.008 < chance < 0.03  # whole answers: with few of them it can't be met exactly


def test_what_cannot_be_lost_says_nothing_of_a_judge(monkeypatch, top_k, caplog):
    """Where a response is cut off before its answer, say, everything keeps to every budget."""
    few_right = [True] * 20 + [False] * 980
    rows = calibrated(monkeypatch, top_k, [few_right, few_right], max_drops={"1 point": 0.01, "5 points": 0.05})
    assert top_k.config.thresholds == {"1 point": pytest.approx(0.1), "5 points": 0.0} and len(rows) == 2
    assert "2.0% of the answers right, too few to lose ['5 points']" in caplog.text
    rows = calibrated(monkeypatch, top_k, [[False] * 1000] * 2)
    assert set(top_k.config.thresholds.values()) == {0.0} and len(rows) == 1
    assert "0.0% of the answers right, too few to lose ['1 point', '5 points']" in caplog.text
    assert "isn't sure to keep" not in caplog.text


def test_a_local_file_calibrates_twice(monkeypatch, top_k, tmp_path):
    """Its folder is written nowhere, and the second curve takes the place of the first."""
    for _ in range(2):
        calibrated(monkeypatch, top_k, [[True] * 9, [True] * 9], dataset_name=str(tmp_path / "problems.jsonl"))
        top_k.save_pretrained(tmp_path / "judge")
    assert {row["dataset"] for row in top_k.config.evaluation} == {"problems.jsonl"}
    assert str(tmp_path) not in (tmp_path / "judge" / "config.json").read_text()


def test_a_judge_that_could_not_be_saved_is_refused_before_anything_is_decoded(monkeypatch, top_k, tmp_path):
    """Say, with a split's rows twice, by the names of files in two folders, which are written nowhere."""
    rows = calibrated(monkeypatch, top_k, [[True] * 9, [True] * 9])
    for folder in ("a", "b"):
        file = str(tmp_path / folder / "problems.jsonl")
        top_k.config.evaluation += evaluation_summary(
            rows, dataset=file, split="test", num_assistant_tokens=np.int64(8)
        )
    assert [row["dataset"] for row in top_k.config.evaluation[2:]] == ["problems.jsonl"] * 4
    monkeypatch.setattr(autojudge_hf.calibration, "rows_one_by_one", None)
    options = {"dataset_name": "made-up", "max_new_tokens": 8, "thresholds": [0.1]}
    with pytest.raises(ValueError, match="`evaluation` must have one lossless row"):
        calibrate_threshold(None, None, None, [None], None, top_k, **options)
    del top_k.config.evaluation[4:]
    top_k.save_pretrained(tmp_path / "judge")


def test_the_budget_is_kept_as_often_as_promised(monkeypatch, top_k):
    """Eight thresholds, all of which cost exactly a little more than the budget: few samples may let one pass."""
    rng = np.random.default_rng(1)
    passed = 0
    for _ in range(200):
        lossless = rng.random(500) < 0.9
        # A mismatch that is accepted spoils an answer, or mends one.
        correct = [np.where(rng.random(500) < 0.1, rng.random(500) < 0.395, lossless) for _ in range(8)]
        calibrated(monkeypatch, top_k, [lossless, *correct], max_drops={"5 points": 0.05}, confidence=0.9)
        passed += top_k.config.threshold > 0
    assert 5 <= passed <= 32  # a tenth of 200, give or take three standard deviations
