# SPDX-License-Identifier: Apache-2.0
"""One HTML page with mined responses, their mismatches coloured by label; hover to see what either model wrote.

    python examples/show_mismatches.py --data_file runs/mined/mismatches.parquet --tokenizer Qwen/Qwen2.5-7B-Instruct

Each response is shown as the search left it, up to its last mismatch: harmless mismatches keep the assistant's token,
important ones the target's.
"""

from __future__ import annotations

import argparse
import html
import itertools
from pathlib import Path

from arguments import positive_int


PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Mined mismatches</title>
<style>
body { font: 16px/1.7 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; color: #222 }
section { border-top: 1px solid #ccc; padding: 1em 0; white-space: pre-wrap }
.prompt { color: #888; font-size: 0.85em }
.mark { position: relative; border-radius: 3px; padding: 1px 2px; cursor: help }
.harmless { background: #bfe8c5 }
.important { background: #ffb3a7; font-weight: 600 }
.mark:hover::after { content: attr(data-tip); position: absolute; left: 0; top: 1.8em; z-index: 1; white-space: pre;
  background: #222; color: #fff; padding: 2px 8px; border-radius: 4px; font-weight: 400; font-size: 0.85em }
</style>
<h1>Mined mismatches</h1>
<p>__SUMMARY__ <span class="mark harmless">harmless</span>: the assistant's token stayed, and so did the answer.
<span class="mark important">important</span>: the answer changed, the target's token came back.</p>
__SECTIONS__
</html>
"""


def section(rows: list[dict], tokenizer) -> str:
    """A response with its mismatches, which are ordered by position."""
    from autojudge_hf.mined_rows import inner_text

    *_, last = rows
    tokens = [*last["input_ids"], last["target_token_id"] if last["label"] else last["candidate_token_id"]]
    parts, start = [], last["prompt_length"]
    for row in rows:
        parts.append(html.escape(inner_text(tokenizer, tokens[start : row["position"]])))
        kind = "important" if row["label"] else "harmless"
        tip = f"assistant: {row['candidate_token']!r}   target: {row['target_token']!r}"
        kept = html.escape(row["target_token"] if row["label"] else row["candidate_token"])
        parts.append(f'<span class="mark {kind}" data-tip="{html.escape(tip)}">{kept}</span>')
        start = row["position"] + 1
    prompt = html.escape(tokenizer.decode(tokens[: last["prompt_length"]], skip_special_tokens=True).strip())
    return f'<section><div class="prompt">{prompt}</div>{"".join(parts)} …</section>'


def page(rows: list[dict], tokenizer, max_examples: int) -> str:
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["example_id"])]
    important = sum(row["label"] for row in rows)
    summary = f"{len(groups)} problems, {len(rows)} mismatches, {important / max(1, len(rows)):.1%} important"
    if len(groups) > max_examples:
        summary += f"; the first {max_examples} problems are shown"
    sections = "\n".join(section(group, tokenizer) for group in groups[:max_examples])
    return PAGE.replace("__SUMMARY__", summary + ".").replace("__SECTIONS__", sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data_file", required=True, help="Parquet file that mine.py wrote, or its folder")
    parser.add_argument("--tokenizer", required=True, help="the pair's: Hub id or folder")
    parser.add_argument("--output", default="mismatches.html", help="the page")
    parser.add_argument("--max_examples", type=positive_int, default=50, help="show so many problems")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    from autojudge_hf.mined_examples import read_mismatches

    rows = read_mismatches(args.data_file).remove_columns(["features", "pair"]).to_list()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    Path(args.output).write_text(page(rows, tokenizer, args.max_examples), encoding="utf-8")
    print(f"{len(rows)} mismatches, in {args.output}")


if __name__ == "__main__":
    main()
