# SPDX-License-Identifier: Apache-2.0
"""Training: parity with scikit-learn, honest splits, refusals."""

import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from autojudge_hf import AutoJudge, JudgeTrainer, JudgeTrainingArguments
from autojudge_hf.configuration import GREEDY_SETTINGS
from autojudge_hf.verification import harmless


PAIR = {
    "target": {"name": "org/target", "revision": "t1", "hidden_size": 16, "dtype": "float32"},
    "assistant": {"name": "org/draft", "revision": "d1", "hidden_size": 8, "dtype": "float32"},
    "features": {"state_position": "candidate", "hidden_size": 16, "assistant_hidden_size": None},
    "decoding_settings": GREEDY_SETTINGS,
    "task": "made-up",
}


def made_up(num_examples=60, seed=0, pair=PAIR, **columns):
    """Rows whose label depends on the features, a few per example; scales and offsets differ by feature."""
    rng = np.random.default_rng(seed)
    n = num_examples * 8
    features = rng.normal(size=(n, 16)) * np.logspace(-2, 2, 16) + np.linspace(-5, 5, 16)
    logits = (features[:, 3] - features[:, 3].mean()) / features[:, 3].std() * 2 - 1.5
    labels = (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(int)
    rows = {
        "example_id": np.repeat(np.arange(num_examples), 8),
        "label": labels,
        "features": features.astype(np.float32),
        "pair": [json.dumps(pair)] * n,
    }
    return datasets.Dataset.from_dict({**rows, **columns})


def trainer(tmp_path, dataset, eval_dataset=None, **args):
    return JudgeTrainer(JudgeTrainingArguments(output_dir=str(tmp_path / "out"), **args), dataset, eval_dataset)


def classifiers(C):
    """scikit-learn's own, by the `judge_type` that should equal them."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    return {
        "linear": LogisticRegression(C=C, max_iter=2000),
        "mlp": MLPClassifier((8,), solver="lbfgs", alpha=1 / C, max_iter=2000, max_fun=10**6, random_state=42),
    }


@pytest.mark.parametrize(("judge_type", "class_weight"), [("linear", None), ("linear", "balanced"), ("mlp", None)])
def test_saved_judge_equals_scikit_learn(tmp_path, judge_type, class_weight):
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, held_out = made_up(), made_up(seed=1)
    options = {"judge_type": judge_type, "class_weight": class_weight, "intermediate_size": 8}
    ours = trainer(tmp_path, train, held_out, C_grid=[0.01], **options)
    ours.train()
    ours.save_model()
    loaded = AutoJudge.from_pretrained(tmp_path / "out")
    assert loaded.judge_type == judge_type
    classifier = classifiers(0.01)[judge_type]
    if class_weight is not None:
        classifier.set_params(class_weight=class_weight)
    theirs = make_pipeline(StandardScaler(), classifier)
    theirs.fit(np.array(train["features"][:], dtype=np.float32), train["label"][:])
    features = np.array(held_out["features"][:], dtype=np.float32)
    # An MLP's optimiser may stop elsewhere on the same plain where the last digits of its inputs differ.
    expected = theirs.predict_proba(features)[:, 1]
    tolerance = 1e-6 if judge_type == "linear" else 1e-2
    np.testing.assert_allclose(loaded.predict_proba(torch.from_numpy(features)).numpy(), expected, atol=tolerance)


def test_cross_validation_equals_a_literal_loop(tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    held_out, grid = made_up(num_examples=5, seed=1), [1.0, 1e-3, 0.1]
    ours = trainer(tmp_path, made_up(), held_out, C_grid=grid, num_folds=4)
    features, labels = ours._train
    groups = np.array(ours.train_dataset["example_id"])
    aucs = []
    for c, scores in zip(grid, ours.cross_validate(4)):
        expected = np.empty(len(labels))
        for fitted, rest in GroupKFold(4).split(features, labels, groups):
            assert not set(groups[fitted]) & set(groups[rest])
            theirs = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000, tol=1e-8))
            theirs.fit(features[fitted].astype(np.float64), labels[fitted])
            expected[rest] = theirs.decision_function(features[rest].astype(np.float64))
        np.testing.assert_allclose(scores, expected, atol=2e-2)
        aucs.append(roc_auc_score(labels, scores))
    history = ours.train().log_history
    assert [row["cross_validated_auc"] for row in history[:-1]] == pytest.approx(aucs, abs=1e-6)
    assert history[-1]["best_C"] == grid[int(np.argmax(aucs))]
    with pytest.raises(ValueError, match="61 folds.*60"):
        ours.cross_validate(61)


def test_an_mlp_learns_what_a_vector_cannot(tmp_path):
    """Exclusive or: nothing for a linear judge, everything for one hidden layer."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(1200, 16)).astype(np.float32) * 3 + 5
    labels = ((features[:, 0] > 5) ^ (features[:, 1] > 5)).astype(int)
    rows = made_up(num_examples=150, features=features, label=labels)
    aucs = {}
    for judge_type in ("linear", "mlp"):
        ours = trainer(tmp_path, rows, judge_type=judge_type, C_grid=[1.0, 0.1], validation_size=0.3)
        aucs[judge_type] = ours.train().best_metric
    assert aucs["linear"] < 0.65 and aucs["mlp"] > 0.9


@pytest.mark.parametrize("judge_type", ["linear", "mlp"])
def test_poor_data_gives_a_warning_and_a_judge(tmp_path, caplog, judge_type):
    constant = np.full((480, 16), 7.0, dtype=np.float32)
    ours = trainer(tmp_path, made_up(features=constant), C_grid=[0.1], judge_type=judge_type)
    ours.train()
    assert "no better than chance" in caplog.text
    ours.save_model()
    scores = AutoJudge.from_pretrained(tmp_path / "out").predict_proba(torch.from_numpy(constant))
    assert scores.isfinite().all() and scores.std() < 1e-6
    caplog.clear()
    # One in a thousand, in training and in validation; one feature of all that never changes.
    rare = made_up(num_examples=500)
    features = np.array(rare["features"][:], dtype=np.float32)
    features[:, 0] = 1e4
    labels = np.zeros(4000, dtype=int)
    labels[[400, 1200, 2000, 3200]] = 1
    features[labels == 1, 3] += 40 * features[:, 3].std()
    rare = made_up(num_examples=500, features=features, label=labels)
    ours = JudgeTrainer(
        JudgeTrainingArguments(output_dir=str(tmp_path / "rare"), judge_type=judge_type, C_grid=[0.1]),
        rare.select(range(2400)),
        rare.select(range(2400, 4000)),
    )
    metrics = ours.train().log_history[-1]
    assert "Only 3 of the 2400 training mismatches" in caplog.text and "Only 1 of the 1600" in caplog.text
    assert metrics["eval_recall"] == 1.0 and metrics["eval_harmless_accepted"] > 0.99


@pytest.mark.slow
def test_saved_judge_equals_scikit_learn_on_mined_features(mined, tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    ours = trainer(tmp_path, mined, validation_size=0.4, C_grid=[0.1])
    ours.train()
    ours.save_model()
    features = np.array(ours.train_dataset["features"][:], dtype=np.float32)
    scaler = StandardScaler().fit(features)
    theirs = LogisticRegression(C=0.1, max_iter=2000).fit(scaler.transform(features), ours.train_dataset["label"][:])
    expected = theirs.predict_proba(scaler.transform(features))[:, 1]
    loaded = AutoJudge.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(loaded.predict_proba(torch.from_numpy(features)).numpy(), expected, atol=1e-6)


def test_best_C_by_validation_auc_and_history(tmp_path):
    from sklearn.metrics import roc_auc_score

    ours = trainer(tmp_path, made_up())
    state = ours.train()
    fits, final = state.log_history[:-1], state.log_history[-1]
    assert [fit["C"] for fit in fits] == [10.0**-i for i in range(8)]
    assert final["eval_auc"] == pytest.approx(max(fit["eval_auc"] for fit in fits))
    output = ours.predict(ours.eval_dataset)
    assert final["eval_auc"] == pytest.approx(roc_auc_score(output.label_ids, output.predictions))


def test_learning_curve_ends_where_training_does(tmp_path):
    ours = trainer(tmp_path, made_up(), validation_size=0.25)
    curve = ours.learning_curve(shares=(0.01, 0.2, 0.6, 1.0))
    assert [point["num_examples"] for point in curve][-3:] == [9, 27, 45]
    assert curve[0]["eval_auc"] < curve[-1]["eval_auc"]
    assert curve[-1]["eval_auc"] == ours.train().best_metric
    assert [point["num_examples"] for point in ours.learning_curve(shares=(0.6, 0.601, 0.602))] == [27]
    with pytest.raises(ValueError, match=r"above 0 and up to 1, got \[0, 2\]"):
        ours.learning_curve(shares=(0, 2, 0.5))


def test_learning_curve_leaves_parts_with_one_kind_out(tmp_path):
    rows = made_up(num_examples=20)
    labels = [example % 2 for example in rows["example_id"]]
    rows = rows.remove_columns("label").add_column("label", labels)
    ours = trainer(tmp_path, rows, validation_size=0.3)
    assert [point["num_examples"] for point in ours.learning_curve(shares=(0.01, 1.0))] == [14]


def test_a_seed_repeats_a_fit(tmp_path):
    weights = []
    for seed in (1, 1, 2):
        ours = trainer(
            tmp_path, made_up(), made_up(seed=1), judge_type="mlp", C_grid=[1.0], seed=seed, intermediate_size=4
        )
        ours.train()
        weights.append(ours.judge.hidden_weight)
    assert torch.equal(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2], atol=1e-3)


def test_features_far_from_zero(tmp_path):
    """The scaler's mean goes into the bias, which must subtract what the weights as stored add up to."""
    rows = made_up()
    features = np.array(rows["features"][:], dtype=np.float32)
    features = (features - features.mean(0)) / features.std(0) + 1e6
    ours = trainer(tmp_path, made_up(features=features.astype(np.float32)), C_grid=[1.0])
    ours.train()
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = ours._train[0].astype(np.float64), ours._train[1]
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x, y)
    scores = ours.judge.decision_function(torch.from_numpy(ours._train[0])).numpy()
    np.testing.assert_allclose(scores, theirs.decision_function(x), atol=2e-3)


