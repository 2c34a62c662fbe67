# SPDX-License-Identifier: Apache-2.0
"""Cards: what the Hub reads in them, what people read in them, and what a config can't smuggle into them."""

import copy
import json
import struct

import pytest
import torch
from conftest import ROOT
from huggingface_hub import DatasetCard, ModelCard
from matplotlib.figure import Figure
from test_trainer import made_up

from autojudge_hf import AutoJudge, JudgeConfig, JudgeTrainer, JudgeTrainingArguments, evaluation_summary
from autojudge_hf.dataset_card import render_dataset_card
from autojudge_hf.model_card import JudgeCard
from autojudge_hf.plots import digest, plot_trade_off


MODELS = {
    "base_model_name_or_path": "org/target",
    "base_model_revision": "abc123",
    "assistant_model_name_or_path": "org/draft",
}


def measured(threshold, correct, tokens_per_cycle, tokens_per_second):
    """A row as `evaluate_judge` returns it."""
    return {
        "threshold": threshold,
        "accuracy": sum(correct) / len(correct),
        "tokens_per_cycle": tokens_per_cycle,
        "tokens_per_second": tokens_per_second,
        "mean_response_length": 100.25,
        "correct": correct,
        "texts": ["never in a card"] * len(correct),
    }


ROWS = [
    measured(None, [True] * 90 + [False] * 10, 9.0, 200.0),
    measured(0.05, [True] * 89 + [False] * 11, 11.5, 250.0),
    measured(0.2, [False] * 4 + [True] * 90 + [False] * 6, 13.0, 300.0),
]


EVALUATION = evaluation_summary(ROWS, dataset="openai/gsm8k", split="test", num_assistant_tokens=16)


@pytest.fixture
def config():
    evaluation = copy.deepcopy(EVALUATION)
    return JudgeConfig(
        hidden_size=4,
        threshold=0.05,
        task="gsm8k",
        dataset="openai/gsm8k",
        license="apache-2.0",
        evaluation=evaluation,
        **MODELS,
    )


def judge_of(config):
    judge = AutoJudge.from_config(config)
    judge.load_state_dict({"weight": torch.ones(4), "bias": torch.zeros(1)})
    return judge


def test_summary_by_hand(config):
    lossless, first, second = config.evaluation
    assert (lossless["threshold"], lossless["drop"], lossless["drop_low"], lossless["drop_high"]) == (None, 0, 0, 0)
    assert first["drop"] == pytest.approx(0.01) and first["speedup"] == 1.25 and second["speedup"] == 1.5
    # The second gets 4 wrong that lossless has right, and 4 right that it has wrong: no drop, an interval around it.
    assert second["drop"] == 0 and second["drop_low"] == pytest.approx(-second["drop_high"], abs=0.02)
    assert 0.03 < second["drop_high"] < 0.08 and first["drop_low"] == 0.0
    assert all(row["num_examples"] == 100 and row["dataset"] == "openai/gsm8k" for row in config.evaluation)


def test_the_hub_reads_the_stored_numbers(config, tmp_path):
    judge_of(config).save_pretrained(tmp_path / "my-judge")
    data = ModelCard.load(tmp_path / "my-judge" / "README.md").data
    assert data.library_name == "autojudge_hf" and data.license == "apache-2.0" and "autojudge" in data.tags
    assert data.base_model == ["org/target", "org/draft"] and data.base_model_relation == "adapter"
    assert data.datasets == ["openai/gsm8k"] and data.model_name == "my-judge"
    assert data.eval_results == JudgeCard(config, "my-judge").eval_results()
    read_back = {(result.metric_args.get("threshold"), result.metric_type): result for result in data.eval_results}
    assert len(read_back) == 6
    for row in config.evaluation:
        for metric in ("accuracy", "tokens_per_cycle"):
            result = read_back[row["threshold"], metric]
            assert result.metric_value == row[metric] and result.metric_args["num_examples"] == 100
            assert (result.dataset_type, result.dataset_split) == ("openai/gsm8k", "test")


