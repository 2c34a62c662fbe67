# SPDX-License-Identifier: Apache-2.0
import json
import os
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from autojudge_hf import AutoJudge, JudgeConfig


ROOT = Path(__file__).parent.parent
PAIR = ROOT / "examples" / "tiny_pair"
SHARED_DATA = ROOT.parent / "shared" / "data"
MAX_NEW_TOKENS = 320
PROMPT = torch.tensor([[3, 14, 15, 9, 2, 6, 5]])


def load(role: str):
    return AutoModelForCausalLM.from_pretrained(PAIR / role, dtype=torch.float32).eval()


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target():
    return load("target")


@pytest.fixture(scope="session")
def draft():
    return load("draft")


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(PAIR / "target")


@pytest.fixture(scope="session")
def train_problems():
    return read_jsonl(PAIR / "gsm8k_train.jsonl")


@pytest.fixture(scope="session")
def test_problems():
    return read_jsonl(PAIR / "gsm8k_test.jsonl")


@pytest.fixture(scope="session")
def mined(target, draft, tokenizer, train_problems):
    """Mismatches of a few problems, enough for a judge that fits and is of no further use."""
    from autojudge_hf import mine_mismatches
    from autojudge_hf.tasks import GSM8K

    return mine_mismatches(
        target,
        draft,
        tokenizer,
        train_problems[:12],
        GSM8K(),
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=4,
        num_assistant_tokens=8,
    )


@pytest.fixture(scope="session")
def judge(mined, tmp_path_factory):
    from autojudge_hf import JudgeTrainer, JudgeTrainingArguments

    folder = tmp_path_factory.mktemp("judge") / "out"
    trainer = JudgeTrainer(JudgeTrainingArguments(output_dir=str(folder), validation_size=0.4), mined)
    trainer.train()
    return trainer.judge


def random_llama(seed: int = 0, vocab_size: int = 32, **overrides):
    """A small random model whose greedy text varies: weights scaled up, embeddings untied."""
    torch.manual_seed(seed)
    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return scaled_up(LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**config, **overrides})).eval())


def scaled_up(model):
    """Weights times 8: a random model's text varies then, so that a wrong cache shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(8)
    return model


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def similar_model(model, seed: int = 1, noise: float = 0.03):
    """A copy of a random model that agrees with it sometimes, neither never nor always."""
    import copy

    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(noise * parameter.std(correction=0) * torch.randn_like(parameter))
    return other


@pytest.fixture(scope="session")
def random_pair():
    model = random_llama()
    return model, similar_model(model)


@pytest.fixture
def linear_judge(random_pair):
    judge = AutoJudge.from_config(JudgeConfig(hidden_size=32))
    torch.manual_seed(5)
    judge.load_state_dict({"weight": torch.randn(32), "bias": torch.zeros(1)})
    return judge


@pytest.fixture
def top_k():
    return AutoJudge.from_config(JudgeConfig(judge_type="top_k"))
