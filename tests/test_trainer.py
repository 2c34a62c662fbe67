# SPDX-License-Identifier: Apache-2.0
"""Training: parity with scikit-learn, honest splits, refusals."""

import json

import datasets
import numpy as np
import pytest
import torch

from autojudge_hf import AutoJudge, JudgeTrainer, JudgeTrainingArguments
from autojudge_hf.configuration import GREEDY_SETTINGS


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


def test_saved_judge_equals_scikit_learn(tmp_path):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, held_out = made_up(), made_up(seed=1)
    ours = trainer(tmp_path, train, held_out, C_grid=[0.01])
    ours.train()
    ours.save_model()
    loaded = AutoJudge.from_pretrained(tmp_path / "out")
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    theirs.fit(np.array(train["features"][:], dtype=np.float32), train["label"][:])
    features = np.array(held_out["features"][:], dtype=np.float32)
    expected = theirs.predict_proba(features.astype(np.float64))[:, 1]
    np.testing.assert_allclose(loaded.predict_proba(torch.from_numpy(features)).numpy(), expected, atol=1e-6)


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


def test_learning_curve_leaves_parts_with_one_kind_out(tmp_path):
    rows = made_up(num_examples=20)
    labels = [int(example == 19 or (n % 8 == 0 and example < 10)) for n, example in enumerate(rows["example_id"])]
    rows = rows.remove_columns("label").add_column("label", labels)
    ours = trainer(tmp_path, rows, validation_size=0.3)
    for point in ours.learning_curve(shares=(0.01, 0.1, 1.0)):
        assert 0.0 <= point["eval_auc"] <= 1.0


def test_split_is_by_example(tmp_path):
    ours = trainer(tmp_path, made_up(), validation_size=0.25)
    train, held_out = set(ours.train_dataset["example_id"]), set(ours.eval_dataset["example_id"])
    assert not train & held_out and len(train) == 45 and len(held_out) == 15
    assert len(ours.train_dataset) == 45 * 8
    again = trainer(tmp_path, made_up(), validation_size=0.25)
    assert set(again.eval_dataset["example_id"]) == held_out
    other = trainer(tmp_path, made_up(), validation_size=0.25, seed=1)
    assert set(other.eval_dataset["example_id"]) != held_out


@pytest.mark.parametrize("recall", [0.5, 0.9, 1.0])
def test_threshold_is_the_highest_with_the_recall(tmp_path, recall):
    ours = trainer(tmp_path, made_up(), recall=recall)
    ours.train()
    scores, labels, metrics = ours.predict(ours.eval_dataset, "eval")
    assert metrics["eval_recall"] >= recall
    # One notch higher would miss it.
    higher = np.sort(scores[(labels == 1) & (scores >= metrics["eval_threshold"])])[0]
    assert (scores[labels == 1] > higher).mean() < recall


def test_compute_metrics(tmp_path):
    ours = JudgeTrainer(
        JudgeTrainingArguments(output_dir=str(tmp_path / "out")),
        made_up(),
        compute_metrics=lambda prediction: {"share": float(prediction.label_ids.mean())},
    )
    ours.train()
    assert 0 < ours.evaluate()["eval_share"] < 1


def test_config_and_card_name_the_pair(tmp_path):
    ours = trainer(tmp_path, made_up())
    ours.train()
    ours.save_model()
    config = AutoJudge.from_pretrained(tmp_path / "out").config
    assert (config.base_model_name_or_path, config.base_model_revision) == ("org/target", "t1")
    assert (config.assistant_model_name_or_path, config.task) == ("org/draft", "made-up")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "org/target" in card and f"{ours.state.best_metric:.3f}" in card


def test_refusals(tmp_path, caplog):
    good = made_up()
    cases = [
        (good.remove_columns("features"), r"columns \['features'\]"),
        (datasets.concatenate_datasets([good, made_up(pair={**PAIR, "task": "other"})]), "2 different minings"),
        (good.select([]), "no rows"),
        (made_up(label=np.zeros(480, dtype=int)), "no important"),
        (made_up(label=np.ones(480, dtype=int)), "no unimportant"),
        (good.select(range(3)), "hold no"),
        (made_up(features=np.zeros((480, 8), dtype=np.float32)), r"Expected 16 features.*\[8\]"),
        (made_up(features=np.full((480, 16), np.nan, dtype=np.float32)), "480 of the 480|aren't finite"),
    ]
    for dataset, message in cases:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, dataset)
    with pytest.raises(ValueError, match="2 different minings"):
        trainer(tmp_path, good, made_up(pair={**PAIR, "task": "other"}))
    untrained = trainer(tmp_path, good)
    with pytest.raises(ValueError, match="2 different minings"):
        untrained.predict(made_up(pair={**PAIR, "task": "other"}))
    with pytest.raises(ValueError, match=r"Call `train\(\)` first"):
        untrained.save_model()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep me")
    with pytest.raises(ValueError, match="isn't empty.*overwrite_output_dir"):
        trainer(tmp_path, good)
    trainer(tmp_path, good, overwrite_output_dir=True)
    for args, message in (
        ({"recall": 0.0}, "recall"),
        ({"C_grid": []}, "C_grid"),
        ({"class_weight": "heavy"}, "class_weight"),
        ({"validation_size": 1.0}, "validation_size"),
    ):
        with pytest.raises(ValueError, match=message):
            JudgeTrainingArguments(output_dir="x", **args)
    trainer(tmp_path, good, made_up(seed=1), overwrite_output_dir=True)
    assert "example ids are in both" in caplog.text
