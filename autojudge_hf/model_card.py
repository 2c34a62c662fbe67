# SPDX-License-Identifier: Apache-2.0
"""Files that go with a judge's weights: its card, and the code behind `custom_generate="<judge repo>"`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration import GREEDY_SETTINGS, LEARNED, JudgeConfig
from .version import __version__


TEMPLATES = files(__package__) / "templates"
TAGS = ["autojudge", "judge-decoding", "speculative-decoding"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
#: Columns of `JudgeConfig.evaluation` that are results for the Hub's metadata.
METRICS = ("accuracy", "tokens_per_cycle")
METRIC_ARGS = ("num_examples", "num_assistant_tokens", "threshold")


@dataclass
class JudgeCard:
    """A judge's README.md: a function of its config, and of where it lies.

    Args:
        config (`JudgeConfig`): the pair, the task, the threshold, the figures of the fit and of its evaluation.
        judge_id (`str`): what `from_pretrained` gets in the examples: a Hub id, or a folder's name.
        subfolder (`str`, *optional*): where the judge lies in a collection.
        plot_name (`str`, *optional*): file name of the trade-off plot beside the card, if there is one.
    """

    config: JudgeConfig
    judge_id: str
    subfolder: str = ""
    plot_name: str | None = None

    def metadata(self) -> ModelCardData:
        """What the Hub indexes. Names that can't be a Hub id's (a local model) stay out of it."""
        models = (self.config.base_model_name_or_path, self.config.assistant_model_name_or_path)
        base_models = [name for name in models if is_hub_id(name)]
        results = self.eval_results()
        return ModelCardData(
            library_name="autojudge_hf",
            license=self.config.license,
            base_model=base_models or None,
            base_model_relation="adapter" if base_models else None,
            datasets=[self.config.dataset] if is_hub_id(self.config.dataset) else None,
            tags=TAGS,
            model_name=(self.subfolder or self.judge_id).split("/")[-1] if results else None,
            eval_results=results or None,
        )

    def eval_results(self) -> list[EvalResult]:
        """The evaluation as the metadata's `model-index` has it: a result for each row and metric."""
        return [
            EvalResult(
                task_type="text-generation",
                # Shaped like an id, even where the Hub has no such dataset.
                dataset_type=re.sub(r"[^\w./-]+", "-", row["dataset"]),
                dataset_name=row["dataset"],
                dataset_split=row["split"],
                metric_type=metric,
                metric_name=f"{metric.replace('_', ' ')}, {_setting(row)}",
                metric_value=row[metric],
                # Without None, which YAML wouldn't keep.
                metric_args={name: row[name] for name in METRIC_ARGS if row[name] is not None},
            )
            for row in self.config.evaluation
            for metric in METRICS
        ]

    def facts(self) -> dict[str, str]:
        """The card's first table."""
        config = self.config
        named = ", ".join(f"{name}: {threshold:.4g}" for name, threshold in config.thresholds.items())
        return {
            "Judge": f"{config.judge_type}, on {_reads(config)}",
            "Target": model_text(config.base_model_name_or_path, config.base_model_revision),
            "Assistant": model_text(config.assistant_model_name_or_path, config.assistant_model_revision),
            "Mined on": self._mined_on(),
            "Decoding when mined": settings_text(config.decoding_settings),
            "Threshold": f"{config.threshold:.4g}",
            **({"Thresholds by name": named} if named else {}),
            **{label: str(value) for label, value in config.training.items()},
        }

    @property
    def is_learned(self) -> bool:
        return self.config.judge_type in LEARNED

    def _mined_on(self) -> str:
        if not self.is_learned:
            return "nothing: it needs no training"
        return (self.config.task or "an unnamed task") + (
            f", problems of {self.config.dataset}" if self.config.dataset else ""
        )

    def curves(self) -> dict[str, list[dict[str, Any]]]:
        """The evaluation's rows by what they were measured on: a table and a curve each."""
        curves: dict[str, list[dict[str, Any]]] = {}
        for row in self.config.evaluation:
            draft_length = row["num_assistant_tokens"] or "the assistant's"
            name = f"{row['dataset']}, {row['split']}: {row['num_examples']} problems, draft length {draft_length}"
            curves.setdefault(plain(name), []).append({**row, "setting": _setting(row)})
        return curves

    def render(self) -> str:
        return str(
            ModelCard.from_template(
                self.metadata(),
                template_str=(TEMPLATES / "judge_card.md").read_text(encoding="utf-8"),
                facts={plain(label): plain(value) for label, value in self.facts().items()},
                curves=self.curves(),
                config=self.config,
                do_sample=self.config.decoding_settings["do_sample"],
                settings=told_settings(self.config.decoding_settings),
                is_learned=self.is_learned,
                judge_id=plain(self.judge_id),
                subfolder=plain(self.subfolder),
                plot_name=self.plot_name,
            )
        )


def is_hub_id(name: str | None) -> bool:
    return name is not None and HUB_ID.fullmatch(name) is not None


def plain(text: str) -> str:
    """`text` in one line, without what Markdown or a table would take for its own: a config may hold anything."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"[`|<>\[\]\\\"]", "", " ".join(text.split()))


def model_text(name: str | None, revision: str | None) -> str:
    return (name or "any") + (f" at {revision}" if revision else "")


def settings_text(decoding_settings: dict[str, Any]) -> str:
    """What differs from plain greedy decoding."""
    other = {name: value for name, value in decoding_settings.items() if value != GREEDY_SETTINGS.get(name)}
    return ", ".join(f"{name} {value}" for name, value in other.items()) or "greedy"


def told_settings(decoding_settings: dict[str, Any]) -> dict[str, str]:
    """What to pass to `generate`, whatever a model's own config says. Most that say something say these two."""
    always = ("do_sample", "repetition_penalty")
    return {
        plain(name): plain(repr(value))
        for name, value in decoding_settings.items()
        if name in always or value != GREEDY_SETTINGS.get(name)
    }


def render_custom_generate(judge_id: str) -> dict[str, str]:
    """File name to content of a judge's `custom_generate` folder.

    Args:
        judge_id (`str`): Hub id or absolute path of the judge. transformers copies the code before it runs it, so
            that the code can't find out where it came from.
    """
    templates = {"generate.py": "custom_generate.py.txt", "requirements.txt": "custom_generate_requirements.txt"}
    values = {"judge_id": repr(judge_id), "version": __version__}
    texts = {name: (TEMPLATES / template).read_text(encoding="utf-8") for name, template in templates.items()}
    # In one pass: a folder's name may look like a placeholder.
    return {name: re.sub(r"{{ (\w+) }}", lambda found: values[found[1]], text) for name, text in texts.items()}


def _setting(row: dict[str, Any]) -> str:
    return "lossless" if row["threshold"] is None else f"threshold {row['threshold']:.4g}"


def _reads(config: JudgeConfig) -> str:
    """What the scores are made of."""
    owners = {"the target's": config.hidden_size, "the assistant's": config.assistant_hidden_size}
    states = " and ".join(owner for owner, size in owners.items() if size)
    position = {
        "candidate": "of the candidate",
        "previous": "before the candidate",
        "both": "of the candidate and before",
    }
    parts = [f"{states} states {position[config.state_position]}"] if states else []
    if config.logit_features or config.assistant_logit_features or not states:
        reads_both = config.assistant_logit_features or config.judge_type == "kl"
        parts.append("both models' logits" if reads_both else "the target's logits")
    return ", and ".join(parts)
