# SPDX-License-Identifier: Apache-2.0
"""Sampling: the exact distribution, lossless and judged, with a draft model and with prompt lookup."""

import pytest
import reference
import torch
from conftest import PROMPT, random_llama, similar_model
from reference import NOT_CHANCE, chi_square_p
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import autojudge_hf.generation
from autojudge_hf.rows import RowProcessors, Rows


OF_SCORES = (
    lambda: TemperatureLogitsWarper(0.7),
    lambda: TopKLogitsWarper(40),
    lambda: TopPLogitsWarper(0.98),
    lambda: MinPLogitsWarper(0.001),
    lambda: TypicalLogitsWarper(0.97),
    lambda: EpsilonLogitsWarper(1e-4),
    lambda: EtaLogitsWarper(1e-4),
)


def test_seeded_sampling_repeats_and_differs_from_greedy(random_pair, linear_judge):
    model, assistant = random_pair
    options = {"do_sample": True, "max_new_tokens": 30, "assistant_model": assistant, "judge": linear_judge}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate(PROMPT, **options)[0].tolist())
    assert runs[0] == runs[1] != runs[2]


def warm(logits, tokens):
    """Temperature 0.9, and nothing else."""
    return (logits / 0.9).softmax(-1).double()


def among_the_best(logits, tokens):
    """`top_k=4`."""
    p = warm(logits, tokens)
    p[p < p.sort().values[-4]] = 0
    return p / p.sum()


def nucleus(logits, tokens):
    """`top_p=0.8`: the fewest tokens that have it together."""
    p = warm(logits, tokens)
    best, order = p.sort(descending=True)
    p[order[1 + int((best.cumsum(0) < 0.8).sum()) :]] = 0
    return p / p.sum()


def not_much_worse(logits, tokens):
    """`min_p=0.5`."""
    p = warm(logits, tokens)
    p[p < 0.5 * p.max()] = 0
    return p / p.sum()


def not_again(logits, tokens):
    """`repetition_penalty=1.8`: depends on what was written, rejected candidates not among it."""
    seen = torch.zeros(8, dtype=bool).index_fill(0, torch.tensor(tokens), True)
    return warm(torch.where(seen, torch.where(logits > 0, logits / 1.8, logits * 1.8), logits), tokens)


SHAPES = {
    among_the_best: {"top_k": 4},
    nucleus: {"top_p": 0.8},
    not_much_worse: {"min_p": 0.5},
    not_again: {"repetition_penalty": 1.8},
}


def exact_distribution(model, draft, prompt, threshold, shape=warm):
    """Of three tokens: the target's first, then two positions under the formula for judged sampling.

    `draft(response)` is the distribution that the candidate behind `response` is drawn from; `shape(logits, tokens)`
    makes one of logits.
    """

    def one(*response):
        p = shape(reference.logits_after(model, [*prompt, *response])[-1], [*prompt, *response])
        q = draft(response) if response else None
        if q is None:
            return p
        # The top-k judge's score is (rank - 1) / rank; a rejected best token counts as rank 1.5.
        rank = 1 + (p > p[:, None]).sum(dim=1).double()
        is_harmless = (rank.clamp(min=1.5) - 1) / rank.clamp(min=1.5) < threshold
        excess, lack = (q - p).clamp(min=0), (p - q).clamp(min=0)
        residual = lack / lack.sum().clamp(min=1e-300)
        return torch.minimum(p, q) + excess * is_harmless + (excess * ~is_harmless).sum() * residual

    first = one()
    second = torch.stack([one(a) for a in range(8)])
    third = torch.stack([torch.stack([one(a, b) for b in range(8)]) for a in range(8)])
    return (first[:, None, None] * second[:, :, None] * third).flatten()


@pytest.fixture(scope="module")
def pair_of_eight():
    model = random_llama(2, vocab_size=8)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.4)
    return model, similar_model(model, noise=1.0)


def drafted_by(assistant, shape=warm):
    return lambda response: shape(reference.logits_after(assistant, [*SHORT, *response])[-1], [*SHORT, *response])


def looked_up(response):
    """What followed the last tokens where they first occurred: certain, or nothing."""

    def draft(tokens):
        for n in (2, 1):
            for start in range(len(tokens) - n):
                if tokens[start : start + n] == tokens[-n:]:
                    return tokens[start + n : start + n + 2]
        return []

    first, *rest = response
    candidates = draft([*REPETITIVE, first])
    if rest:
        # The second candidate stands if the first was taken; a rejected one never comes back as the correction.
        candidates = candidates[1:] if candidates[:1] == rest else []
        candidates = candidates or draft([*REPETITIVE, first, *rest])
    return torch.eye(8).double()[candidates[0]] if candidates else None


SHORT, REPETITIVE = [1, 5, 2], [1, 5, 2, 7, 1, 4, 5, 1, 6, 3, 4, 2]


def sampled(model, prompt, num_rows, calls, **options):
    options = {"top_k": 0, **options, "do_sample": True, "temperature": 0.9}
    options |= {"max_new_tokens": 4, "num_assistant_tokens": 2}
    torch.manual_seed(0)
    counts = torch.zeros(512)
    for _ in range(calls):
        output = model.generate(torch.tensor([prompt] * num_rows), **options)
        a, b, c = output[:, len(prompt) : len(prompt) + 3].T
        counts += torch.bincount(a * 64 + b * 8 + c, minlength=512)
    return counts


