# SPDX-License-Identifier: Apache-2.0
"""What must hold of every assistant that drafts from what the target computed."""

import reference
import torch
from conftest import left_padded
from test_mining import LastTokens, NumberTokenizer, assert_same, found, mine_random
from transformers.modeling_outputs import CausalLMOutputWithPast

from autojudge_hf import AutoJudge, JudgeConfig
from autojudge_hf.search import GumbelNoise


PROMPTS = [[3, 14, 15, 9, 2, 6, 5, 3, 5, 8, 9], [2, 7, 1], [8, 2, 8, 1, 8, 2, 8]]
MINED = [{"text": f"3 {i} 15 9 {(i * 5) % 16}"} for i in range(3)]
OPTIONS = {"do_sample": False, "max_new_tokens": 40}


def drafts_of_a_judged_call(monkeypatch, drafter, pair, judge, num_rows, window, **options):
    """Each row's text and candidates at every cycle, within the window and beyond it, behind rejected candidates and
    accepted ones."""
    target, assistant = pair
    drafts, get_candidates = [], drafter.get_candidates

    def seen(self, input_ids, attention_mask=None, *args):
        sequence, logits = get_candidates(self, input_ids, attention_mask, *args)
        for row, mask in zip(sequence, [None] * num_rows if attention_mask is None else attention_mask):
            first = 0 if mask is None else int((mask == 0).sum())
            drafts.append((row[first : input_ids.shape[1]].tolist(), row[input_ids.shape[1] :].tolist()))
        return sequence, logits

    monkeypatch.setattr(drafter, "get_candidates", seen)
    output = target.generate(
        **left_padded(PROMPTS[:num_rows]),
        assistant_model=assistant,
        judge=judge,
        judge_threshold=0.9,
        return_dict_in_generate=True,
        **options,
        **OPTIONS,
    )
    assert output.num_judge_accepted.sum() > 0 and output.num_judge_rejected.sum() > 0
    assert len({len(text) for text, _ in drafts}) > 5 and max(len(text) for text, _ in drafts) > 3 * window
    return drafts


def drafts_of_stock(model, generator, tokens):
    """What one of transformers' generators drafts behind a text, from one forward of its target over all of it."""
    text = torch.tensor([tokens])
    outputs = model(text[:, :-1], **generator.model_kwargs_overrides)
    drafted, _ = generator.get_candidates(
        text,
        model_kwargs={"attention_mask": torch.ones_like(text), "position_ids": torch.arange(len(tokens))[None]},
        model_outputs=CausalLMOutputWithPast(hidden_states=outputs.hidden_states),
        is_first_iteration=False,
        n_last_matches=0,
    )
    return drafted[0, len(tokens) :].tolist()


def check_lossless(pair, judge, num_rows, **options):
    target, assistant = pair
    output = target.generate(
        **left_padded(PROMPTS[:num_rows]),
        assistant_model=assistant,
        judge=judge,
        judge_threshold=0.0,
        return_dict_in_generate=True,
        **options,
        **OPTIONS,
    )
    for row, prompt in zip(output.sequences, PROMPTS):
        expected = reference.greedy(target, prompt, OPTIONS["max_new_tokens"], ())
        assert row[-OPTIONS["max_new_tokens"] :].tolist() == expected[len(prompt) :]
    assert 0 < output.num_matches.sum() < output.num_candidates.sum()
    return output


def check_rows_alone(pair, **options):
    """With a judge of the target's states, and rows that end at different times."""
    target, assistant = pair
    torch.manual_seed(5)
    judge = AutoJudge.from_config(JudgeConfig(hidden_size=32))
    judge.load_state_dict({"weight": torch.randn(32), "bias": torch.zeros(1)})
    options |= {**OPTIONS, "assistant_model": assistant, "judge": judge, "judge_threshold": 0.5}
    options |= {"return_dict_in_generate": True, "eos_token_id": 8, "pad_token_id": 0}
    together = target.generate(**left_padded(PROMPTS), **options)
    assert together.num_judge_accepted.sum() > 0 and together.num_judge_rejected.sum() > 0
    width, lengths = max(map(len, PROMPTS)), set()
    for row, prompt in zip(together.sequences[:, width:].tolist(), PROMPTS):
        alone = target.generate(torch.tensor([prompt]), **options).sequences[0, len(prompt) :].tolist()
        assert row == alone + [0] * (len(row) - len(alone))
        lengths.add(len(alone))
    assert len(lengths) > 1


def check_sampling(pair, judge, **options):
    """The first two tokens of many samples: one of the prefill, and one that the assistant drafts."""
    (model, assistant), prompt, num_samples = pair, PROMPTS[1], 4000
    torch.manual_seed(0)
    options = {"num_assistant_tokens": 2, **options}
    output = model.generate(
        torch.tensor([prompt] * num_samples),
        do_sample=True,
        top_k=0,
        temperature=3.0,
        max_new_tokens=3,
        assistant_model=assistant,
        judge=judge,
        judge_threshold=0.0,
        return_dict_in_generate=True,
        **options,
    )
    assert 0 < output.num_matches.sum() < output.num_candidates.sum()
    first = torch.tensor([[*prompt, token] for token in range(16)])
    with torch.no_grad():
        p_first = (model(first).logits[:, len(prompt) - 1] / 3)[0].softmax(-1)
        p_second = (model(first).logits[:, -1] / 3).softmax(-1)
    expected = (p_first[:, None] * p_second).flatten()
    drawn = output.sequences[:, len(prompt) : len(prompt) + 2]
    counts = torch.bincount(drawn[:, 0] * 16 + drawn[:, 1], minlength=256)
    assert reference.chi_square_p(counts, expected) > reference.NOT_CHANCE


def check_mining(pair, draft, length, temperature=0.0, **options):
    """Labels and features against a search that asks for every draft anew; whatever is in flight."""
    model, _ = pair
    noise = GumbelNoise(temperature, seed=0) if temperature > 0 else None
    options |= {"temperature": temperature, "logit_features": True}
    mined, expected = mine_random(pair, MINED, batch_size=2, **options), []
    for i, example in enumerate(MINED):
        prompt = NumberTokenizer().encode(example["text"], False)
        search = reference.algorithm_1_by_drafts(
            model, draft, length, NumberTokenizer(), LastTokens(MINED), prompt, 24, (), noise
        )
        expected += [(i, *row) for row in search]
    assert [(row["example_id"], *f) for row, f in zip(mined, found(mined))] == expected
    assert {row[-1] for row in expected} == {0, 1}
    for row in mined:
        text = torch.tensor([[*row["input_ids"], row["candidate_token_id"]]])
        with torch.no_grad():
            state = model(text, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(torch.tensor(row["features"])[:32], state, atol=1e-3, rtol=1e-3)
    assert_same(mine_random(pair, MINED, batch_size=5, **options), mined)
    return mined