def test_a_card_survives_loading_and_saving(config, tmp_path):
    judge_of(config).save_pretrained(tmp_path / "a" / "judge")
    AutoJudge.from_pretrained(tmp_path / "a" / "judge").save_pretrained(tmp_path / "b" / "judge")
    card = (tmp_path / "a" / "judge" / "README.md").read_text()
    assert card == (tmp_path / "b" / "judge" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "| lossless | 90.0 % | - | 9.00 | 1.00 | 100.2 |" in card
    assert "| threshold 0.05 (its own) | 89.0 % | 1.0 [0.0, 3.0] | 11.50 | 1.25 | 100.2 |" in card
    assert "org/target at abc123" in card and "![Accuracy" in card and 'from_pretrained("judge")' in card


def test_what_was_not_timed_has_no_speed(config):
    config.evaluation = [{**row, "speedup": None} for row in config.evaluation]
    card = JudgeCard(config, "judge").render()
    assert "| threshold 0.05 (its own) | 89.0 % | 1.0 [0.0, 3.0] | 11.50 | - | 100.2 |" in card


def test_thresholds_by_name_are_told(config):
    nameless = JudgeCard(config, "judge").render()
    assert "by name" not in nameless and "Each name" not in nameless
    config.thresholds = {"1 point": 0.05, "5 points": 0.2}
    card = JudgeCard(config, "judge").render()
    assert "| Thresholds by name | 1 point: 0.05, 5 points: 0.2 |" in card and "Each name stands for" in card


def test_a_judge_mined_under_sampling_is_shown_with_it(config):
    assert "greedy text" in JudgeCard(config, "judge").render()
    config.decoding_settings |= {"do_sample": True, "temperature": 0.7}
    card = JudgeCard(config, "judge").render()
    assert '"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.0}' in card and "greedy text" not in card


def test_collections_say_the_subfolder(config):
    card = JudgeCard(config, "user/judges", "gsm8k").render()
    assert 'from_pretrained("user/judges", subfolder="gsm8k")' in card
    assert 'custom_generate="user' not in card and "custom_generate=decode" in card


def test_names_that_no_hub_has_stay_out_of_the_metadata():
    for judge_type in ("top_k", "rule", "margin", "entropy", "kl"):
        card = JudgeCard(JudgeConfig(judge_type=judge_type), "folder").render()
        data = ModelCard(card).data
        assert data.base_model is None and data.datasets is None and data.eval_results is None
        assert "needs no training" in card and "gains and costs" not in card
    local = JudgeConfig(hidden_size=4, base_model_name_or_path="/home/someone/target", dataset="/home/someone/x.jsonl")
    card = JudgeCard(local, "folder").render()
    assert ModelCard(card).data.base_model is None and "| Target | target |" in card and "/home" not in card


def test_a_config_cannot_write_the_card(config):
    """Names with Markdown, HTML and YAML in them change no line but their own."""
    bad = '# x\n# Click [here](http://evil)\n---\nlicense: mit\n<script>| a | `"b"` {{ 7 * 7 }}'
    config.task = config.dataset = config.base_model_name_or_path = bad
    config.training, config.thresholds = {bad: bad}, {bad: 0.5}
    config.evaluation = [{**row, "dataset": bad, "split": bad} for row in config.evaluation]
    card = ModelCard(JudgeCard(config, bad).render())
    assert card.data.license == "apache-2.0" and card.data.datasets is None and card.data.base_model == ["org/draft"]
    assert "<script>" not in card.text and "](http://evil)" not in card.text and "\n---" not in card.text
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    assert len(headings) == 5 and "49" not in card.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("evaluation", {"a": 1}),
        ("evaluation", [{"threshold": 0.1}]),
        ("evaluation", ["accuracy"]),
        ("evaluation", [{**EVALUATION[1]}]),
        ("evaluation", [EVALUATION[0], EVALUATION[0]]),
        ("evaluation", [{**EVALUATION[0], "accuracy": 1e308}]),
        ("decoding_settings", {"custom_generate": "user/evil"}),
        ("decoding_settings", {"temperature": [[0.5]]}),
        ("training", {"AUC": float("nan")}),
        ("training", {"AUC": [0.5]}),
        ("license", 3),
        ("dataset", ["a"]),
    ],
)
def test_figures_are_checked(field, value):
    with pytest.raises(ValueError, match=field):
        JudgeConfig(hidden_size=4, **{field: value})


