# SPDX-License-Identifier: Apache-2.0
"""Judge decoding for Hugging Face models. Importing this teaches `generate` the argument `judge`."""

from .adapter import install_judge_argument
from .auto import AutoJudge
from .calibration import calibrate_threshold
from .configuration import JudgeConfig
from .dataset_card import push_mismatches_to_hub
from .evaluation import evaluate_judge, evaluation_summary
from .generation import JudgeDecoderOnlyOutput, judge_decoding
from .mined_features import compute_features, select_features
from .mining import mine_mismatches
from .modeling import (
    EntropyJudge,
    Judge,
    KLJudge,
    LinearJudge,
    MarginJudge,
    MLPJudge,
    RuleJudge,
    TopKJudge,
    symbol_token_ids,
)
from .trainer import JudgeTrainer
from .training_args import JudgeTrainingArguments
from .version import __version__ as __version__


__all__ = [
    "AutoJudge",
    "EntropyJudge",
    "Judge",
    "JudgeConfig",
    "JudgeDecoderOnlyOutput",
    "JudgeTrainer",
    "JudgeTrainingArguments",
    "KLJudge",
    "LinearJudge",
    "MLPJudge",
    "MarginJudge",
    "RuleJudge",
    "TopKJudge",
    "calibrate_threshold",
    "compute_features",
    "evaluate_judge",
    "evaluation_summary",
    "judge_decoding",
    "mine_mismatches",
    "push_mismatches_to_hub",
    "select_features",
    "symbol_token_ids",
]
install_judge_argument()
