# SPDX-License-Identifier: Apache-2.0
"""Finished examples on disk, while mining runs, and read from there."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from .mined_rows import features_of, to_dataset


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)
SETTINGS_NAME, LOCK_NAME, ARROW_NAME = "settings.json", ".lock", ".cache"
PATTERN = "example-*.parquet"


@dataclass
class MinedExample:
    """What the search found in one example.

    Attributes:
        rows (`list[dict]`): a row a mismatch, as `mine_mismatches` returns them.
        skipped (`str`): why there are none: the response has no answer, or the task's error. Empty if mined.
        failed (`bool`): whether it's the task's error, and another run may try again.
    """

    rows: list[dict[str, Any]]
    skipped: str = ""
    failed: bool = False

    @property
    def counts(self) -> dict[str, int]:
        if self.skipped:
            return {"skipped": 1}
        return {"mismatches": len(self.rows), "important": sum(row["label"] for row in self.rows)}


class FinishedExample(NamedTuple):
    """Of a [`MinedExample`], what a summary needs."""

    counts: dict[str, int]
    skipped: str
    failed: bool


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
        self._kept: dict[int, MinedExample] = {}
        if self.folder is None:
            return
        if "::" in str(self.folder):
            raise ValueError(
                "`output_dir` can't have '::' in its path, which chains file systems. Give another folder."
            )
        path, others = self.folder / SETTINGS_NAME, set()
        if self.folder.is_dir():
            # A run that was killed at its start leaves these two at most.
            others = {file.name for file in self.folder.iterdir()} - {LOCK_NAME, _part_of(path).name}
        if (self.folder.exists() and not self.folder.is_dir()) or (others and not path.is_file()):
            raise ValueError(
                f"`output_dir` {self.folder.name} exists and wasn't written by mining. Give another folder."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / LOCK_NAME)
        try:
            # The system gives the lock back when a process ends, however it ends.
            if locks:
                self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another process is mining into {self.folder.name}. Wait for it, or mine into another folder."
            ) from None
        try:
            self._agree({**pair, **identity}, path, may_replace=locks)
        except BaseException:
            self.close()
            raise

    def _agree(self, settings: dict[str, Any], path: Path, may_replace: bool) -> None:
        """Writes the settings, or compares them with those that the folder's examples were mined under."""
        is_without_examples = not any(_example_files(self.folder.glob(PATTERN)))
        if not path.is_file() or (may_replace and is_without_examples):
            _write_whole(path, lambda part: part.write_text(json.dumps(settings, indent=2, sort_keys=True)))
            return
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(written, dict):
                raise ValueError("not a dict")
        except ValueError:
            raise ValueError(f"{path.name} in {self.folder.name} is damaged. Mine into another folder.") from None
        differences = [
            f"{name}: {written.get(name)} there, {settings.get(name)} now"
            for name in sorted(settings.keys() | written.keys())
            if written.get(name) != settings.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.folder.name} holds mismatches that were mined under other settings: "
                f"{'; '.join(differences)}. Mine into another folder, or under the settings there."
            )

    def close(self) -> None:
        """Lets another run have the folder."""
        if self.folder is not None:
            self._lock.release()

    def save(self, example_id: int, example: MinedExample) -> None:
        """Raises an `OSError` that says what to do where the disk is full; what was saved before stays."""
        if self.folder is None:
            self._kept[example_id] = example
            return
        import pyarrow.parquet

        about = {
            "prompt": self._prompt_hash(example_id),
            "skipped": example.skipped,
            "failed": str(example.failed),
            "counts": json.dumps(example.counts),
        }
        table = to_dataset(example.rows, self.pair).with_format("arrow")[:].replace_schema_metadata(about)
        path = self._path(example_id)
        try:
            _write_whole(path, lambda part: pyarrow.parquet.write_table(table, part))
        except OSError as error:
            raise OSError(
                f"Couldn't write {path.name}: {error.strerror or error}. The examples finished before are safe in "
                f"{self.folder.name}: make room, and the same call goes on."
            ) from error

    def finished(self) -> dict[int, FinishedExample]:
        """What is known of the examples that are done, by id and in its order; a damaged file is one to mine again."""
        if self.folder is None:
            return {i: FinishedExample(x.counts, x.skipped, x.failed) for i, x in sorted(self._kept.items())}
        import pyarrow
        import pyarrow.parquet

        finished: dict[int, FinishedExample] = {}
        for path in sorted(_example_files(self.folder.glob(PATTERN)), key=_example_id):
            if _example_id(path) >= len(self.prompts):
                continue
            try:
                about = pyarrow.parquet.read_schema(path).metadata or {}
                prompt, counts = about[b"prompt"].decode(), json.loads(about[b"counts"])
            except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
                logger.warning(f"{path.name} is damaged and will be mined again: {error!r}")
                continue
            if prompt != self._prompt_hash(_example_id(path)):
                raise ValueError(
                    f"{path.name} in {self.folder.name} was mined from another example {_example_id(path)}. Mine "
                    "another dataset into another folder."
                )
            skipped, failed = about.get(b"skipped", b"").decode(), about.get(b"failed") == b"True"
            finished[_example_id(path)] = FinishedExample(counts, skipped, failed)
        return finished

    def dataset(self, finished: Mapping[int, FinishedExample]) -> datasets.Dataset:
        """All finished examples' rows; of a folder, they stay on disk. Raises an `OSError` where that is full."""
        import datasets

        with_rows = [i for i, example in finished.items() if example.counts.get("mismatches")]
        if self.folder is None or not with_rows:
            return to_dataset([row for i in with_rows for row in self._kept[i].rows], self.pair)
        paths = [glob.escape(str(self._path(i))) for i in with_rows]  # patterns, to `datasets`
        options = {"features": features_of(self.pair), "cache_dir": str(self.folder / ARROW_NAME)}
        try:
            return datasets.Dataset.from_parquet(paths, **options)
        except (OSError, datasets.exceptions.DatasetGenerationError) as error:
            damaged = [self._path(i).name for i in with_rows if not _is_readable(self._path(i))]
            todo = f"delete {', '.join(damaged)}, which can't be read" if damaged else "make room"
            raise OSError(
                f"Couldn't put the finished examples of {self.folder.name} together: {error.__cause__ or error}. They "
                f"stay there: {todo}, and the same call goes on."
            ) from error

    def _path(self, example_id: int) -> Path:
        return self.folder / f"example-{example_id:06d}.parquet"

    def _prompt_hash(self, example_id: int) -> str:
        return hashlib.sha256(str(self.prompts[example_id]).encode()).hexdigest()


