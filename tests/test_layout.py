# SPDX-License-Identifier: Apache-2.0
"""The layering rule, the light import, and what may lie at the top level."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import autojudge_hf


PACKAGE = ROOT / "autojudge_hf"
# A file imports only files above it.
ORDER = [
    "version",
    "configuration",
    "verification",
    "model_properties",
    "head_inputs",
    "early_exit",
    "fixed_cache",
    "state_copies",
    "caches",
    "forward",
    "features",
    "model_card",
    "plots",
    "hub",
    "modeling",
    "auto",
    "draft_length",
    "checks",
    "supported",
    "judging",
    "drafter",
    "candidate_generator",
    "shared_cache",
    "dflash",
    "mtp",
    "certain_drafts",
    "rows",
    "other_tokenizer",
    "outputs",
    "generation",
    "adapter",
    "former_responses",
    "tasks",
    "mined_rows",
    "mined_examples",
    "dataset_card",
    "prefixes",
    "mismatches",
    "mined_features",
    "search",
    "mining",
    "measuring",
    "evaluation",
    "calibration",
    "highlighting",
    "training_args",
    "training_rows",
    "fitting",
    "trainer",
    "__init__",
]


def imports(path):
    """Names of the package's own modules, and of others, that a file imports."""
    tree = ast.parse(path.read_text())
    own, other = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                own.add((node.module or "").split(".")[0])
            else:
                other.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            other |= {alias.name.split(".")[0] for alias in node.names}
    return own, other


def test_every_import_points_up():
    files = {path.stem: path for path in PACKAGE.glob("*.py")}
    assert set(files) | {"tasks"} == set(ORDER)
    for name, path in files.items():
        own, _ = imports(path)
        assert all(ORDER.index(module) < ORDER.index(name) for module in own), (name, own)
    for path in (PACKAGE / "tasks").glob("*.py"):
        # Within the folder only: level 1 imports of the folder's own modules.
        own, _ = imports(path)
        assert own <= {p.stem for p in (PACKAGE / "tasks").glob("*.py")}


def test_serving_reads_no_training_code():
    """What `generate` needs stands above `tasks`, and so imports none of what stands below."""
    for name in ORDER[: ORDER.index("tasks")]:
        _, other = imports(PACKAGE / f"{name}.py")
        assert not other & {"sklearn", "evaluate", "datasets"}, name
    for a, b in (("mining", "trainer"), ("trainer", "mining")):
        assert b not in imports(PACKAGE / f"{a}.py")[0]


def test_import_is_light():
    """On top of what any user of `generate` has loaded, and without the training libraries."""
    code = """
import sys, time
from transformers import GenerationMixin
before, start = set(sys.modules), time.perf_counter()
import autojudge_hf
print(time.perf_counter() - start)
print(*sorted({"sklearn", "evaluate", "datasets", "pandas", "matplotlib"} & (set(sys.modules) - before)))
"""
    for _ in range(3):
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, heavy = result.stdout.split("\n")[:2]
        assert heavy == ""
        if float(seconds) < 0.3:
            return
    raise AssertionError(f"{seconds} seconds in the last of three tries")


def test_public_names_are_sorted_and_exist():
    names = autojudge_hf.__all__
    assert names == sorted(names, key=str) or names == sorted(names, key=lambda n: (n[0].islower(), n))
    for name in names:
        assert getattr(autojudge_hf, name).__doc__


def test_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= {
        "autojudge_hf",
        "examples",
        "hub_cards",
        "tests",
        "pyproject.toml",
        "README.md",
    }


def test_every_source_file_names_the_licence():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "examples").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert re.match(r"# SPDX-License-Identifier: Apache-2.0\n", path.read_text()), path
