# SPDX-License-Identifier: Apache-2.0
from .gsm8k import GSM8K
from .livecodebench import LiveCodeBench
from .task import Task


__all__ = ["GSM8K", "LiveCodeBench", "Task"]
