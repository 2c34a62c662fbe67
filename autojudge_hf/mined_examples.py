# SPDX-License-Identifier: Apache-2.0
"""Mined examples: on disk while mining runs, and as the dataset that comes out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)
SETTINGS_NAME, LOCK_NAME = "settings.json", ".lock"


@dataclass
class MinedExample:
    """What the search found in one example.

    Attributes:
        rows (`list[dict]`): a row a mismatch, as `mine_mismatches` returns them.
        skipped (`str`): why there are none: the response has no answer, or the task's error. Empty if mined.
    """

    rows: list[dict[str, Any]]
    skipped: str = ""


class MinedExamples:
    """Finished examples on disk, one Parquet file each, written whole or not at all.

    A folder belongs to one run at a time, and to one pair under one group of settings.

    Args:
        output_dir (`str` or `Path`, *optional*): the folder; `None` keeps nothing.
        pair (`dict`): what goes into the column `pair`.
        prompts (`list[list[int]]`): the token ids of all prompts, by example id.
        identity (`dict`): what else has to agree when a run goes on with a folder.
        locks (`bool`, *optional*, defaults to `True`): whether this process takes the folder's lock; of several
            that mine together, one does.

    Raises:
        ValueError: for a folder that isn't empty and wasn't written by mining, or under other settings; or that
            another run is writing to.
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        pair: dict[str, Any],
        prompts: list[list[int]],
        identity: dict[str, Any],
        locks: bool = True,
    ):
        self.folder = None if output_dir is None else Path(output_dir)
        self.pair = pair
        self.prompts = prompts
        if self.folder is None:
            return
        settings = {**pair, **identity}
        path = self.folder / SETTINGS_NAME
        if path.is_file():
            written = json.loads(path.read_text(encoding="utf-8"))
            differences = [
                f"{name}: {written.get(name)} there, {settings.get(name)} now"
                for name in sorted(settings.keys() | written.keys())
                if written.get(name) != settings.get(name)
            ]
            if differences:
                raise ValueError(
                    f"{self.folder} holds mismatches that were mined under other settings: {'; '.join(differences)}. "
                    "Mine into another folder, or under the settings there."
                )
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"`output_dir` {self.folder} exists and wasn't written by mining. Give another folder.")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_whole(path, lambda part: part.write_text(json.dumps(settings, indent=2, sort_keys=True)))
        self._lock = FileLock(self.folder / LOCK_NAME)
        try:
            # The system gives the lock back when a process ends, however it ends.
            if locks:
                self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another process is mining into {self.folder}. Wait for it, or mine into another folder."
            ) from None

    def close(self) -> None:
        """Lets another run have the folder."""
        if self.folder is not None:
            self._lock.release()

    def save(self, example_id: int, example: MinedExample) -> None:
        """Raises an `OSError` that says what to do where the disk is full; what was saved before stays."""
        if self.folder is None:
            return
        import pyarrow.parquet

        about = {"prompt": self._prompt_hash(example_id), "skipped": example.skipped}
        table = to_dataset(example.rows, self.pair).with_format("arrow")[:].replace_schema_metadata(about)
        path = self.folder / f"example-{example_id:06d}.parquet"
        try:
            _write_whole(path, lambda part: pyarrow.parquet.write_table(table, part))
        except OSError as error:
            raise OSError(
                f"Couldn't write {path.name}: {error}. The examples finished before are safe in {self.folder}: make "
                "room, and the same call goes on."
            ) from error

    def load(self) -> dict[int, MinedExample]:
        """The finished examples among those that the prompts belong to; a damaged file is one to mine again."""
        import pyarrow
        import pyarrow.parquet

        finished: dict[int, MinedExample] = {}
        for path in sorted(self.folder.glob("example-*.parquet")) if self.folder else []:
            example_id = int(path.stem.split("-")[1])
            if example_id >= len(self.prompts):
                continue
            try:
                table = pyarrow.parquet.read_table(path)
            except (pyarrow.ArrowException, OSError) as error:
                logger.warning(f"{path.name} is damaged and will be mined again: {error}")
                continue
            about = table.schema.metadata
            if about[b"prompt"].decode() != self._prompt_hash(example_id):
                raise ValueError(
                    f"{path.name} in {self.folder} was mined from another example {example_id}. Mine another dataset "
                    "into another folder."
                )
            finished[example_id] = MinedExample(table.to_pylist(), about[b"skipped"].decode())
        return finished

    def _prompt_hash(self, example_id: int) -> str:
        return hashlib.sha256(str(self.prompts[example_id]).encode()).hexdigest()


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Under another name first, so that no reader ever sees half a file."""
    part = path.with_suffix(".part")
    try:
        write(part)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


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
