# SPDX-License-Identifier: Apache-2.0
"""Files that go with a judge's weights: its card, and the code behind `custom_generate="<judge repo>"`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .configuration import JudgeConfig


TEMPLATES = files(__package__) / "templates"


def render_judge_card(config: JudgeConfig, training: Mapping[str, Any] | None = None) -> str:
    """The judge's README.md.

    Args:
        config (`JudgeConfig`): names the pair, the task, the threshold.
        training (`Mapping`, *optional*): figures of the fit, label to value, listed as they are.
    """
    base_models = [name for name in (config.base_model_name_or_path, config.assistant_model_name_or_path) if name]
    data = ModelCardData(
        library_name="autojudge_hf",
        base_model=base_models or None,
        tags=["autojudge", "judge-decoding", "speculative-decoding"],
    )
    rows = {
        "Judge": config.judge_type,
        "Target": config.base_model_name_or_path or "any",
        "Assistant": config.assistant_model_name_or_path or "any",
        "Mined on": config.task or "nothing (training-free)",
        "Threshold": f"{config.threshold:.4g}",
        **(training or {}),
    }
    table = "\n".join(f"| {label} | {value} |" for label, value in rows.items())
    template = (TEMPLATES / "judge_card.md").read_text(encoding="utf-8")
    return str(ModelCard.from_template(data, template_str=template, table=table))


def render_custom_generate(judge_id: str) -> dict[str, str]:
    """File name to content of a judge's `custom_generate` folder.

    Args:
        judge_id (`str`): Hub id or absolute path of the judge. transformers copies the code before it runs it, so
            that the code can't find out where it came from.
    """
    code = (TEMPLATES / "custom_generate.py.txt").read_text(encoding="utf-8")
    return {"generate.py": code.replace("{{ judge_id }}", repr(judge_id)), "requirements.txt": "autojudge_hf\n"}
