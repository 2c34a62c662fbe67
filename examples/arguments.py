# SPDX-License-Identifier: Apache-2.0
"""What arguments of these scripts may be: refused while they are parsed, before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}.")
    return number


def share(text: str) -> float:
    number = float(text)
    if not 0.0 <= number <= 1.0:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {number:g}.")
    return number


def check_ways(parser: argparse.ArgumentParser, parts: list[str] | None, ways: Iterable[Any]) -> None:
    """Refuses parts of names that none of the ways has."""
    names = dict.fromkeys(way.name for way in ways)
    if unknown := [part for part in parts or () if not any(part in name for name in names)]:
        parser.error(f"--ways must be parts of {', '.join(map(repr, names))}, got {unknown}.")