def test_folds_with_one_kind_are_refused(tmp_path):
    rows = made_up(num_examples=20)
    labels = [int(example == 0) for example in rows["example_id"]]
    rows = rows.remove_columns("label").add_column("label", labels)
    ours = trainer(tmp_path, rows, made_up(seed=1), num_folds=2)
    with pytest.raises(ValueError, match="in one fold"):
        ours.train()


def test_split_is_by_example(tmp_path):
    ours = trainer(tmp_path, made_up(), validation_size=0.25)
    train, held_out = set(ours.train_dataset["example_id"]), set(ours.eval_dataset["example_id"])
    assert not train & held_out and len(train) == 45 and len(held_out) == 15
    assert len(ours.train_dataset) == 45 * 8
    again = trainer(tmp_path, made_up(), validation_size=0.25)
    assert set(again.eval_dataset["example_id"]) == held_out
    other = trainer(tmp_path, made_up(), validation_size=0.25, seed=1)
    assert set(other.eval_dataset["example_id"]) != held_out
    few = trainer(tmp_path, made_up(num_examples=3), validation_size=0.1)
    assert len(few.eval_dataset) == 8 and len(few.train_dataset) == 16
    few = trainer(tmp_path, made_up(num_examples=3, label=np.arange(24) % 2), validation_size=0.9)
    assert len(few.eval_dataset) == 16 and len(few.train_dataset) == 8


