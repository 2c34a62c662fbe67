# SPDX-License-Identifier: Apache-2.0
"""Renders the cards in this folder from the results in each judge's config.json.

    python hub_cards/render.py

A config.json is the one of a judge that `examples/compare_judges.py` or `examples/measure_judge.py` made.
"""

import json
from pathlib import Path

from autojudge_hf import AutoJudge, JudgeConfig


def main() -> None:
    for config in sorted(Path(__file__).parent.glob("*/config.json")):
        judge = AutoJudge.from_config(JudgeConfig.from_dict(json.loads(config.read_text(encoding="utf-8"))))
        judge.save_card(config.parent, name=f"user/{config.parent.name}")
        print(config.parent.name)


if __name__ == "__main__":
    main()
