# SPDX-License-Identifier: Apache-2.0
"""Judges: from what verification knows of a mismatch to a score; saving them, and pushing them to the Hub."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from .configuration import JudgeConfig
from .features import JudgeInputs, entropy, kl_divergence
from .hub import check_subfolder, create_repo, push_folder
from .model_card import JudgeCard, render_custom_generate
from .plots import can_plot, plot_trade_off
from .verification import of_candidates


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, PLOT_NAME = "config.json", "model.safetensors", "README.md", "trade_off.png"
#: What `save_pretrained` writes or replaces.
SAVED_NAMES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, PLOT_NAME, "custom_generate")


class Judge(nn.Module):
    """Base class: maps mismatches to importance scores, as logits. Subclasses define `forward`.

    Scores are fp32 logits, whatever the models' dtype.
    """

    judge_type: str
    #: Whether the score depends on hidden states, so that verification has to keep them.
    reads_states = False
    #: Whether it depends on the distributions that candidates are drafted from, so that drafting has to keep them.
    reads_assistant_logits = False

    def __init__(self, config: JudgeConfig):
        super().__init__()
        if config.judge_type != self.judge_type:
            raise ValueError(f"{type(self).__name__} needs judge_type={self.judge_type!r}, got {config.judge_type!r}.")
        self.config = config

    def forward(self, inputs: JudgeInputs) -> torch.Tensor:
        """Scores of shape `(b, k)`: the logit of the probability that accepting the candidate changes the answer."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Writes `config.json`, `model.safetensors`, the card, and what `custom_generate=` needs, to a folder.

        The plot of `config.evaluation` is drawn where matplotlib is installed.
        """
        folder = Path(save_directory)
        self._write(folder)
        self.save_card(folder, name=folder.resolve().name)
        self._write_custom_generate(folder, judge_id=str(folder.resolve()))

    def save_card(self, folder: Path, name: str, subfolder: str = "") -> None:
        """Writes README.md, and the picture it shows, for a judge that is loaded by `name`."""
        plot_name = PLOT_NAME if self.config.evaluation and can_plot() else None
        card = JudgeCard(self.config, name, subfolder, plot_name)
        if plot_name:
            plot_trade_off(card.curves(), folder / plot_name)
        elif not self.config.evaluation:
            (folder / PLOT_NAME).unlink(missing_ok=True)  # of a judge that this one replaces
        (folder / CARD_NAME).write_text(card.render(), encoding="utf-8")

    def _write(self, folder: Path) -> None:
        """Config and weights, once both are whole."""
        if folder.is_file():
            raise OSError(f"Expected a folder to save the judge to, got the file {folder.name}.")
        # In no less than they were trained in, whatever the module was cast to since.
        tensors = {
            name: (tensor if tensor.dtype == torch.float64 else tensor.float()).contiguous()
            for name, tensor in self.state_dict().items()
        }
        if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{broken} have values that aren't finite. Train the judge first, or load it.")
        self.config = replace(self.config)  # checks what was set since it was made
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as part:
            save_file(tensors, Path(part) / WEIGHTS_NAME, metadata={"format": "pt"})
            (Path(part) / CONFIG_NAME).write_text(self.config.to_json_string(), encoding="utf-8")
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                (Path(part) / name).replace(folder / name)

    def _write_custom_generate(self, folder: Path, judge_id: str) -> None:
        (folder / "custom_generate").mkdir(exist_ok=True)
        for name, text in render_custom_generate(judge_id).items():
            (folder / "custom_generate" / name).write_text(text, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload judge",
        subfolder: str = "",
    ) -> str:
        """Uploads what [`~Judge.save_pretrained`] writes, in one commit.

        Args:
            repo_id (`str`): Hub repository, made if there is none; without a name in front it is the user's own.
            private (`bool`, *optional*): whether a new repository is private; default: the account's setting.
            token (`str` or `bool`, *optional*): default: the one of `hf auth login`.
            commit_message (`str`, *optional*, defaults to `"Upload judge"`).
            subfolder (`str`, *optional*): where in a collection of judges. (`custom_generate=` works with a judge at
                the top only.)

        Returns:
            `str`: the commit's address.

        Raises:
            OSError: where the Hub refuses or can't be reached; the repository stays as it was, a new one empty.
            ValueError: where it finds fault with the card, say an unknown licence; the same.
        """
        subfolder = subfolder or ""
        check_subfolder(subfolder)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self._write(folder)  # whatever is wrong with the judge is told before there is a repository
            repo_id = create_repo(repo_id, private=private, token=token)
            self.save_card(folder, repo_id, subfolder)
            if not subfolder:
                self._write_custom_generate(folder, judge_id=repo_id)
            return push_folder(folder, repo_id, token=token, commit_message=commit_message, subfolder=subfolder)


class LinearJudge(Judge):
    """Logistic regression on hidden states, scaler folded in: score = features @ weight + bias.

    The tensors of a learned judge are NaN until they are loaded or set, and a score that isn't finite accepts nothing:
    a judge that was never trained can't judge.
    """

    judge_type = "linear"
    reads_states = True

    def __init__(self, config: JudgeConfig):
        super().__init__(config)
        if config.num_features == 0:
            raise ValueError(
                f"A {self.judge_type} judge needs features: set `hidden_size` (the target's), "
                "`assistant_hidden_size`, or `logit_features`."
            )
        self.reads_assistant_logits = config.assistant_logit_features
        self._add("weight", config.num_features)
        self._add("bias", 1, dtype=torch.float64)

    def _add(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """Adds a tensor, NaN until it's loaded. A bias needs more digits: it holds what the scaler subtracts."""
        empty = torch.full(shape, float("nan"), dtype=dtype)
        setattr(self, name, nn.Parameter(empty, requires_grad=False))

    def forward(self, inputs: JudgeInputs) -> torch.Tensor:
        return self.decision_function(inputs.features)

    def decision_function(self, features: torch.Tensor) -> torch.Tensor:
        """Scores as fp32 logits, shape `(..., f)` to `(...)`; summed in double precision."""
        features = torch.as_tensor(features)  # of NumPy, as scikit-learn has them, too
        # Apple's GPUs have no double precision.
        device = torch.device("cpu") if features.device.type == "mps" else features.device
        tensors = {name: tensor.to(device, torch.float64) for name, tensor in self._parameters.items()}
        return self._scores(features.to(device, torch.float64), **tensors).to(features.device, torch.float32)

    @staticmethod
    def _scores(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return features @ weight + bias

    def predict_proba(self, features: torch.Tensor) -> torch.Tensor:
        """Importance in [0, 1], shape `(..., f)` to `(...)`."""
        return torch.sigmoid(self.decision_function(features))


class MLPJudge(LinearJudge):
    """One hidden layer on the same features: score = relu(features @ hidden_weight + hidden_bias) @ weight + bias.

    It tells more than a linear judge where there are examples enough, and costs `intermediate_size` times as much,
    which is still nothing beside a model's layer.
    """

    judge_type = "mlp"

    def __init__(self, config: JudgeConfig):
        super().__init__(config)
        size = config.intermediate_size
        self._add("hidden_weight", config.num_features, size)
        self._add("hidden_bias", size, dtype=torch.float64)
        self._add("weight", size)

    @staticmethod
    def _scores(
        features: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        hidden_weight: torch.Tensor,
        hidden_bias: torch.Tensor,
    ) -> torch.Tensor:
        return torch.relu(features @ hidden_weight + hidden_bias) @ weight + bias


class TopKJudge(Judge):
    """Training-free: the better a candidate ranks under the target, the less important it is.

    With rank r the score is (r - 1) / r, its logit log(r - 1): a threshold t accepts the ranks with
    r - 1 < t / (1 - t). The default of 0.6 accepts rank 2, 0.7 also rank 3, 0.76 also rank 4. (Rank 1, which only
    sampling ever rejects, counts as r = 1.5.)
    """

    judge_type = "top_k"

    def forward(self, inputs: JudgeInputs) -> torch.Tensor:
        logit = of_candidates(inputs.target_logits, inputs.candidate_ids)
        num_better = (inputs.target_logits > logit[..., None]).sum(dim=-1)
        return num_better.float().clamp(min=0.5).log()


class RuleJudge(TopKJudge):
    """The rule for mathematics (AutoJudge, arXiv 2504.20039): symbols are important, else the rank decides.

    A mismatch is rejected where the candidate or the target's best token is one of `config.important_token_ids`
    (without any it is `top_k`), as they are when the judge is made; [`symbol_token_ids`] finds a tokenizer's numbers
    and operators.
    """

    judge_type = "rule"

    def __init__(self, config: JudgeConfig):
        super().__init__(config)
        # On the device like weights, and in order, so that a question waits for nothing. (Judges are loaded on the
        # meta device.)
        symbols = torch.tensor(sorted(config.important_token_ids) or [-1], dtype=torch.long, device="cpu")
        self.register_buffer("symbols", symbols, persistent=False)

    def forward(self, inputs: JudgeInputs) -> torch.Tensor:
        is_important = self._are_symbols(inputs.candidate_ids) | self._are_symbols(inputs.target_logits.argmax(dim=-1))
        return torch.where(is_important, torch.inf, super().forward(inputs))

    def _are_symbols(self, token_ids: torch.Tensor) -> torch.Tensor:
        symbols = self.symbols.to(token_ids.device)
        places = torch.searchsorted(symbols, token_ids.contiguous()).clamp(max=len(symbols) - 1)
        return symbols[places] == token_ids


def symbol_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens whose text has a digit or a sign of arithmetic in it, for `JudgeConfig.important_token_ids`."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return [token for token, text in enumerate(texts) if re.search(r"[\d+\-*/=<>%^]", text)]


class MarginJudge(Judge):
    """Training-free: the closer a candidate's probability is to the best token's, the less important it is.

    With p the target's distribution, the score is 1 - p(candidate) / max p: a threshold t accepts what is more than
    1 - t times as likely as the best token. The default of 0.9 asks for a tenth.
    """

    judge_type = "margin"

    def forward(self, inputs: JudgeInputs) -> torch.Tensor:
        candidate = of_candidates(inputs.target_logits, inputs.candidate_ids)
        return _one_minus_exp(candidate - inputs.target_logits.amax(dim=-1))


class EntropyJudge(Judge):
    """Training-free: typical acceptance (Medusa, arXiv 2401.10774, section 2.3.1).

    With p the target's distribution and H its entropy in nats, a candidate is accepted if p(candidate) exceeds
    min(e, sqrt(e) exp(-H)). The largest e for which it is still accepted is max(p, (p exp(H))^2), and the score is 1
    less that: a threshold t means e = 1 - t. The default of 0.91 means e = 0.09.
    """

    judge_type = "entropy"

    def forward(self, inputs: JudgeInputs) -> torch.Tensor:
        log_p = inputs.target_logits.log_softmax(dim=-1)
        candidate = of_candidates(log_p, inputs.candidate_ids)
        return _one_minus_exp(torch.maximum(candidate, 2 * (candidate + entropy(log_p))))


class KLJudge(Judge):
    """Training-free: the closer the two models' distributions are, the less important a mismatch is.

    With p the target's distribution and q the assistant's, the score is 1 - exp(-KL(p || q)), over the tokens that
    both could write. After the idea of arXiv 2601.04766, without its exception for a target that is certain.
    """

    judge_type = "kl"
    reads_assistant_logits = True

    def forward(self, inputs: JudgeInputs) -> torch.Tensor:
        return _one_minus_exp(-kl_divergence(inputs.target_logits, inputs.assistant_logits))


def _one_minus_exp(x: torch.Tensor) -> torch.Tensor:
    """The score 1 - e^x as a logit. A score of 0 is moved up a little, for it to be finite; 1 stays infinite."""
    x = x.clamp(max=-1e-6)
    return torch.log(-torch.expm1(x)) - x