def test_training_again_forgets_what_was_measured_before(tmp_path):
    """Named thresholds and curves are of the weights that they were measured with."""
    ours = trainer(tmp_path, made_up(), made_up(seed=1), C_grid=[1e-3])
    ours.train()
    ours.judge.config.thresholds = {"1 point": 0.4}
    ours.judge.config.evaluation = [{"threshold": None}]
    ours.train()
    assert ours.judge.config.thresholds == {} and ours.judge.config.evaluation == []


@pytest.mark.parametrize("recall", [0.5, 0.9, 1.0])
def test_threshold_is_the_highest_with_the_recall(tmp_path, recall):
    ours = trainer(tmp_path, made_up(), recall=recall)
    ours.train()
    scores, labels, metrics = ours.predict(ours.eval_dataset, "eval")
    assert metrics["eval_recall"] >= recall
    # One notch higher would miss it.
    higher = np.sort(scores[(labels == 1) & (scores >= metrics["eval_threshold"])])[0]
    assert (scores[labels == 1] > higher).mean() < recall
    # Whichever way the comparison rounds.
    logits = ours.judge.decision_function(torch.from_numpy(ours._eval[0][labels == 1]))
    for share in np.linspace(0.01, 1, 100):
        ours.args.recall = share
        assert (~harmless(logits, ours._threshold_by_recall())).double().mean() >= share


