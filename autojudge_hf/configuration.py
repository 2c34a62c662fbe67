# SPDX-License-Identifier: Apache-2.0
"""`JudgeConfig`: everything about a judge that isn't a weight."""

from __future__ import annotations

import itertools
import json
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePath
from types import MappingProxyType, NoneType
from typing import Any

from .version import __version__


STATE_POSITIONS = ("candidate", "previous", "both")
# What verification knows of a candidate besides the states: see `features.logit_features`.
LOGIT_FEATURES = ("log_probability", "gap_to_best", "log_rank", "entropy")
# And what the distribution it was drafted from adds: see `features.assistant_logit_features`.
ASSISTANT_LOGIT_FEATURES = ("assistant_log_probability", "kl")
#: The types of judges that are trained.
LEARNED = ("linear", "mlp")
DEFAULT_THRESHOLDS = {
    "linear": 0.5,
    "mlp": 0.5,
    "top_k": 0.6,
    "rule": 0.6,
    "margin": 0.9,
    "entropy": 0.91,
    "kl": 0.5,
}

# How a response was decoded, as far as it changes which candidates are mismatches, with the values of plain greedy
# decoding. A judge records the settings it was mined under; decoding compares its own with them.
GREEDY_SETTINGS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}
STRINGS = (
    "judge_type",
    "base_model_name_or_path",
    "base_model_revision",
    "assistant_model_name_or_path",
    "assistant_model_revision",
    "task",
    "dataset",
    "license",
)
#: What each row of `JudgeConfig.evaluation` has, with the types of the values; `threshold` None is the lossless row,
#: `speedup` None wasn't timed.
EVALUATION_COLUMNS: dict[str, tuple[type, ...]] = {
    "dataset": (str,),
    "split": (str,),
    "num_examples": (int,),
    "num_assistant_tokens": (int, str, NoneType),
    "threshold": (int, float, NoneType),
    "accuracy": (int, float),
    "drop": (int, float),
    "drop_low": (int, float),
    "drop_high": (int, float),
    "tokens_per_cycle": (int, float),
    "speedup": (int, float, NoneType),
    "mean_response_length": (int, float),
}
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def decoding_settings(generation_config: Any) -> dict[str, Any]:
    """The part of a `GenerationConfig` that decides which candidates are mismatches.

    What only matters for sampling is neutral under greedy decoding, and a value of `None` means "off".
    """
    settings = {}
    for name, neutral in GREEDY_SETTINGS.items():
        value = getattr(generation_config, name, None)
        settings[name] = neutral if value is None else value
    if not settings["do_sample"]:
        settings.update({name: GREEDY_SETTINGS[name] for name in _SAMPLING_ONLY})
    return settings


def public_name(name_or_path: str | None) -> str | None:
    """A model's Hub id, or the last part of a local path: no machine's folders are written into a judge."""
    if not name_or_path:
        return None
    path = PurePath(name_or_path)
    for part, below in itertools.pairwise(path.parts):
        if part.startswith("models--") and below == "snapshots":  # of the Hub's cache, where a folder is a commit
            return "/".join(part.split("--")[1:])
    is_hub_id = not path.is_absolute() and len(path.parts) <= 2 and not name_or_path.startswith((".", "~"))
    return name_or_path if is_hub_id else path.name


