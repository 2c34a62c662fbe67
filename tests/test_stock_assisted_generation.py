# SPDX-License-Identifier: Apache-2.0
"""Stock assisted generation with this library imported: what transformers' public tests describe still holds.

None of these calls has a `judge`; the wrapper around `generate` must leave them alone.
"""

import copy

import numpy as np
import pytest
import torch
from conftest import PROMPT, random_llama
from transformers import GenerationMixin, T5Config, T5ForConditionalGeneration
from transformers.generation.candidate_generator import AssistedCandidateGenerator

import autojudge_hf  # noqa: F401  (wraps `generate`)


REPETITIVE = torch.tensor([[3, 14, 15, 9, 3, 14, 2, 3, 14, 15, 7, 2, 3]])


@pytest.fixture(autouse=True)
def wrapped():
    assert GenerationMixin.generate._wraps_judge


@pytest.fixture
def assistant(random_pair):
    """With a generation config of its own: stock generation writes its schedule there."""
    assistant = copy.deepcopy(random_pair[1])
    assistant.generation_config.update(num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    return assistant


@pytest.mark.parametrize("same", [True, False])
def test_assisted_decoding_matches_greedy_search(random_pair, assistant, same):
    model, _ = random_pair
    options = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True}
    options |= {"output_logits": True, "output_hidden_states": True}
    greedy = model.generate(PROMPT, **options)
    assisted = model.generate(PROMPT, assistant_model=model if same else assistant, **options)
    assert torch.equal(greedy.sequences, assisted.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(getattr(greedy, name)), torch.cat(getattr(assisted, name)))
    assert len(greedy.hidden_states) == len(assisted.hidden_states)


def test_prompt_lookup_matches_greedy_search(random_pair):
    model, _ = random_pair
    options = {"do_sample": False, "max_new_tokens": 20}
    expected = model.generate(REPETITIVE, **options)
    assert torch.equal(model.generate(REPETITIVE, prompt_lookup_num_tokens=3, **options), expected)


def test_prompt_lookup_stops_at_eos(random_pair):
    model, _ = random_pair
    free = model.generate(REPETITIVE, do_sample=False, max_new_tokens=20)
    eos = free[0, -8].item()
    stopped = model.generate(
        REPETITIVE, do_sample=False, max_new_tokens=20, eos_token_id=eos, prompt_lookup_num_tokens=3
    )
    assert stopped[0, -1] == eos and (stopped[0, REPETITIVE.shape[1] :] == eos).sum() == 1


def test_assisted_sampling_repeats_with_its_seed(random_pair, assistant):
    model, _ = random_pair
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate(PROMPT, do_sample=True, max_new_tokens=20, assistant_model=assistant).tolist())
    assert runs[0] == runs[1] != runs[2]


def test_early_exit_matches_greedy_search(random_pair):
    model, _ = random_pair
    options = {"do_sample": False, "max_new_tokens": 20}
    expected = model.generate(PROMPT, **options)
    assert torch.equal(model.generate(PROMPT, assistant_early_exit=1, **options), expected)
    assert model.config.num_hidden_layers == 2


def test_generated_length(random_pair, assistant):
    model, _ = random_pair
    for options, length in (({"max_new_tokens": 10}, 17), ({"max_length": 15}, 15), ({"min_new_tokens": 10}, None)):
        output = model.generate(PROMPT, do_sample=False, assistant_model=assistant, **{"max_length": 30, **options})
        assert output.shape[1] == (length or 30)


@pytest.mark.parametrize(("schedule", "is_kept"), [("heuristic", True), ("heuristic_transient", False)])
def test_schedules(random_pair, assistant, schedule, is_kept):
    """Their own model as the assistant: everything matches, so the draft length grows by two a cycle."""
    model = copy.deepcopy(random_pair[0])
    model.generation_config.update(
        num_assistant_tokens=5, num_assistant_tokens_schedule=schedule, assistant_confidence_threshold=0.0
    )
    random_pair[0].generate(PROMPT, do_sample=False, max_new_tokens=20, assistant_model=model)
    grown = model.generation_config.num_assistant_tokens
    assert grown > 5 if is_kept else grown == 5


def test_batches_are_refused(random_pair, assistant):
    with pytest.raises(ValueError, match="batch_size = 1"):
        random_pair[0].generate(PROMPT.repeat(2, 1), max_new_tokens=5, assistant_model=assistant)


def test_different_vocabularies_are_refused(random_pair):
    with pytest.raises(ValueError, match="different tokenizers"):
        random_pair[0].generate(PROMPT, max_new_tokens=5, assistant_model=random_llama(1, 40))


def test_unused_arguments_are_refused(random_pair, assistant):
    with pytest.raises(ValueError, match="foo"):
        random_pair[0].generate(PROMPT, max_new_tokens=5, assistant_model=assistant, foo="bar")


def test_encoder_decoder():
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    assistant = copy.deepcopy(model)
    options = {"do_sample": False, "max_new_tokens": 10}
    expected = model.generate(PROMPT, **options)
    assert torch.equal(model.generate(PROMPT, assistant_model=assistant, **options), expected)


@pytest.mark.parametrize(
    ("num_matches", "probs", "matches"),
    [
        (0, [0.9], [0]),
        (1, [0.8, 0.9], [1, 0]),
        (4, [0.9, 0.8, 0.7, 0.6, 0.3], [1, 1, 1, 1, 0]),
        (5, [0.9, 0.8, 0.7, 0.6, 0.3], [1, 1, 1, 1, 1]),
    ],
)
def test_confidence_of_a_draft_is_paired_with_its_outcome(random_pair, assistant, num_matches, probs, matches):
    model, _ = random_pair
    assistant.generation_config.update(assistant_confidence_threshold=0.4)
    generator = AssistedCandidateGenerator(PROMPT, assistant, model.generation_config, {})
    generator.probs = list(probs)
    generator.update_candidate_strategy(PROMPT, np.zeros((1, len(probs) + 1, 1)), num_matches)
    assert generator.matches == matches