def test_compute_metrics(tmp_path):
    ours = JudgeTrainer(
        JudgeTrainingArguments(output_dir=str(tmp_path / "out")),
        made_up(),
        compute_metrics=lambda prediction: {"share": float(prediction.label_ids.mean()), "eval_named": 1.0},
    )
    ours.train()
    metrics = ours.evaluate()
    assert 0 < metrics["eval_share"] < 1 and metrics["eval_named"] == 1.0
    ours.compute_metrics = lambda prediction: None
    with pytest.raises(ValueError, match="must return a dict of figures by name, got None"):
        ours.evaluate()


def test_the_cards_auc_is_the_trainers_own(tmp_path):
    figures = []
    for own in ({}, {"auc": None}, {"auc": np.float32(0.5)}):
        args = JudgeTrainingArguments(output_dir=str(tmp_path / "out"), C_grid=[np.float32(0.1)])
        ours = JudgeTrainer(args, made_up(), compute_metrics=lambda _, own=own: own)
        ours.train()
        ours.judge.save_pretrained(tmp_path / str(len(figures)))
        figures.append(ours.judge.config.training)
    assert figures[0]["Validation ROC-AUC"] > 0.6 and all(other == figures[0] for other in figures)


def test_datasets_of_tensors(tmp_path, caplog):
    """Whose ids are equal by value, not by being the same object."""
    rows = made_up().with_format("torch")
    ours = trainer(tmp_path, rows, rows)
    assert "60 example ids are in both datasets" in caplog.text
    np.testing.assert_array_equal(ours._train[0], trainer(tmp_path, made_up(), made_up())._train[0])
    held_out = trainer(tmp_path, made_up()).eval_dataset["example_id"][:]
    partly = trainer(tmp_path, made_up().with_format("torch", columns=["label"]))
    assert partly.eval_dataset.with_format(None)["example_id"][:] == held_out


def test_rows_of_one_kind_are_scored(tmp_path):
    """With the figures that they allow."""
    ours = trainer(tmp_path, made_up())
    ours.train()
    rows = made_up(seed=1)
    for label, kept in ((0, {"test_threshold", "test_harmless_accepted"}), (1, {"test_threshold", "test_recall"})):
        of_label = rows.filter(lambda row, label=label: row["label"] == label)
        output = ours.predict(of_label)
        assert set(output.metrics) == kept and len(output.predictions) == len(of_label)


def test_config_and_card_name_the_pair(tmp_path):
    ours = trainer(tmp_path, made_up())
    ours.train()
    ours.save_model()
    config = AutoJudge.from_pretrained(tmp_path / "out").config
    assert (config.base_model_name_or_path, config.base_model_revision) == ("org/target", "t1")
    assert (config.assistant_model_name_or_path, config.task) == ("org/draft", "made-up")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "org/target" in card and f"{ours.state.best_metric:.3f}" in card


def test_the_cards_share_is_of_all_rows(tmp_path):
    train, held_out = (made_up(label=(np.arange(480) % n == 0).astype(int)) for n in (8, 2))
    ours = trainer(tmp_path, train, held_out, C_grid=[0.1])
    ours.train()
    assert ours.judge.config.training["Important"] == "31.2%"  # 60 and 240 of 960


