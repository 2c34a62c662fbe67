# SPDX-License-Identifier: Apache-2.0
"""Mined mismatches on the Hub: the rows as Parquet, with a card that says where they come from."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import DatasetCard, DatasetCardData

from .configuration import public_name
from .hub import create_repo, push_folder
from .mined_rows import pair_of
from .model_card import TAGS, TEMPLATES, is_hub_id, model_text, plain, settings_text


if TYPE_CHECKING:
    import datasets


def push_mismatches_to_hub(
    mined: datasets.Dataset,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload mismatches",
    license: str | None = None,
    dataset: str | None = None,
) -> str:
    """Uploads mined mismatches and a card that describes them, in one commit. `load_dataset(repo_id)` reads them.

    Args:
        mined (`datasets.Dataset`): rows of one `mine_mismatches`, or of `compute_features`.
        repo_id (`str`): dataset repository, made if there is none.
        private, token, commit_message (*optional*): as in `Judge.push_to_hub`.
        license (`str`, *optional*): licence of the rows, as the Hub names it. The responses are the target's.
        dataset (`str`, *optional*): Hub id of the problems, `"openai/gsm8k"`.

    Returns:
        `str`: the commit's address.

    Raises:
        OSError: where the Hub refuses or can't be reached; the repository stays as it was, a new one empty.
        ValueError: for rows of several minings, or none; and where the Hub finds fault with the card.
    """
    pair = pair_of(mined)
    repo_id = create_repo(repo_id, private=private, token=token, repo_type="dataset")
    card = render_dataset_card(mined, pair, repo_id, license=license, dataset=dataset)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        mined.to_parquet(Path(folder) / "mismatches.parquet")
        return push_folder(Path(folder), repo_id, token=token, commit_message=commit_message, repo_type="dataset")


def render_dataset_card(
    mined: datasets.Dataset, pair: dict[str, Any], repo_id: str, *, license: str | None, dataset: str | None
) -> str:
    """The README.md of mined mismatches; `pair` is what their `pair` column says."""
    features, dataset = pair["features"], public_name(dataset)
    num_problems = len(set(mined.with_format(None)["example_id"][:]))
    facts = {
        "Target": model_text(pair["target"]["name"], pair["target"]["revision"]),
        "Assistant": model_text(pair["assistant"]["name"], pair["assistant"]["revision"]),
        "Task": pair["task"],
        "Problems": f"{num_problems} with a mismatch" + (f", of {dataset}" if dataset else ""),
        "Mismatches": str(len(mined)),
        "Important": f"{mined.with_format('numpy')['label'][:].mean():.1%}",
        "Decoding": settings_text(pair["decoding_settings"]),
        "Features": ", ".join(f"{k} {v}" for k, v in features.items()) if features else "none yet: `compute_features`",
    }
    data = DatasetCardData(
        license=license,
        tags=TAGS,
        source_datasets=[dataset] if is_hub_id(dataset) else None,
        configs=[{"config_name": "default", "data_files": "mismatches.parquet"}],
    )
    return str(
        DatasetCard.from_template(
            data,
            template_str=(TEMPLATES / "mismatches_card.md").read_text(encoding="utf-8"),
            facts={label: plain(value) for label, value in facts.items()},
            repo_id=repo_id,
            has_features=features is not None,
        )
    )