@dataclass
class JudgeConfig:
    """Configuration of a judge.

    Args:
        judge_type (`str`, *optional*, defaults to `"linear"`):
            Which judge: a learned one, `"linear"` or `"mlp"`, or one that needs no training: `"top_k"`, `"rule"`,
            `"margin"`, `"entropy"`, `"kl"`.
        hidden_size (`int`, *optional*):
            Width of the target's last hidden state, in floats; `None` if the judge doesn't read it.
        assistant_hidden_size (`int`, *optional*):
            Width of the assistant's last hidden state; `None` (the default) if the judge doesn't read it.
        state_position (`str`, *optional*, defaults to `"candidate"`):
            `"candidate"`: the state that encodes the candidate; `"previous"`: the state that predicted it; `"both"`
            (AutoJudge, arXiv 2504.20039, ablation of the token's position).
        logit_features (`bool`, *optional*, defaults to `False`):
            Whether the judge also reads, from the target's logits at the candidate's position, the candidate's
            log-probability (nats), its distance to the best token's, the logarithm of its rank, and the entropy
            (nats). Costs one softmax over the candidates' positions per cycle.
        assistant_logit_features (`bool`, *optional*, defaults to `False`):
            Whether it reads the assistant's log-probability of the candidate and the KL divergence of the models' two
            distributions (nats), too. Costs another softmax, and keeps the logits of the draft.
        intermediate_size (`int`, *optional*):
            Hidden units of an `"mlp"` judge (32 by default); not for any other.
        important_token_ids (`list[int]`, *optional*):
            Tokens that a `"rule"` judge never gives up or lets in; not for any other.
        threshold (`float`, *optional*):
            A mismatch is accepted when its importance score, in [0, 1], is below. Each judge class
            documents its score. Defaults to 0.5 (linear, mlp, kl), 0.6 (top_k, rule), 0.9 (margin) or 0.91 (entropy).
        thresholds (`dict[str, float]`, *optional*):
            Thresholds by name, for `judge_threshold="1 point"`; [`calibrate_threshold`] names them by what they cost.
        base_model_name_or_path, base_model_revision (`str`, *optional*):
            The target, by Hub id or base name, and its commit.
        assistant_model_name_or_path, assistant_model_revision (`str`, *optional*):
            The assistant, likewise.
        decoding_settings (`dict`, *optional*):
            The settings the mismatches were mined under. Defaults to plain greedy decoding.
        task (`str`, *optional*):
            Name of the task the judge was mined on. A judge doesn't transfer to another one.
        dataset, license (`str`, *optional*):
            Hub id or base name of the problems that were mined, and the judge's licence, for its card.
        training (`dict`, *optional*):
            Figures of the fit, as `JudgeTrainer` records them, for the card.
        evaluation (`list[dict]`, *optional*):
            What decoding at each threshold gave, as `evaluation_summary` puts it: the card's table, plot and metadata.

    Raises:
        ValueError: for a value outside its range or type.
    """

    judge_type: str = "linear"
    hidden_size: int | None = None
    assistant_hidden_size: int | None = None
    state_position: str = "candidate"
    logit_features: bool = False
    assistant_logit_features: bool = False
    intermediate_size: int | None = None
    important_token_ids: list[int] = field(default_factory=list)
    threshold: float | None = None
    thresholds: dict[str, float] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    assistant_model_name_or_path: str | None = None
    assistant_model_revision: str | None = None
    decoding_settings: dict[str, Any] = field(default_factory=lambda: dict(GREEDY_SETTINGS))
    task: str | None = None
    dataset: str | None = None
    license: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.judge_type == "mlp" and self.intermediate_size is None:
            self.intermediate_size = 32
        for name in ("hidden_size", "assistant_hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 < value < 2**31):
                raise ValueError(f"`{name}` must be a positive int, below 2**31, or None, got {value!r:.100}.")
        for name in STRINGS:
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"`{name}` must be a string, got {type(value).__name__}.")
        for name in ("logit_features", "assistant_logit_features"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r:.50}.")
        ids = self.important_token_ids
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise ValueError(f"`important_token_ids` must be a list of token ids, got {ids!r:.100}.")
        for name, owner in (("intermediate_size", "mlp"), ("important_token_ids", "rule")):
            if getattr(self, name) and self.judge_type != owner:
                raise ValueError(
                    f"`{name}` is for {owner!r} judges, and a {self.judge_type!r:.50} one would ignore it."
                )
        if self.num_features and self.judge_type in set(DEFAULT_THRESHOLDS) - set(LEARNED):
            raise ValueError(
                f"Hidden states and logit features are for {list(LEARNED)} judges, and a {self.judge_type!r} one "
                "would ignore them."
            )
        if self.state_position not in STATE_POSITIONS:
            raise ValueError(
                f"`state_position` must be one of {list(STATE_POSITIONS)}, got {self.state_position!r:.50}."
            )
        if self.threshold is None:
            self.threshold = DEFAULT_THRESHOLDS.get(self.judge_type, 0.5)
        self.threshold = checked_threshold(self.threshold, "threshold")
        if not isinstance(self.thresholds, dict) or not all(isinstance(name, str) for name in self.thresholds):
            raise ValueError(f"`thresholds` must be a dict of names and thresholds, got {self.thresholds!r:.100}.")
        self.thresholds = {name: checked_threshold(t, "thresholds") for name, t in self.thresholds.items()}
        if not isinstance(self.decoding_settings, dict) or set(self.decoding_settings) - set(GREEDY_SETTINGS):
            raise ValueError(
                f"`decoding_settings` must be a dict with keys of {sorted(GREEDY_SETTINGS)}, got "
                f"{self.decoding_settings!r:.200}."
            )
        self.decoding_settings = {**GREEDY_SETTINGS, **self.decoding_settings}
        _check_figures(
            self.decoding_settings, "decoding_settings", dict.fromkeys(GREEDY_SETTINGS, (int, float, NoneType))
        )
        _check_figures(self.training, "training")
        _check_evaluation(self.evaluation)
        self.base_model_name_or_path = public_name(self.base_model_name_or_path)
        self.assistant_model_name_or_path = public_name(self.assistant_model_name_or_path)
        self.dataset = public_name(self.dataset)
        self.evaluation = [{**row, "dataset": public_name(row["dataset"]) or "unnamed"} for row in self.evaluation]

    @property
    def feature_columns(self) -> dict[str, slice]:
        """Where each group of the floats lies that a mismatch is judged by, in their order."""
        positions = ("previous", "candidate") if self.state_position == "both" else (self.state_position,)
        widths = {
            **{f"assistant state, {position}": self.assistant_hidden_size or 0 for position in positions},
            **{f"target state, {position}": self.hidden_size or 0 for position in positions},
            "logit features": len(LOGIT_FEATURES) * self.logit_features,
            "assistant logit features": len(ASSISTANT_LOGIT_FEATURES) * self.assistant_logit_features,
        }
        ends = itertools.accumulate(widths.values())
        return {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends) if width}

    @property
    def num_state_features(self) -> int:
        """Floats of hidden states among them, which come first."""
        return max((at.stop for name, at in self.feature_columns.items() if "state" in name), default=0)

    @property
    def num_features(self) -> int:
        """How many floats there are."""
        return max((at.stop for at in self.feature_columns.values()), default=0)

    def threshold_named(self, name: str) -> float:
        """The threshold of that name in `thresholds`.

        Raises:
            ValueError: where there is none.
        """
        if name not in self.thresholds:
            raise ValueError(
                f"`judge_threshold` must be a number in [0, 1] or a name that the judge has for one "
                f"({list(self.thresholds)!s:.200}), got {name!r:.50}. `calibrate_threshold` measures and names them."
            )
        return self.thresholds[name]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "autojudge_hf_version": __version__}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> JudgeConfig:
        if not isinstance(values, dict) or "judge_type" not in values:
            what = (
                f", but a {values['model_type']!r:.50} model's"
                if isinstance(values, dict) and "model_type" in values
                else ""
            )
            raise ValueError(
                f"This config.json isn't a judge's{what}: it has no `judge_type`. Expected a file that a judge's "
                "`save_pretrained` wrote."
            )
        values = dict(values)
        version = values.pop("autojudge_hf_version", __version__)
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"The judge's config has fields that autojudge_hf {__version__} doesn't know: {unknown!s:.200}. It "
                f"was written by version {version!s:.20}: install that one or a newer one."
            )
        return cls(**values)