def read_mismatches(path: str | Path) -> datasets.Dataset:
    """Mined rows from a Parquet file, or from a miner's folder: those of the examples finished so far.

    Raises:
        FileNotFoundError: for a path at which there is nothing.
        ValueError: where there are no rows, or a file isn't Parquet.
    """
    import datasets
    import pyarrow.parquet

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no {path.name}: expected a folder that mining wrote, or a Parquet file.")
    files = sorted(_example_files(path.rglob(PATTERN))) if path.is_dir() else [path]
    # An example without mismatches has a file, too, which `datasets` wouldn't read.
    try:
        with_rows = [glob.escape(str(file)) for file in files if pyarrow.parquet.read_metadata(file).num_rows]
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"Expected mined mismatches in {path.name}, got what isn't Parquet: {error!s:.200}") from None
    if not with_rows:
        raise ValueError(f"Expected mined mismatches in {path.name}, found none in {len(files)} Parquet files.")
    return datasets.Dataset.from_parquet(with_rows)


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Under another name first, so that no reader ever sees half a file."""
    part = _part_of(path)
    try:
        write(part)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _is_readable(path: Path) -> bool:
    import pyarrow
    import pyarrow.parquet

    try:
        pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError):
        return False
    return True


def _part_of(path: Path) -> Path:
    return path.with_suffix(".part")


def _example_files(found: Iterable[Path]) -> Iterator[Path]:
    """Those that mining wrote: not what somebody copied beside them under a name like theirs."""
    return (path for path in found if re.fullmatch(r"example-\d{6,}\.parquet", path.name))


def _example_id(path: Path) -> int:
    return int(path.stem.split("-")[1])
