# SPDX-License-Identifier: Apache-2.0
"""What mining, calibrating and generating begin with: the problems and the models that their arguments name."""

from __future__ import annotations

from typing import Any

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_problems(args: Any) -> datasets.Dataset:
    if args.data_file is not None:
        return datasets.load_dataset("json", data_files=args.data_file, split="train")
    return datasets.load_dataset(args.dataset_name, "main", split=args.split)


def load_pair(args: Any, device_map: Any) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    model, assistant_model = (
        AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype, device_map=device_map).eval()
        for name in (args.model_name_or_path, args.assistant_model_name_or_path)
    )
    return model, assistant_model, AutoTokenizer.from_pretrained(args.model_name_or_path)