def _check_figures(figures: Any, name: str, types: Mapping[str, tuple[type, ...]] = MappingProxyType({})) -> None:
    """A `ValueError` unless `figures` maps names to strings, finite numbers or None, and has those in `types`."""
    if not isinstance(figures, dict):
        raise ValueError(f"`{name}` must hold dicts of figures, got {type(figures).__name__}.")
    for key, value in figures.items():
        is_number = isinstance(value, (int, float))
        if not isinstance(value, types.get(key, (str, int, float, NoneType))) or (is_number and not abs(value) < 1e9):
            raise ValueError(f"`{name}` must hold strings and finite numbers, got {key!r:.100}: {value!r:.100}.")
    if missing := sorted(set(types) - set(figures)):
        raise ValueError(f"Each row of `{name}` needs {sorted(types)}; {missing} are missing.")


def _check_evaluation(rows: Any) -> None:
    """A `ValueError` unless every dataset's rows begin with the lossless one, and have no other."""
    if not isinstance(rows, list):
        raise ValueError(f"`evaluation` must be a list of dicts, got {type(rows).__name__}.")
    seen = set()
    for row in rows:
        _check_figures(row, "evaluation", EVALUATION_COLUMNS)
        measured = (row["dataset"], row["split"], row["num_examples"], row["num_assistant_tokens"])
        if (row["threshold"] is None) == (measured in seen):
            raise ValueError(
                "`evaluation` must have one lossless row (`threshold` None) for each dataset, split, number of "
                f"examples and draft length, before the judged ones, as `evaluation_summary` makes it; got {row}."
            )
        seen.add(measured)


def checked_threshold(value: Any, name: str) -> float:
    """`value` as a float in [0, 1]; a `ValueError` that names `name` otherwise."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0.0 <= value <= 1.0:
        raise ValueError(
            f"`{name}` must be a number in [0, 1] (0 accepts no mismatch, 1 all of them), got {value!r:.50}."
        )
    return float(value)
