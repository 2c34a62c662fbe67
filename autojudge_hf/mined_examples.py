# SPDX-License-Identifier: Apache-2.0
"""Mined examples: on disk while mining runs, and as the dataset that comes out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import datasets


SETTINGS_NAME = "settings.json"


class MinedExamples:
    """Finished examples on disk, one Parquet file each, written whole or not at all."""

    def __init__(
        self, output_dir: str | Path | None, pair: dict[str, Any], prompts: list[list[int]], identity: dict[str, Any]
    ):
        self.folder = None if output_dir is None else Path(output_dir)
        self.pair = pair
        self.prompts = prompts
        if self.folder is None:
            return
        settings = json.dumps({**pair, **identity}, indent=2, sort_keys=True)
        path = self.folder / SETTINGS_NAME
        if path.is_file():
            if path.read_text(encoding="utf-8") != settings:
                raise ValueError(
                    f"{self.folder} holds mismatches that were mined under other settings (see its {SETTINGS_NAME}). "
                    f"Expected {settings}. Mine into another folder."
                )
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"`output_dir` {self.folder} exists and wasn't written by mining. Give another folder.")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(settings, encoding="utf-8")

    def save(self, example_id: int, rows: list[dict[str, Any]] | None) -> None:
        if self.folder is None:
            return
        import pyarrow.parquet

        about = {"prompt": self._prompt_hash(example_id), "skipped": str(rows is None)}
        table = to_dataset(rows or [], self.pair).with_format("arrow")[:].replace_schema_metadata(about)
        part = self.folder / f"example-{example_id:06d}.part"
        pyarrow.parquet.write_table(table, part)
        part.rename(part.with_suffix(".parquet"))

    def load(self) -> dict[int, list[dict[str, Any]] | None]:
        """The finished examples among those that the prompts belong to."""
        import pyarrow.parquet

        finished: dict[int, list[dict[str, Any]] | None] = {}
        for path in sorted(self.folder.glob("example-*.parquet")) if self.folder else []:
            example_id = int(path.stem.split("-")[1])
            if example_id >= len(self.prompts):
                continue
            table = pyarrow.parquet.read_table(path)
            about = table.schema.metadata
            if about[b"prompt"].decode() != self._prompt_hash(example_id):
                raise ValueError(
                    f"{path.name} in {self.folder} was mined from another example {example_id}. Mine another dataset "
                    "into another folder."
                )
            finished[example_id] = None if about[b"skipped"] == b"True" else table.to_pylist()
        return finished

    def _prompt_hash(self, example_id: int) -> str:
        return hashlib.sha256(str(self.prompts[example_id]).encode()).hexdigest()


def to_dataset(rows: list[dict[str, Any]], pair: dict[str, Any]) -> datasets.Dataset:
    import datasets

    integer, text = datasets.Value("int64"), datasets.Value("string")
    features = datasets.Features(
        {
            "example_id": integer,
            "input_ids": datasets.List(integer),
            "prompt_length": integer,
            "position": integer,
            "candidate_token_id": integer,
            "target_token_id": integer,
            "candidate_token": text,
            "target_token": text,
            "label": integer,
            "features": datasets.List(datasets.Value("float32")),
            "pair": text,
        }
    )
    constant = json.dumps(pair, sort_keys=True)
    columns = {name: [row[name] for row in rows] for name in features if name != "pair"}
    return datasets.Dataset.from_dict({**columns, "pair": [constant] * len(rows)}, features=features)