@pytest.mark.parametrize(
    ("num_rows", "calls", "threshold"),
    [
        (4000, 8, 0.0),
        (4000, 8, 0.6),
        pytest.param(1, 3000, 0.0, marks=pytest.mark.slow),
        pytest.param(1, 3000, 0.6, marks=pytest.mark.slow),
    ],
)
def test_sampling_has_the_exact_distribution(pair_of_eight, top_k, num_rows, calls, threshold):
    """Three tokens from a vocabulary of 8, lossless and judged, rows of large batches and one by one."""
    model, assistant = pair_of_eight
    expected = exact_distribution(model, drafted_by(assistant), SHORT, threshold)
    if threshold == 0.6:
        lossless = exact_distribution(model, drafted_by(assistant), SHORT, 0.0)
        assert (expected - lossless).abs().sum() > 0.1
    options = {"assistant_model": assistant, "judge": top_k, "judge_threshold": threshold}
    assert chi_square_p(sampled(model, SHORT, num_rows, calls, **options), expected) > NOT_CHANCE


@pytest.mark.parametrize("threshold", [0.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES)
def test_processors_shape_both_distributions(pair_of_eight, top_k, shape, threshold):
    model, assistant = pair_of_eight
    expected = exact_distribution(model, drafted_by(assistant, shape), SHORT, threshold, shape)
    assert (expected - exact_distribution(model, drafted_by(assistant), SHORT, threshold)).abs().sum() > 0.1
    options = {"assistant_model": assistant, "judge": top_k, "judge_threshold": threshold, **SHAPES[shape]}
    assert chi_square_p(sampled(model, SHORT, 4000, 8, **options), expected) > NOT_CHANCE


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_sampling_with_prompt_lookup_has_the_exact_distribution(pair_of_eight, top_k, threshold):
    model, _ = pair_of_eight
    expected = exact_distribution(model, looked_up, REPETITIVE, threshold)
    if threshold == 0.6:
        assert (expected - exact_distribution(model, looked_up, REPETITIVE, 0.0)).abs().sum() > 0.1
    options = {"prompt_lookup_num_tokens": 2, "judge": top_k, "judge_threshold": threshold}
    assert chi_square_p(sampled(model, REPETITIVE, 1000, 13, **options), expected) > NOT_CHANCE


def test_plain_resampling_would_be_noticed(pair_of_eight, top_k, monkeypatch):
    """A test of the test above: a correction drawn from p instead of the residual must fail it."""
    real = autojudge_hf.generation.verify_sampled

    def from_p(candidate_ids, target_logits, assistant_logits, lengths):
        verification = real(candidate_ids, target_logits, assistant_logits, lengths)
        p = target_logits.softmax(dim=-1)
        return verification._replace(own_tokens=torch.multinomial(p.flatten(0, 1), 1).view(p.shape[:2]))

    monkeypatch.setattr(autojudge_hf.generation, "verify_sampled", from_p)
    model, assistant = pair_of_eight
    expected = exact_distribution(model, drafted_by(assistant), SHORT, 0.0)
    options = {"assistant_model": assistant, "judge": top_k, "judge_threshold": 0.0}
    assert chi_square_p(sampled(model, SHORT, 4000, 5, **options), expected) < 1e-6


@pytest.mark.parametrize("others", [[], [RepetitionPenaltyLogitsProcessor(1.3)]], ids=["scores alone", "tokens too"])
def test_processors_see_each_row_and_position_by_itself(others):
    """Those that only look at scores run once over all of them; the outcome is that of one position at a time."""
    processors = LogitsProcessorList([*others, *(make() for make in OF_SCORES)])
    rows = Rows(torch.tensor([[1, 2, 3], [4, 5, 6]]), None)
    torch.manual_seed(0)
    candidate_ids, logits = torch.randint(0, 50, (2, 4)), 3 * torch.randn(2, 5, 50)
    expected = torch.stack(
        [
            torch.cat([processors(torch.cat([prompt, new[:i]])[None], of_row[i : i + 1]) for i in range(5)])
            for prompt, new, of_row in zip(rows.prompts, candidate_ids, logits)
        ]
    )
    processed = RowProcessors(processors, 2)(rows, [4, 4], candidate_ids, logits)
    assert torch.equal(processed, expected) and processed.isinf().any() and not torch.equal(processed, logits)


def test_a_subclass_may_look_at_the_tokens():
    seen = []

    class Looking(TemperatureLogitsWarper):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.tolist())
            return super().__call__(input_ids, scores)

    rows = Rows(torch.tensor([[1, 2, 3]]), None)
    RowProcessors(LogitsProcessorList([Looking(0.5)]), 1)(rows, [4], torch.tensor([[7, 8]]), torch.randn(1, 3, 50))
    assert seen == [[[1, 2, 3]], [[1, 2, 3, 7]], [[1, 2, 3, 7, 8]]]
