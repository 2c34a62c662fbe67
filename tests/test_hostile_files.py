# SPDX-License-Identifier: Apache-2.0
"""Thousands of damaged and malicious judges: each is refused in a line, or is exactly what its files declare."""

import io
import json
import random
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from safetensors.torch import save

from autojudge_hf import AutoJudge, Judge, JudgeConfig
from autojudge_hf.configuration import EVALUATION_COLUMNS
from autojudge_hf.model_card import JudgeCard
from autojudge_hf.plots import plot_trade_off


ODD_VALUES = [
    *(None, True, False, 0, -1, 1, 7, 2**31, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), float("-inf")),
    *("", "linear", "top_k", "x" * 100_000, "\0", "../../../etc/passwd", "{{ 7 * 7 }}", "\ud800", "🤗", "__class__"),
    json.loads("[" * 300 + "]" * 300),
    *([], {}, [[]], [1] * 1000, {"a": {"b": []}}, [{"threshold": None}], {"do_sample": "perhaps"}),
]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "BOOL", "U8", "F8_E4M3", "C64", "F1024", "", 3, None]
SIZES = [0, 1, 8, 9, -1, 2**31, 2**62, 2**63, 10**30, 1.5, "8", None]
NAMES = ["weight", "bias", "../weight", "/etc/passwd", "C:\\weight", "weight\0", "__metadata__", "", "x" * 100_000]
NEST = 100_000


def damaged(rng, content):
    """Bytes cut off, flipped, doubled or in the wrong place, whatever they mean."""
    content = bytearray(content)
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(content[: rng.randrange(len(content))])
    if kind == 1:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        content += rng.randbytes(rng.choice((1, 100, 10_000)))
    elif kind == 3:
        at = rng.randrange(len(content))
        content[at:at] = content[rng.randrange(len(content)) :]
    else:
        at = rng.randrange(len(content))
        content[at : at + rng.randrange(40)] = rng.randbytes(rng.randrange(40))
    return bytes(content)


def odd_value(rng):
    return json.loads(json.dumps(rng.choice(ODD_VALUES)))  # a copy


def hostile_config(rng, content):
    """JSON that parses, mostly, with values that no judge has."""
    kind = rng.randrange(6)
    if kind == 0:
        return damaged(rng, content)
    if kind == 1:
        opening, closing = rng.choice((("[", "]"), ('{"judge_type":', "}")))
        return (opening * NEST + "0" + closing * NEST).encode()
    values = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        name = rng.choice(sorted(values))
        if kind == 2:
            values.pop(name)
        elif kind == 3:
            values[rng.choice(["auto_map", "colour", "__init__", "x" * 1000, ""])] = odd_value(rng)
        elif kind == 4 and isinstance(values[name], (dict, list)) and values[name]:
            part = rng.choice(values[name]) if isinstance(values[name], list) else values[name]
            if isinstance(part, dict):
                part[rng.choice(sorted(part) or [""])] = odd_value(rng)
        else:
            values[name] = odd_value(rng)
    return json.dumps(values).encode()


