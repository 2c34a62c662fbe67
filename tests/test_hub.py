# SPDX-License-Identifier: Apache-2.0
"""Push and pull through the real client of the Hub, with a Hub on the loopback interface.

The client reads its endpoint once, so that everything here runs in processes of its own.
"""

import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import PROMPT, ROOT, random_llama, similar_model
from hub_server import Hub, Repo
from safetensors.torch import save

from autojudge_hf import AutoJudge, JudgeConfig


PREAMBLE = """
import os, sys, torch
sys.path.insert(0, "tests")
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


@pytest.fixture
def client(hub, tmp_path):
    """Runs code in a process whose Hub is the loopback one; returns what it prints."""

    def run(code, token="hf_writer", preamble=PREAMBLE, expected=0, **environment):
        environment = {
            "PATH": os.environ["PATH"],
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
            cwd=ROOT,
            env=environment,
        )
        assert result.returncode == expected, result.stderr
        assert "hf_writer" not in result.stdout + result.stderr
        return result.stdout

    return run


def judge_files(**config):
    judge = AutoJudge.from_config(JudgeConfig(hidden_size=4, **config))
    tensors = {"weight": torch.ones(4), "bias": torch.zeros(1, dtype=torch.float64)}
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


def test_push_wipe_pull_decode(hub, client, tmp_path):
    """The same tokens before the push, after the pull, and offline; and without importing this library."""
    decoding = PREAMBLE + DECODE
    code = "judge = linear(size=32)\nprint(decode(judge))\nprint(judge.push_to_hub('judge', private=True))"
    before = client(code, preamble=decoding)
    tokens, url = before.splitlines()
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
    client(alone.replace("TRUST", "False"), preamble="", expected=1)


def test_revisions_subfolders_and_caches(hub, client, tmp_path):
    repo = serve(hub, files=judge_files(threshold=0.1))
    repo.commit(judge_files(threshold=0.2), "second")
    pinned = repo.commits[0][0]
    output = client(
        f"""
    load = AutoJudge.from_pretrained
    print(load("user/judge").config.threshold, load("user/judge", revision={pinned!r}).config.threshold)
    print(load("user/judge", revision="first", cache_dir={str(tmp_path / "cache")!r}).config.threshold)
    print(load("user/judge", revision={pinned!r}, local_files_only=True).config.threshold)
    attempt(load, "user/judge", revision="third")
    attempt(load, "user/judge", revision="first", cache_dir={str(tmp_path / "other")!r}, local_files_only=True)
    for seed, name in enumerate(("gsm8k", "code")):
        linear(seed).push_to_hub("user/judges", subfolder=name, commit_message="Add " + name)
    print(torch.equal(load("user/judges", subfolder="code").weight, linear(1).weight))
    attempt(load, "user/judges", subfolder="poems")
    """
    )
    lines = output.splitlines()
    assert lines[:3] == ["0.2 0.1", "0.1", "0.1"]
    assert "no such `revision`" in lines[3] and "isn't in the cache" in lines[4] and lines[5] == "True"
    assert "poems/config.json of 'user/judges': it has no such file" in lines[6]
    assert (tmp_path / "cache").is_dir() and len(lines) == 7
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
    assert len(lines) == 7 and "Can't push to 'other/judge': the token isn't valid (HTTP 401)" in lines[6]
    assert ("GET", "/user/model/resolve/main/model.safetensors") not in hub.requests
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
    }
    kinds = {"user/one": 400, "user/two": "drop", "user/three": 403}
    for name in where:
        serve(hub, name)
    code = """
    for seed, name in enumerate(("user/one", "user/two", "user/three")):
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
    assert [line for line in lines if not line.startswith("OSError")] == ["4", "True"] * 3
    for name, line in zip(where, lines[::3]):
        assert line.startswith(f"OSError: Can't push to '{name}': ") and line.endswith(
            "Nothing was changed; try again."
        )
    assert all(len(hub.repos["models", name].commits) == 2 for name in where)


def test_trainer_and_datasets_push(hub, client):
    output = client(
        """
    from test_trainer import made_up
    from autojudge_hf import JudgeTrainer, JudgeTrainingArguments
    import tempfile
    from datasets import load_dataset
    mined = made_up()
    mined.push_to_hub("user/mined", private=True)
    back = load_dataset("user/mined", split="train")
    print(back[:] == mined[:])
    trainer = JudgeTrainer(JudgeTrainingArguments(output_dir=tempfile.mkdtemp(), C_grid=[0.1]), back)
    trainer.train()
    trainer.push_to_hub("user/trained")
    print(torch.equal(AutoJudge.from_pretrained("user/trained").weight, trainer.judge.weight))
    """
    )
    assert output.splitlines()[-2:] == ["True", "True"]
    assert hub.repos["datasets", "user/mined"].private
