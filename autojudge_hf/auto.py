# SPDX-License-Identifier: Apache-2.0
"""`AutoJudge`: loads whichever judge a folder or a Hub repository holds."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .configuration import JudgeConfig
from .hub import commit_of, find_file
from .modeling import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    EntropyJudge,
    Judge,
    KLJudge,
    LinearJudge,
    MarginJudge,
    MLPJudge,
    RuleJudge,
    TopKJudge,
)
from .version import __version__


MAX_CONFIG_SIZE = 2**22  # bytes; most have a few thousand, and a list of a whole vocabulary 3 million
JUDGES: dict[str, type[Judge]] = {
    judge.judge_type: judge
    for judge in (LinearJudge, MLPJudge, TopKJudge, RuleJudge, MarginJudge, EntropyJudge, KLJudge)
}


class AutoJudge:
    """Makes the judge that a config or a saved judge names. Not meant to be instantiated."""

    def __init__(self) -> None:
        raise OSError("Use `AutoJudge.from_pretrained(name_or_folder)` or `AutoJudge.from_config(config)`.")

    @staticmethod
    def from_config(config: JudgeConfig) -> Judge:
        """An untrained judge. A linear one accepts nothing until its weights are set.

        Raises:
            ValueError: for an unknown `judge_type`, or what isn't a config.
        """
        if not isinstance(config, JudgeConfig):
            raise ValueError(
                f"`config` must be a `JudgeConfig`, got {config!r:.50}. `JudgeConfig.from_dict` reads one."
            )
        if config.judge_type not in JUDGES:
            raise ValueError(
                f"Unknown judge_type {config.judge_type!r:.50}; autojudge_hf {__version__} knows {sorted(JUDGES)}. "
                "A newer one may know more."
            )
        return JUDGES[config.judge_type](config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        subfolder: str | None = "",
    ) -> Judge:
        """Loads a judge from a local folder or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder that `save_pretrained` wrote, or a Hub repository such as `"user/judge"`.
            revision, token, cache_dir, local_files_only, subfolder (*optional*):
                As in every `from_pretrained`.

        Raises:
            OSError: where a file is missing or unreadable.
            ValueError: where a file's content isn't a judge's; a tensor that is missing, left over, misshapen or not
                finite is named, all of them at once.
        """
        find = functools.partial(
            find_file,
            pretrained_model_name_or_path,
            subfolder=subfolder or "",
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        path = find(CONFIG_NAME, revision=revision)
        values = _read_json(path)
        # Before the weights: those of something else may have gigabytes. And without memory of its own: a config may
        # claim any width, while what a file holds is bounded by its size.
        with torch.device("meta"):
            judge = cls.from_config(JudgeConfig.from_dict(values))
        # Of the same commit, should another one arrive in between.
        _load_tensors(judge, find(WEIGHTS_NAME, revision=commit_of(path) or revision))
        return judge.eval()


def _read_json(path: Path) -> Any:
    """Raises a `ValueError` for what isn't JSON, or too much of it to be a config."""
    try:
        if path.stat().st_size > MAX_CONFIG_SIZE:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The judge's {CONFIG_NAME} isn't valid JSON: {error}") from None
    except OSError as error:
        raise OSError(f"Can't read the judge's {CONFIG_NAME}: {error.strerror}.") from None


def _load_tensors(judge: Judge, path: Path) -> None:
    """Copies the file's tensors into the judge; every disagreement is collected before anything is loaded."""
    expected: dict[str, Any] = judge.state_dict()
    problems, tensors = [], {}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            problems += [f"missing: {name}" for name in sorted(set(expected) - names)]
            problems += [f"unexpected: {name!r:.100}" for name in sorted(names - set(expected))]
            for name in sorted(names & set(expected)):
                part = file.get_slice(name)
                shape, want = list(part.get_shape()), list(expected[name].shape)
                if shape != want or part.get_dtype() not in ("F32", "F64"):
                    got = f"{part.get_dtype()} of shape {shape}"
                    problems.append(f"{name}: expected F32 or F64 of shape {want}, got {got}")
                    continue
                tensors[name] = file.get_tensor(name).to(expected[name].dtype, copy=True)  # not mapped
                if not torch.isfinite(tensors[name]).all():
                    problems.append(f"{name}: has values that aren't finite")
    except SafetensorError as error:
        raise ValueError(f"The judge's {WEIGHTS_NAME} isn't a valid safetensors file: {error!s:.200}") from None
    except OSError as error:
        raise OSError(f"Can't read the judge's {WEIGHTS_NAME}: {error.strerror}.") from None
    if problems:
        # (A hostile file may have any number.)
        more = [f"and {len(problems) - 1000} more"] if len(problems) > 1000 else []
        listed = "; ".join(problems[:1000] + more)
        raise ValueError(f"The judge's {WEIGHTS_NAME} doesn't fit its {CONFIG_NAME}: {listed}")
    judge.load_state_dict(tensors, assign=True)