def test_refusals(tmp_path, caplog):
    good = made_up()
    cases = [
        (good.remove_columns("features"), r"columns \['features'\]"),
        (datasets.concatenate_datasets([good, made_up(pair={**PAIR, "task": "other"})]), "2 different minings"),
        (good.select([]), "no rows"),
        (made_up(label=np.zeros(480, dtype=int)), "no important"),
        (made_up(label=np.ones(480, dtype=int)), "no unimportant"),
        (good.select(range(3)), "of one example"),
        (made_up(num_examples=2, label=np.repeat([0, 1], 8)), "hold no"),
        (good[:], "must be a `datasets.Dataset`.*got dict"),
        (None, "`train_dataset` must be a `datasets.Dataset`.*got NoneType"),
        (made_up(features=np.zeros((480, 8), dtype=np.float32)), r"Expected 16 features.*\[8\]"),
        (made_up(features=np.full((480, 16), np.nan, dtype=np.float32)), "480 of the 480|aren't finite"),
        (made_up(features=[None] + [[0.0] * 16] * 479), "1 of the .* rows have no features"),
    ]
    for dataset, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, dataset)
    with pytest.raises(ValueError, match=r"2 different minings.*differ in task: \"made-up\" or \"other\"\.$"):
        trainer(tmp_path, good, made_up(pair={**PAIR, "task": "other"}))
    with pytest.raises(ValueError, match="`args` must be `JudgeTrainingArguments`, got Dataset"):
        JudgeTrainer(good, JudgeTrainingArguments(output_dir=str(tmp_path / "out")))
    with pytest.raises(ValueError, match="`compute_metrics` must be a function, got 'acc'"):
        JudgeTrainer(JudgeTrainingArguments(output_dir=str(tmp_path / "out")), good, compute_metrics="acc")
    labels = np.arange(480) % 3
    with pytest.raises(ValueError, match=r"0 \(unimportant\) or 1 \(important\), the .* hold \[2\]"):
        trainer(tmp_path, made_up(label=labels))
    with pytest.raises(ValueError, match=r"the .* hold \[0.7\]"):
        trainer(tmp_path, made_up(label=np.where(labels == 2, 0.7, labels)))
    for grid in ([0.0], [float("nan")], [float("inf")], 0.1, {0.1}, [], ["1"], [None]):
        with pytest.raises(ValueError, match="C_grid"):
            trainer(tmp_path, good, C_grid=grid)
    for wrong in ({"validation_size": "0.1"}, {"validation_size": None}, {"recall": None}):
        with pytest.raises(ValueError, match="must be a share between 0 and 1"):
            trainer(tmp_path, good, **wrong)
    for grid in (range(1, 3), np.logspace(-1, 0, 2)):
        untrained = trainer(tmp_path, good, C_grid=grid, recall=np.float32(0.9), validation_size=np.float32(0.2))
        assert all(type(C) is float for C in untrained.args.C_grid)
    with pytest.raises(ValueError, match="isn't trained yet"):
        untrained.evaluate()
    with pytest.raises(ValueError, match="2 different minings"):
        untrained.predict(made_up(pair={**PAIR, "task": "other"}))
    with pytest.raises(ValueError, match=r"Call `train\(\)` first"):
        untrained.save_model()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mismatches.parquet").touch()
    trainer(tmp_path, good)  # beside what was mined, say
    for precious in ("README.md", "config.json", "model.safetensors", "trade_off.png", "custom_generate"):
        (tmp_path / "out" / precious).write_text("keep me")
        with pytest.raises(ValueError, match=f"saved to already: .*{precious}.*overwrite_output_dir"):
            trainer(tmp_path, good)
        (tmp_path / "out" / precious).unlink()
    (tmp_path / "out" / "config.json").write_text("{}")
    trainer(tmp_path, good, overwrite_output_dir=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`output_dir` must be a folder, got the file file"):
        JudgeTrainer(JudgeTrainingArguments(output_dir=str(tmp_path / "file")), good)
    for args, message in (
        ({"recall": 0.0}, "recall"),
        ({"C_grid": []}, "C_grid"),
        ({"class_weight": "heavy"}, "class_weight"),
        ({"validation_size": 1.0}, "validation_size"),
        ({"judge_type": "top_k"}, "judge_type.*linear.*mlp.*top_k"),
        ({"judge_type": "mlp", "class_weight": "balanced"}, "weigh classes"),
        ({"num_folds": 1}, "num_folds"),
        ({"max_iter": 0}, "max_iter"),
        ({"seed": 1.5}, "seed"),
        ({"intermediate_size": 0}, "intermediate_size"),
    ):
        with pytest.raises(ValueError, match=message):
            JudgeTrainingArguments(output_dir="x", **args)
    trainer(tmp_path, good, made_up(seed=1), overwrite_output_dir=True)
    assert "example ids are in both" in caplog.text


def test_large_fit_in_small():
    """`tests/fit_large.py` at a size that anyone can wait for: the whole grid converges."""
    script = Path(__file__).parent / "fit_large.py"
    command = [sys.executable, str(script), "--num_rows", "4000", "--width", "96"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    aucs = [float(auc) for auc in re.findall(r"ROC-AUC ([\d.]+)", result.stdout)]
    assert len(aucs) == 8 and max(aucs) > 0.6
    assert "4000 rows of 96" in result.stdout
