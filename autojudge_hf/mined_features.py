# SPDX-License-Identifier: Apache-2.0
"""The features of mined mismatches, found again from their tokens."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .configuration import JudgeConfig, public_name
from .features import judge_inputs
from .forward import Pass
from .mined_rows import pair_of
from .model_properties import hidden_size, input_device, keeps_states, of_vocabulary
from .prefixes import prefixes_of
from .supported import check_reads_text


if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel


FEATURES_DTYPES = ("float32", "float16")
LAYOUT = ("state_position", "hidden_size", "assistant_hidden_size", "logit_features", "assistant_logit_features")


def compute_features(
    dataset: datasets.Dataset,
    model: PreTrainedModel,
    assistant_model: PreTrainedModel | None = None,
    *,
    state_position: str = "candidate",
    assistant_states: bool | None = None,
    logit_features: bool = False,
    assistant_logit_features: bool = False,
    features_dtype: str = "float32",
) -> datasets.Dataset:
    """Computes the features of mined mismatches from their tokens: for rows that have none, or to try others.

    An example's harmless mismatches are all in its last response, so that one pass serves them; the important ones
    run as one batch behind what they share with it (one by one, if the model keeps states).

    Args:
        dataset (`datasets.Dataset`): what `mine_mismatches` returned, whole examples in their order.
        model (`PreTrainedModel`): the target it was mined with.
        assistant_model (`PreTrainedModel`, *optional*): the assistant, for what is read of it.
        assistant_states (`bool`, *optional*): as in `mine_mismatches`; by default, whenever there is an assistant.
        state_position, logit_features, assistant_logit_features, features_dtype: as in `mine_mismatches`.

    Returns:
        `datasets.Dataset`: the same rows with these `features`, and a `pair` that says so.

    Raises:
        ValueError: for rows of several minings, or of other models; for features of an assistant that has none.
    """
    if assistant_states is None:
        assistant_states = assistant_model is not None
    if assistant_states or assistant_logit_features:
        check_reads_text(assistant_model)
    if features_dtype not in FEATURES_DTYPES:
        raise ValueError(f"`features_dtype` must be one of {list(FEATURES_DTYPES)}, got {features_dtype!r}.")
    pair = pair_of(dataset)
    given = {"target": model} if assistant_model is None else {"target": model, "assistant": assistant_model}
    for role, its_model in given.items():
        mined, now = pair[role], described(its_model)
        if _is_copy(now["name"], mined["name"]):
            now |= {"name": mined["name"], "revision": mined["revision"]}
        if any(mined[name] != now[name] for name in ("name", "hidden_size")):
            raise ValueError(
                f"The rows were mined with the {role} {mined['name']} of width {mined['hidden_size']}, got "
                f"{now['name']} of width {now['hidden_size']}. Pass the pair that was mined."
            )
        pair[role] = now
    read = [model, assistant_model] if assistant_states or assistant_logit_features else [model]
    assistant = assistant_model if assistant_states else None
    layout = feature_layout(state_position, model, assistant, logit_features, assistant_logit_features)
    pair["features"] = described_layout(layout)
    pair["features_dtype"] = features_dtype
    temperature = pair["decoding_settings"]["temperature"]
    tokens = dataset.remove_columns(["features", "pair"]).to_list()
    features: list[np.ndarray] = []
    examples = [list(group) for _, group in itertools.groupby(tokens, key=lambda row: row["example_id"])]
    for example in tqdm(examples, desc="features", unit="problem"):
        # Each row's last two positions: the token before the candidate, and the candidate.
        seen = [_last_two_positions(its_model, example) for its_model in read]
        states = [torch.stack([row.states for row in passes]) for passes in seen]
        logits = [
            torch.stack([row.logits for row in passes]).to(input_device(model), torch.float32) for passes in seen
        ]
        logits = [of_model / temperature for of_model in logits]
        inputs = judge_inputs(
            torch.tensor([[row["candidate_token_id"]] for row in example], device=input_device(model)),
            logits[0],
            states[0],
            states[1] if assistant_states else None,
            of_vocabulary(logits[1][:, :1], logits[0].shape[-1]) if assistant_logit_features else None,
            layout,
        )
        features += list(inputs.features[:, 0].cpu().numpy())
    return _with_features(dataset, features, pair, features_dtype)


def _last_two_positions(model: PreTrainedModel, rows: list[dict[str, Any]]) -> list[Pass]:
    """For each row of an example, logits `(2, v)` and states `(2, h)` at its candidate and the token before."""
    texts = [[*row["input_ids"], row["candidate_token_id"]] for row in rows]
    last, start = texts[-1], rows[0]["prompt_length"] - 1
    prefixes = prefixes_of(model)
    shared = -1  # no row's number
    outputs = prefixes.run({shared: last}, num_last=len(last) - start, output_states=True)
    found = {}
    for n, text in enumerate(texts):
        if text == last[: len(text)]:
            at = slice(len(text) - 2 - len(last), (len(text) - len(last)) or None)
            found[n] = Pass(outputs.logits[0, at], outputs.states[0, at], None)
    others = [n for n in range(len(texts)) if n not in found]
    # A model that keeps states reads one text after the other, and has no use for what it has read.
    size = 1 if keeps_states(model) else max(1, len(others))
    for start in range(0, len(others), size):
        group = others[start : start + size]
        for n in group:
            prefixes.share(shared, n)
        outputs = prefixes.run({n: texts[n] for n in group}, num_last=2, output_states=True)
        for n, logits, states in zip(group, outputs.logits[:, -2:], outputs.states[:, -2:]):
            found[n] = Pass(logits, states, None)
            prefixes.forget(n)
    return [found[n] for n in range(len(texts))]


def select_features(dataset: datasets.Dataset, **layout: Any) -> datasets.Dataset:
    """Keeps some of the features that were mined, for a judge that reads less; no model runs.

    Args:
        dataset (`datasets.Dataset`): mined mismatches.
        layout: what to change in the layout of their features, in the words of [`JudgeConfig`]: `state_position`,
            `hidden_size=None` (no states of the target), `assistant_hidden_size=None`, `logit_features=False`,
            `assistant_logit_features=False`.

    Raises:
        ValueError: for features that the rows don't have, and for rows of several minings.

    Example:
        >>> papers = select_features(mined, state_position="candidate", logit_features=False)
    """
    pair = pair_of(dataset)
    if pair["features"] is None:
        raise ValueError("The rows hold tokens only. Give them features first, with `compute_features`.")
    for name, value in layout.items():
        if name not in pair["features"]:
            raise ValueError(f"The layout of features has {sorted(pair['features'])}, and no {name!r}.")
        # Of a width it's all or nothing.
        if value and name.endswith("hidden_size") and value != pair["features"][name]:
            raise ValueError(f"`{name}` was mined as {pair['features'][name]}: leave it, or pass None, got {value!r}.")
    mined = JudgeConfig(**pair["features"])
    wanted = replace(mined, **layout)
    if missing := [name for name in wanted.feature_columns if name not in mined.feature_columns]:
        raise ValueError(
            f"The rows don't have the features {missing}, only {list(mined.feature_columns)}. Mine with them, or find "
            "them with `compute_features`."
        )
    if not wanted.feature_columns:
        raise ValueError(f"Nothing is left of the features with {layout}. Keep states or logits.")
    pair["features"] = described_layout(wanted)
    kept = [mined.feature_columns[name] for name in wanted.feature_columns]
    features = dataset.with_format("numpy")["features"][:]
    features = np.concatenate([features[:, at] for at in kept], axis=1)
    return _with_features(dataset, list(features), pair, dataset.features["features"].feature.dtype)


def _with_features(
    dataset: datasets.Dataset, features: list[np.ndarray], pair: dict[str, Any], dtype: str
) -> datasets.Dataset:
    """The same rows, and whatever other columns they have, with these features."""
    import datasets

    dataset, text = dataset.remove_columns(["features", "pair"]), datasets.Value("string")
    features = [row.astype(dtype) for row in features]
    dataset = dataset.add_column("features", features, feature=datasets.List(datasets.Value(dtype)))
    return dataset.add_column("pair", [json.dumps(pair, sort_keys=True)] * len(dataset), feature=text)


def feature_layout(
    state_position: str,
    model: PreTrainedModel,
    assistant_model: PreTrainedModel | None,
    logit_features: bool,
    assistant_logit_features: bool,
) -> JudgeConfig:
    """Which features a mismatch gets: those that a judge of this config reads."""
    return JudgeConfig(
        state_position=state_position,
        hidden_size=hidden_size(model),
        assistant_hidden_size=None if assistant_model is None else hidden_size(assistant_model),
        logit_features=logit_features,
        assistant_logit_features=assistant_logit_features,
    )


def described_layout(config: JudgeConfig) -> dict[str, Any]:
    """The part of a judge's config that says which features it reads, for `pair`."""
    return {name: getattr(config, name) for name in LAYOUT}


def _is_copy(name: str | None, hub_id: str | None) -> bool:
    """Whether a model from a folder may be that of the Hub: a local copy of "user/model" is called "model"."""
    return bool(name and hub_id) and "/" not in name and hub_id.rsplit("/", 1)[-1] == name


def described(model: PreTrainedModel) -> dict[str, Any]:
    """What a judge has to know of a model that its data come from."""
    name = model.config.name_or_path
    return {
        # A relative path could pass for the Hub id of a stranger's model.
        "name": public_name(str(Path(name).resolve()) if name and Path(name).is_dir() else name),
        "revision": getattr(model.config, "_commit_hash", None),
        "hidden_size": hidden_size(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
