# SPDX-License-Identifier: Apache-2.0
"""Files of a judge, from a folder or the Hub and back to it; whatever fails is said in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from .configuration import public_name


# What the client's HTTP library raises for connections that break; which library depends on the client's version.
HTTPError = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
# RuntimeError: of the Xet client, like its own.
HUB_ERRORS = (OSError, HTTPError, RuntimeError, XetDownloadError, HFValidationError, json.JSONDecodeError)
# Of these, the earlier come first: some are special cases of the later ones.
REASONS: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "it is gated; accept its conditions on its page on the Hub, and pass a `token` of that account"),
    (
        RepositoryNotFoundError,
        "there is no such repository, or it is private; check the name, and for a private one pass a `token` or run "
        "`hf auth login`",
    ),
    (RevisionNotFoundError, "it has no such `revision`"),
    (
        RemoteEntryNotFoundError,
        "it has no such file, so it isn't a judge; a judge has config.json and model.safetensors",
    ),
    (
        LocalEntryNotFoundError,
        "the file isn't in the cache, and the Hub can't be reached or may not be asked; check the connection, "
        "`local_files_only` and HF_HUB_OFFLINE",
    ),
    (HFValidationError, "this is neither a folder that exists nor the name of a repository, such as 'user/judge'"),
    (OfflineModeIsEnabled, "HF_HUB_OFFLINE forbids asking the Hub"),
)


def find_file(name_or_path: str | os.PathLike, filename: str, subfolder: str = "", **options: Any) -> Path:
    """The path of a judge's file, downloaded first where `name_or_path` isn't a folder.

    Args:
        options: `revision`, `token`, `cache_dir`, `local_files_only`, as `hf_hub_download` takes them.

    Raises:
        OSError: for a file that isn't there or can't be had.
        ValueError: for a `subfolder` that leads out.
    """
    check_subfolder(subfolder)
    folder = Path(name_or_path)
    if folder.is_dir():
        path = folder / subfolder / filename
        if not path.is_file():
            found = sorted(p.name for p in path.parent.glob("*"))
            raise OSError(f"No {filename} in the judge folder {path.parent.resolve().name!r}, there is {found}.")
        return path
    if folder.is_absolute():
        raise OSError(
            f"There is no folder {folder.name!r}: expected one that a judge's `save_pretrained` wrote. "
            "(`custom_generate=` looks for a judge where it was saved: save it again where it is.)"
        )
    try:
        return Path(hf_hub_download(str(name_or_path), filename, subfolder=subfolder or None, **options))
    except HUB_ERRORS as error:
        wanted = f"{subfolder}/{filename}" if subfolder else filename
        raise OSError(f"Can't get {wanted} of {public_name(str(name_or_path))!r}: {_reason(error)}.") from None


def create_repo(repo_id: str, *, private: bool | None, token: str | bool | None, repo_type: str = "model") -> str:
    """Makes the repository if there is none; returns its full name, which begins with the user's where none is given.

    Raises:
        OSError: where the Hub refuses or can't be reached.
    """
    try:
        url = HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type)
    except HUB_ERRORS as error:
        raise _refused(repo_id, error) from None
    return url.repo_id


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None,
    commit_message: str,
    subfolder: str = "",
    repo_type: str = "model",
) -> str:
    """Uploads everything in `folder` to a repository in one commit, or nothing; returns the commit's address.

    Raises:
        OSError: where the Hub refuses or can't be reached. The repository is as it was.
        ValueError: where the Hub finds fault with the card, say an unknown licence. The same.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [(Path(subfolder) / path.relative_to(folder)).as_posix() for path in files]
    operations = [CommitOperationAdd(name, str(path)) for name, path in zip(names, files)]
    try:
        commit = HfApi(token=token).create_commit(
            repo_id, operations, commit_message=commit_message, repo_type=repo_type
        )
    except HUB_ERRORS as error:
        raise _refused(repo_id, error) from None
    except ValueError as error:  # what the Hub says of the card's metadata, a line for each fault
        raise ValueError(f"Can't push to {public_name(repo_id)!r}: {' '.join(str(error).split())}") from None
    return commit.commit_url


def commit_of(path: Path) -> str | None:
    """The commit that a judge's file in the Hub's cache belongs to; `None` for other files."""
    for repo, folder, commit in zip(path.parts, path.parts[1:], path.parts[2:-1]):
        if repo.startswith("models--") and folder == "snapshots":
            return commit
    return None


def check_subfolder(subfolder: str) -> None:
    """Raises a `ValueError` for one that leads out of a repository."""
    parts = PurePosixPath(subfolder)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"`subfolder` must be a folder of the repository, got {subfolder!r}.")


def _refused(repo_id: str, error: Exception) -> OSError:
    """Also true where the Hub's answer got lost: then the same push again changes nothing."""
    is_lasting = isinstance(error, (HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError))
    advice = "Nothing was pushed" if is_lasting else "A push is one commit or none: try again"
    return OSError(f"Can't push to {public_name(repo_id)!r}: {_reason(error)}. {advice}.")


def _reason(error: Exception) -> str:
    """Why the Hub's client failed, without addresses or request ids."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # the client looks into its cache when the Hub refuses
    for kind, reason in REASONS:
        if isinstance(error, kind):
            return reason
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        meanings = {
            401: "there is no token, or it isn't valid; run `hf auth login`",
            403: "the token's account isn't allowed to",
            429: "too many requests",
        }
        return f"{meanings.get(status, 'the Hub failed')} (HTTP {status})"
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        return error.strerror  # of this machine: no room, no permission
    return f"the connection broke ({type(error).__name__})"