def description(png):
    """The "Description" of a PNG file."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at = 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        if kind == b"tEXt" and body.startswith(b"Description\0"):
            return body.split(b"\0", 1)[1].decode()
        at += 12 + length
    raise AssertionError("no description")


def test_the_picture_shows_these_numbers(config, tmp_path):
    judge_of(config).save_pretrained(tmp_path)
    drawn = description((tmp_path / "trade_off.png").read_bytes())
    assert drawn == digest(JudgeCard(config, "x").curves())
    config.evaluation[1]["accuracy"] += 0.01
    assert drawn != digest(JudgeCard(config, "x").curves())
    # One that was never evaluated has none, in the same folder either.
    config.evaluation = []
    judge_of(config).save_pretrained(tmp_path)
    assert not (tmp_path / "trade_off.png").exists()


def test_labels_of_a_picture_never_cover_each_other(tmp_path, monkeypatch):
    """Of crowded points the first is labelled; one without a threshold is a point, and has no label."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    rows = [EVALUATION[0]]
    rows += [{**EVALUATION[1], "threshold": t, "tokens_per_cycle": 12 + t / 10} for t in (0.1, 0.2, 0.3)]
    rows += [{**EVALUATION[1], "threshold": 0.9, "tokens_per_cycle": 14.0}]
    oracle = [EVALUATION[0], {**EVALUATION[0], "tokens_per_cycle": 16.0}]
    plot_trade_off({"judge": rows, "oracle": oracle}, tmp_path / "plot.png")
    (figure,) = figures
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.texts if label.get_visible()] == ["0.1", "0.9"]
    assert [len(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"] == [5, 2]


def test_stored_cards_are_fresh(tmp_path):
    """hub_cards/ holds what `python hub_cards/render.py` makes of the configs there."""
    folders = [path.parent for path in (ROOT / "hub_cards").glob("*/config.json")]
    assert folders
    for folder in folders:
        config = JudgeConfig.from_dict(json.loads((folder / "config.json").read_text()))
        AutoJudge.from_config(config).save_card(tmp_path, f"user/{folder.name}")
        assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text(), folder.name
        assert description((folder / "trade_off.png").read_bytes()) == digest(JudgeCard(config, "x").curves())
        assert len(config.evaluation) >= 3 and config.training
        assert config.threshold in [row["threshold"] for row in config.evaluation]


def test_what_could_not_be_loaded_is_not_saved(config, tmp_path):
    judge = judge_of(config)
    judge.config.evaluation = evaluation_summary(
        [ROWS[0], {**ROWS[1], "threshold": 0}, {**ROWS[2], "threshold": 1}], dataset="a$b^c", split="test"
    )
    judge.save_pretrained(tmp_path / "judge")
    assert AutoJudge.from_pretrained(tmp_path / "judge").config == judge.config
    judge.config.threshold = 5
    with pytest.raises(ValueError, match="threshold"):
        judge.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="Train the judge first"):
        AutoJudge.from_config(config).save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="lossless"):
        evaluation_summary(ROWS[1:], dataset="a", split="test")


def test_trainer_describes_the_fit(tmp_path):
    trainer = JudgeTrainer(JudgeTrainingArguments(output_dir=str(tmp_path / "judge"), C_grid=[0.1]), made_up())
    trainer.train()
    trainer.create_model_card(license="mit", dataset="org/problems")
    card = ModelCard.load(tmp_path / "judge" / "README.md")
    assert card.data.license == "mit" and card.data.datasets == ["org/problems"]
    assert f"| Validation ROC-AUC | {trainer.state.best_metric:.4g}" in card.text and "| C | 0.1 |" in card.text
    trainer.save_model()
    assert ModelCard.load(tmp_path / "judge" / "README.md").data.license == "mit"


def test_dataset_card():
    mined = made_up()
    pair = json.loads(mined["pair"][0])
    card = DatasetCard(render_dataset_card(mined, pair, "user/mined", license="mit", dataset="org/problems"))
    assert card.data.license == "mit" and card.data.source_datasets == ["org/problems"]
    assert card.data.configs[0]["data_files"] == "mismatches.parquet"
    assert f"| Mismatches | {len(mined)} |" in card.text and 'load_dataset("user/mined"' in card.text
    share = sum(mined["label"]) / len(mined)
    assert f"| Important | {share:.1%} |" in card.text and "compute_features" not in card.text
    pair["features"] = None
    tokens_only = render_dataset_card(mined, pair, "user/mined", license=None, dataset=None)
    assert "mined = compute_features(mined, model)" in tokens_only