def hostile_weights(rng, content):
    """A safetensors header that lies, or values that aren't numbers."""
    kind = rng.randrange(6)
    if kind == 0:
        return damaged(rng, content)
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    name = rng.choice(["weight", "bias"])
    if kind == 1:
        header[rng.choice(NAMES)] = header.pop(name) if rng.random() < 0.5 else header[name]
    elif kind == 2:
        header[name]["dtype"] = rng.choice(DTYPES)
    elif kind == 3:
        header[name]["shape"] = [rng.choice(SIZES) for _ in range(rng.randrange(4))]
    elif kind == 4:
        header[name]["data_offsets"] = [rng.choice(SIZES), rng.choice(SIZES)]
    else:
        at = rng.randrange(len(data) // 4)
        data[4 * at : 4 * at + 4] = struct.pack("<f", rng.choice([float("nan"), float("inf"), float("-inf")]))
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = b"[" * NEST + b"]" * NEST
    length = rng.choice((0, 2**40, 2**63)) if rng.random() < 0.1 else len(text)
    return struct.pack("<Q", length) + text + bytes(data)


def good_files():
    row = dict.fromkeys(EVALUATION_COLUMNS, 0.5) | {"dataset": "org/data", "split": "test", "num_examples": 10}
    rows = [{**row, "num_assistant_tokens": 16, "threshold": threshold} for threshold in (None, 0.1)]
    figures = {
        "evaluation": rows,
        "threshold": 0.1,
        "training": {"AUC": 0.9},
        "task": "gsm8k",
        "base_model_name_or_path": "org/target",
    }
    config = JudgeConfig(hidden_size=8, **figures)
    weights = {"weight": torch.arange(8.0), "bias": torch.ones(1, dtype=torch.float64)}
    return {"config.json": config.to_json_string().encode(), "model.safetensors": save(weights)}


GOOD = good_files()


def check_load(folder):
    """Whether the folder's judge loads; anything but a judge or a refusal is an exception."""
    try:
        judge = AutoJudge.from_pretrained(folder)
    except (ValueError, OSError) as error:
        assert str(folder) not in str(error) and str(ROOT) not in str(error)
        return False
    declared = JudgeConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert isinstance(judge, Judge) and judge.config == declared
    expected = {}
    if declared.judge_type == "linear":
        expected = {"weight": (torch.float32, (declared.num_features,)), "bias": (torch.float64, (1,))}
    tensors = judge.state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == expected
    assert all(tensor.isfinite().all() and tensor.device.type == "cpu" for tensor in tensors.values())
    card = JudgeCard(declared, "user/judge")
    if (
        declared.evaluation
        and declared.evaluation != JudgeConfig.from_dict(json.loads(GOOD["config.json"])).evaluation
    ):
        plot_trade_off(card.curves(), io.BytesIO())
    card = ModelCard(card.render(), ignore_metadata_errors=True)
    assert "49" not in card.text and str(folder) not in card.text
    return True


def load_mutants(mutate, filename, folder, count, seed):
    """Runs in a process of its own with a gigabyte to spare; prints how many loaded."""
    files = GOOD
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert check_load(folder)
    size = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (int(size.split()[1]) * 1024 + 2**30, resource.RLIM_INFINITY))
    rng, loaded = random.Random(seed), 0
    for _ in range(count):
        (folder / filename).write_bytes(mutate(rng, files[filename]))
        signal.alarm(10)  # a file that takes longer ends the process
        loaded += check_load(folder)
        signal.alarm(0)
    print(loaded)


@pytest.mark.parametrize(
    ("mutate", "filename"), [(hostile_config, "config.json"), (hostile_weights, "model.safetensors")]
)
def test_mutated_files(mutate, filename, tmp_path):
    count, folder = 1100, tmp_path / "judge"
    folder.mkdir()
    code = f"""
import sys
from pathlib import Path
from test_hostile_files import {mutate.__name__}, load_mutants
load_mutants({mutate.__name__}, {filename!r}, Path(sys.argv[1]), {count}, seed=0)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, cwd=ROOT / "tests", timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    loaded = int(result.stdout)
    # Some mutations are harmless: another number, another name. Most are not.
    assert 0 < loaded < count / 2
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["config.json", "model.safetensors"]


def test_a_width_that_no_memory_holds(tmp_path):
    """The config claims 8 GB of weights; the file has four of them."""
    config = JudgeConfig(hidden_size=2**31 - 1)
    (tmp_path / "config.json").write_text(config.to_json_string())
    (tmp_path / "model.safetensors").write_bytes(save({"weight": torch.ones(4), "bias": torch.zeros(1)}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        ValueError, match=r"weight: expected F32 or F64 of shape \[2147483647\], got F32 of shape \[4\]"
    ):
        AutoJudge.from_pretrained(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kilobytes
