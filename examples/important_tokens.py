# SPDX-License-Identifier: Apache-2.0
"""Which tokens matter? Tables of mined mismatches by the kind of token, several tasks side by side.

    python examples/important_tokens.py words=runs/gsm8k/mismatches.parquet code=runs/code/mismatches.parquet

Instead of a file, a folder that is being mined will do.
A mismatch is counted under the token that the target wrote. A share is of the mismatches that are important.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict

from arguments import positive_int


# A token is of the first kind whose pattern fits it, blanks around it left out.
KINDS = {
    "line breaks and blanks": r"",
    "ends of responses": r"<\W.*\W>|</s>|<eos>|<end_of_turn>",
    "numbers": r"-?\d[\d.,]*",
    "operators and comparisons": r"[-+*/%=<>!&|^~:]+|and|or|not|in|is",
    "other signs": r"[\W_]+",
    "words and names": r".*",
}
#: Tokens with fewer mismatches are left out of the second table: their shares say little.
FEWEST = 20


def kind_of(token: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, token.strip(), re.DOTALL))


def shares(keys: list[str], labels: list[int]) -> dict[str, tuple[int, float]]:
    """For each key, how many mismatches it has and which share of them is important."""
    groups = defaultdict(list)
    for key, label in zip(keys, labels):
        groups[key].append(label)
    return {key: (len(group), sum(group) / len(group)) for key, group in groups.items()}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    # What a token says may end a cell.
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", nargs="+", metavar="NAME=FILE", help="mined mismatches, and what to call them")
    parser.add_argument("--num_tokens", type=positive_int, default=8, help="tokens a task in the second table")
    args = parser.parse_args()
    if wrong := [text for text in args.data if not all(text.partition("="))]:
        parser.error(f"expected NAME=FILE, such as code=mismatches.parquet, got {', '.join(wrong)}")

    from autojudge_hf.mined_examples import read_mismatches

    names, kinds, tokens = [], [], []
    for name, _, file in (text.partition("=") for text in args.data):
        mined = read_mismatches(file)
        written, labels = mined["target_token"][:], mined["label"][:]
        names.append(f"{name}: {len(labels)} mismatches, {sum(labels) / max(1, len(labels)):.1%} important")
        kinds.append(shares([kind_of(token) for token in written], labels))
        tokens.append(shares(written, labels))

    def share(counted: dict, kind: str) -> str:
        return "-" if kind not in counted else f"{counted[kind][1]:.1%} of {counted[kind][0]}"

    found = [kind for kind in KINDS if any(kind in counted for counted in kinds)]
    print(
        table(["the target's token", *names], [[kind, *(share(counted, kind) for counted in kinds)] for kind in found])
    )
    columns = []
    for counted in tokens:
        frequent = Counter({token: part for token, (number, part) in counted.items() if number >= FEWEST})
        columns.append([f"`{token!r}` {part:.0%}" for token, part in frequent.most_common(args.num_tokens)])
    longest = max(map(len, columns))
    rows = [[column[i] if i < len(column) else "" for column in columns] for i in range(longest)]
    print(f"\nMost important tokens, of those with {FEWEST} mismatches or more:\n")
    print(table([text.partition("=")[0] for text in args.data], rows))


if __name__ == "__main__":
    main()
