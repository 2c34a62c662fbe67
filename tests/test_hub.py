# SPDX-License-Identifier: Apache-2.0
"""Push and pull through the real client of the Hub, with a Hub on the loopback interface.

The client reads its endpoint once, so that everything here runs in processes of its own; and these have the library
from a wheel, built once and installed outside the checkout.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import PROMPT, ROOT, random_llama, similar_model
from hub_server import Hub, Repo
from huggingface_hub import DatasetCard, ModelCard
from safetensors.torch import save

from autojudge_hf import AutoJudge, JudgeConfig
from autojudge_hf.model_card import render_custom_generate


PREAMBLE = """
import os, sys, torch
from autojudge_hf import AutoJudge, JudgeConfig

def linear(seed=0, size=16):
    judge = AutoJudge.from_config(JudgeConfig(hidden_size=size, threshold=0.3, base_model_name_or_path="org/target"))
    weight = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    judge.load_state_dict({"weight": weight, "bias": torch.tensor([0.5], dtype=torch.float64)})
    return judge

def attempt(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except (OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture
def hub():
    with Hub() as server:
        yield server
        assert server.mistakes == []


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Folder of a wheel of this library, made of a copy of its sources: a build leaves files among them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "autojudge_hf", folder / "autojudge_hf", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder / "dist", folder)
    return folder / "dist"


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """Where the wheel is installed, by the requirements that a saved judge names."""
    folder = tmp_path_factory.mktemp("site")
    requirements = folder / "requirements.txt"
    requirements.write_text(render_custom_generate("user/judge")["requirements.txt"])
    pip("install", "--no-index", "--find-links", wheel, "--no-deps", "--target", folder, "-r", requirements)
    return folder


def pip(*args):
    result = subprocess.run([sys.executable, "-m", "pip", *map(str, args)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def client(hub, installed, tmp_path):
    """Runs code in a process whose Hub is the loopback one; returns what it prints."""

    def run(code, token="hf_writer", preamble=PREAMBLE, expected=0, **environment):
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{installed}:{ROOT / 'tests'}",
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",  # its storage has a protocol of its own; the client falls back to LFS
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_ETAG_TIMEOUT": "2",
            **({"HF_TOKEN": token} if token else {}),
            **environment,
        }
        result = subprocess.run(
            [sys.executable, "-c", preamble + textwrap.dedent(code)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            env=environment,
        )
        assert result.returncode == expected, result.stderr
        assert "hf_writer" not in result.stdout + result.stderr
        assert str(tmp_path) not in result.stdout and (expected or str(tmp_path) not in result.stderr)
        return result.stdout

    return run


def judge_files(**config):
    judge = AutoJudge.from_config(JudgeConfig(**{"hidden_size": 4, **config}))
    tensors = {name: torch.ones_like(tensor) for name, tensor in judge.state_dict().items()}
    return {
        "config.json": (judge.config.to_json_string().encode(), False),
        "model.safetensors": (save(tensors), True),
    }


def serve(hub, name="user/judge", files=None, **options):
    repo = Repo(**options)
    repo.commit(files if files is not None else judge_files(), "first")
    hub.repos["models", name] = repo
    return repo


DECODE = """
from conftest import PROMPT, random_llama, similar_model
model = random_llama()
def decode(judge):
    options = {"do_sample": False, "max_new_tokens": 20}
    return model.generate(PROMPT, assistant_model=similar_model(model), judge=judge, **options).tolist()
"""


def test_push_wipe_pull_decode(hub, client, installed, tmp_path):
    """The same tokens before the push, after the pull, and offline; and without importing this library."""
    decoding = PREAMBLE + DECODE
    code = """
    import autojudge_hf
    print(os.path.dirname(os.path.dirname(autojudge_hf.__file__)))
    judge = linear(size=32)
    print(decode(judge))
    print(judge.push_to_hub('judge', private=True))
    """
    folder, tokens, url = client(code, preamble=decoding).splitlines()
    assert Path(folder) == installed
    repo = hub.repos["models", "user/judge"]
    assert repo.private and len(repo.commits) == 2 and url == f"{hub.endpoint}/user/judge/commit/{repo.commits[1][0]}"
    assert set(repo.commits[1][1]) - {".gitattributes"} == {
        "README.md",
        "config.json",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
        "model.safetensors",
    }
    assert all(b"/tmp" not in content for content, _ in repo.commits[1][1].values())
    pull = "print(decode(AutoJudge.from_pretrained('user/judge')))"
    assert client(pull, preamble=decoding).strip() == tokens
    num_requests = len(hub.requests)
    assert client(pull, preamble=decoding, HF_HUB_OFFLINE="1").strip() == tokens and len(hub.requests) == num_requests
    alone = f"""
import torch
from transformers import AutoModelForCausalLM
load = lambda name: AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + name, dtype=torch.float32)
tokens = load("target").generate(
    torch.tensor({PROMPT.tolist()}), assistant_model=load("draft"), do_sample=False, max_new_tokens=20,
    custom_generate="user/judge", trust_remote_code=TRUST,
)
print(tokens.tolist())
"""
    model = random_llama()
    model.save_pretrained(tmp_path / "target")
    similar_model(model).save_pretrained(tmp_path / "draft")
    assert client(alone.replace("TRUST", "True"), preamble="").strip().splitlines()[-1] == tokens
    with_options = alone.replace("TRUST", "True, token='hf_' + 'writer', revision='main'")
    assert client(with_options, preamble="", token=None).strip().splitlines()[-1] == tokens
    offline = client(alone.replace("TRUST", "True"), preamble="", HF_HUB_OFFLINE="1")
    assert offline.strip().splitlines()[-1] == tokens
    refused = client(alone.replace("TRUST", "False") + "\nprint('ran')", preamble="", expected=1)
    assert "ran" not in refused


def test_revisions_subfolders_and_caches(hub, client, tmp_path):
    repo = serve(hub, files=judge_files(threshold=0.1))
    repo.commit(judge_files(threshold=0.2), "second")
    cache = tmp_path / "snapshots" / "cache"  # as a folder inside the cache is called
    pinned = repo.commits[0][0]
    output = client(
        f"""
    load = AutoJudge.from_pretrained
    print(load("user/judge").config.threshold, load("user/judge", revision={pinned!r}).config.threshold)
    print(load("user/judge", revision="first", cache_dir={str(cache)!r}).config.threshold)
    print(load("user/judge", revision={pinned!r}, local_files_only=True).config.threshold)
    attempt(load, "user/judge", revision="third")
    attempt(load, "user/judge", revision="first", cache_dir={str(tmp_path / "other")!r}, local_files_only=True)
    for seed, name in enumerate(("gsm8k", "code")):
        linear(seed).push_to_hub("user/judges", subfolder=name, commit_message="Add " + name)
    print(torch.equal(load("user/judges", subfolder="code").weight, linear(1).weight))
    attempt(load, "user/judges", subfolder="poems")
    attempt(linear(1).push_to_hub, "user/others", subfolder="../poems")
    """
    )
    lines = output.splitlines()
    assert lines[:3] == ["0.2 0.1", "0.1", "0.1"]
    assert "no such `revision`" in lines[3] and "isn't in the cache" in lines[4] and lines[5] == "True"
    assert "poems/config.json of 'user/judges': it has no such file" in lines[6]
    assert "`subfolder` must be a folder of the repository, got '../poems'" in lines[7]
    assert ("models", "user/others") not in hub.repos
    assert cache.is_dir() and len(lines) == 8
    assert [commit[2] for commit in hub.repos["models", "user/judges"].commits[1:]] == ["Add gsm8k", "Add code"]


def test_who_may_what(hub, client):
    serve(hub, "user/private", private=True)
    serve(hub, "user/gated", gated=True)
    serve(hub, "user/model", {"config.json": (b'{"model_type": "llama"}', False)})
    newer = {**json.loads(judge_files()["config.json"][0]), "colour": "red", "autojudge_hf_version": "9.9"}
    serve(hub, "user/newer", {"config.json": (json.dumps(newer).encode(), False)})
    serve(hub, "other/judge")
    code = """
    for name in ("user/private", "user/gated", "user/nothing", "user/model", "user/newer", "no such name!"):
        judge = attempt(AutoJudge.from_pretrained, name)
        if judge is not None: print("loaded", name)
    attempt(linear().push_to_hub, "other/judge")
    """
    lines = client(code, token=None).splitlines()
    expected = ["there is no such repository, or it is private", "it is gated", "there is no such repository"]
    expected += ["isn't a judge's, but a 'llama' model's", "9.9", "neither a folder that exists nor the name"]
    for line, part in zip(lines, expected):
        assert part in line, line
    assert len(lines) == 7 and "Can't push to 'other/judge': there is no token, or it isn't valid" in lines[6]
    assert not any("/user/model/resolve" in path and "safetensors" in path for _, path in hub.requests)
    lines = client(code).splitlines()
    assert lines[:2] == ["loaded user/private", "loaded user/gated"] and len(lines) == 7
    assert "Can't push to 'other/judge': the token's account isn't allowed to (HTTP 403)" in lines[6]
    assert len(hub.repos["models", "other/judge"].commits) == 1


def first_time_only(hub, faults, begins):
    """Faults of repositories until a call begins for the second time, which the method and part of a path tell."""

    def fault(method, path):
        for name, (where, kind) in faults.items():
            begun = sum(request[0] == begins[0] and f"{name}{begins[1]}" in request[1] for request in hub.requests)
            if begun < 2 and method == where[0] and where[1] in path:
                return kind
        return None

    return fault


def test_a_second_call_works(hub, client):
    """Whatever happens to the weights on the way, the error is one line, and nothing broken is kept."""
    faults = {}
    for number, fault in enumerate(("cut", "drop", 500)):
        tensors = {"weight": torch.full((20_000,), 1.0 + number), "bias": torch.zeros(1, dtype=torch.float64)}
        config = JudgeConfig(hidden_size=20_000).to_json_string().encode()
        serve(hub, f"user/{fault}", {"config.json": (config, False), "model.safetensors": (save(tensors), True)})
        oid = hashlib.sha256(save(tensors)).hexdigest()
        faults[f"user/{fault}"] = (("GET", oid), fault)
    hub.faults = first_time_only(hub, faults, ("HEAD", "/resolve/main/config.json"))
    code = """
    for name in ("user/cut", "user/drop", "user/500"):
        for call in range(2):
            judge = attempt(AutoJudge.from_pretrained, name)
        print(judge.weight.mean().item())
    """
    lines = client(code, HF_HUB_DOWNLOAD_TIMEOUT="1").splitlines()
    numbers = [line for line in lines if not line.startswith("OSError: Can't get model.safetensors of 'user/")]
    assert numbers == ["1.0", "2.0", "3.0"] and len(lines) >= 5


def test_an_interrupted_push_changes_nothing(hub, client):
    where = {
        "user/one": ("PUT", "/lfs/"),
        "user/two": ("POST", "/commit/main"),
        "user/three": ("POST", "/preupload/"),
        "user/four": ("POST", "/commit/main"),
    }
    kinds = {"user/one": 400, "user/two": "drop", "user/three": 403, "user/four": "hang up"}
    for name in where:
        serve(hub, name)
    code = """
    for seed, name in enumerate(("user/one", "user/two", "user/three", "user/four")):
        attempt(linear(seed).push_to_hub, name)
        print(AutoJudge.from_pretrained(name).weight.shape[0])
        attempt(linear(seed).push_to_hub, name)
        print(torch.equal(AutoJudge.from_pretrained(name).weight, linear(seed).weight))
    """

    def fault(method, path):
        pushing = [name for kind, name in hub.repos if ("POST", f"/api/models/{name}/preupload/main") in hub.requests]
        name = pushing[-1] if pushing else None
        begun = hub.requests.count(("POST", f"/api/models/{name}/preupload/main"))
        hit = name and begun < 2 and method == where[name][0] and where[name][1] in path
        return kinds[name] if hit else None

    hub.faults = fault
    lines = client(code).splitlines()
    assert [line for line in lines if not line.startswith("OSError")] == ["4", "True"] * 4
    for name, line in zip(where, lines[::3]):
        assert line.startswith(f"OSError: Can't push to '{name}': ") and line.endswith(
            "A push is one commit or none: try again."
        )
    assert all(len(hub.repos["models", name].commits) == 2 for name in where)


def test_trainer_pushes_what_it_saves(hub, client):
    code = """
    from test_trainer import made_up
    from autojudge_hf import JudgeTrainer, JudgeTrainingArguments
    def train(**options):
        options = {"push_to_hub": True, "C_grid": [0.1], "overwrite_output_dir": True, **options}
        arguments = JudgeTrainingArguments(**{"output_dir": "my-judge", **options})
        assert "hf_" not in repr(arguments)
        trainer = JudgeTrainer(arguments, made_up())
        print("made")
        trainer.train()
        trainer.create_model_card(license="mit")
        trainer.save_model()
        loaded = AutoJudge.from_pretrained(options.get("hub_model_id", "user/my-judge"), token="hf_" + "writer")
        print(torch.equal(loaded.weight, trainer.judge.weight), loaded.config == trainer.judge.config)
        return trainer
    attempt(train)
    trainer = train(hub_token="hf_" + "writer", hub_private_repo=True)
    train(hub_token="hf_" + "writer", hub_model_id="user/named")
    print(trainer.push_to_hub("user/again", license="apache-2.0").startswith("http"))
    """
    lines = client(code, token=None).splitlines()
    # Without a token it fails before the fit.
    assert lines[0].startswith("OSError: Can't push to 'my-judge': there is no token, or it isn't valid")
    assert lines[1:] == ["made", "True True", "made", "True True", "True"]
    names = {name for _, name in hub.repos}
    assert names == {"user/my-judge", "user/named", "user/again"}
    assert hub.repos["models", "user/my-judge"].private and not hub.repos["models", "user/named"].private
    for name, licence in (("user/my-judge", "mit"), ("user/again", "apache-2.0")):
        files = hub.repos["models", name].commits[-1][1]
        card = ModelCard(files["README.md"][0].decode())
        assert card.data.license == licence and name in card.text
        assert all(b"hf_writer" not in content for content, _ in files.values())


def test_mined_datasets_have_cards(hub, client):
    code = """
    from test_trainer import made_up
    from autojudge_hf import push_mismatches_to_hub
    from datasets import concatenate_datasets, load_dataset
    mined = made_up()
    print(push_mismatches_to_hub(mined, "mined", private=True, license="mit", dataset="org/problems"))
    back = load_dataset("user/mined", split="train")
    print(back[:] == mined[:], back.features == mined.features)
    other = mined.remove_columns("pair").add_column("pair", ["{}"] * len(mined))
    attempt(push_mismatches_to_hub, concatenate_datasets([mined, other]), "user/both")
    """
    lines = client(code).splitlines()
    repo = hub.repos["datasets", "user/mined"]
    assert lines[0] == f"{hub.endpoint}/datasets/user/mined/commit/{repo.commits[-1][0]}" and lines[1] == "True True"
    assert lines[2] == "ValueError: The rows come from 2 different minings, expected one."
    assert repo.private and len(repo.commits) == 2 and len(hub.repos) == 1
    card = DatasetCard(repo.commits[-1][1]["README.md"][0].decode())
    assert card.data.license == "mit" and 'load_dataset("user/mined"' in card.text


@pytest.mark.slow
def test_the_readme_shares_a_judge(hub, client, judge, mined, tmp_path):
    """In its own words, with a judge of the embedded pair."""
    judge.save_pretrained(tmp_path / "judge")
    mined.save_to_disk(tmp_path / "mined")
    blocks = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.S)
    (block,) = (block for block in blocks if "push_to_hub(" in block)
    code = f"""
from conftest import PAIR, load, read_jsonl
from datasets import load_from_disk
from transformers import AutoTokenizer
torch.set_num_threads(1)
model, draft, tokenizer = load("target"), load("draft"), AutoTokenizer.from_pretrained(PAIR / "target")
problems = read_jsonl(PAIR / "gsm8k_test.jsonl")
validation_problems, test_problems = problems[:2], problems[2:4]
judge, mined = AutoJudge.from_pretrained("judge"), load_from_disk("mined")
{block}
pushed = AutoJudge.from_pretrained("user/judge")
print(pushed.config == judge.config, sorted({{row["split"] for row in pushed.config.evaluation}}))
print(torch.equal(AutoJudge.from_pretrained("user/judges", subfolder="gsm8k").weight, judge.weight))
"""
    assert client(code).splitlines() == ["True ['test', 'validation']", "True"]
    assert {name for _, name in hub.repos} == {"user/judge", "user/judges", "user/mined"}


def test_cards_are_validated(hub, client):
    """By the Hub, which every push of a card asks; the server's rules are the Hub's for what we write."""
    code = """
    from huggingface_hub import ModelCard
    from test_model_card import MODELS, ROWS, judge_of
    from autojudge_hf import evaluation_summary
    rows = evaluation_summary(ROWS, dataset="openai/gsm8k", split="test", num_assistant_tokens=16)
    config = {"hidden_size": 4, "license": "mit", "evaluation": rows, **MODELS}
    judge_of(JudgeConfig(**config)).push_to_hub("user/judge")
    card = ModelCard.load("user/judge")
    print([result.metric_value for result in card.data.eval_results] == [
        row[metric] for row in rows for metric in ("accuracy", "tokens_per_cycle")])
    attempt(judge_of(JudgeConfig(**{**config, "license": "do what you like"})).push_to_hub, "user/unlicensed")
    """
    lines = client(code).splitlines()
    # The client's `ModelCard.validate` asks this address too, but before its version 2 of huggingface.co alone.
    assert hub.requests.count(("POST", "/api/validate-yaml")) == 2
    assert lines[0] == "True" and len(lines) == 2 and "license" in lines[1] and "user/unlicensed" in lines[1]
    assert len(hub.repos["models", "user/unlicensed"].commits) == 1
    assert "trade_off.png" in hub.repos["models", "user/judge"].commits[-1][1]


def test_a_judge_repo_runs_no_code_of_its_own_accord(hub, client, tmp_path):
    """Neither loading its judge nor decoding with it does; `trust_remote_code=True` alone."""
    evil = b"open('ran', 'w').close()\ndef generate(model, **kwargs):\n    raise SystemExit\n"
    files = dict.fromkeys(("custom_generate/generate.py", "modeling.py", "__init__.py", "setup.py"), (evil, False))
    hostile = {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}
    serve(hub, "user/evil", {**judge_files(judge_type="top_k", hidden_size=None), **files})
    config = json.loads(judge_files()["config.json"][0])
    serve(hub, "user/mapped", {"config.json": (json.dumps(config | hostile).encode(), False), **files})
    code = """
    judge = AutoJudge.from_pretrained("user/evil")
    attempt(AutoJudge.from_pretrained, "user/mapped")
    from conftest import PROMPT, random_llama, similar_model
    model = random_llama()
    options = {"assistant_model": similar_model(model), "max_new_tokens": 5, "do_sample": False}
    attempt(model.generate, PROMPT, custom_generate="user/evil", **options)
    print(model.generate(PROMPT, judge=judge, **options).shape)
    """
    lines = client(code).splitlines()
    assert "auto_map" in lines[0] and "trust_remote_code" in " ".join(lines[1:-1])
    assert lines[-1] == "torch.Size([1, 12])" and not (tmp_path / "ran").exists()
