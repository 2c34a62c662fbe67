# SPDX-License-Identifier: Apache-2.0
"""Assistants with a tokenizer of their own: the same drafts as with one tokenizer, and the target's tokens."""

import copy
import functools
import json

import pytest
import reference
import torch
from conftest import MAX_NEW_TOKENS, left_padded, random_llama
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, pipeline
from transformers.utils import logging

from autojudge_hf import AutoJudge, JudgeConfig, calibrate_threshold, evaluate_judge, judge_decoding
from autojudge_hf.other_tokenizer import OtherTokenizer, _Translation
from autojudge_hf.tasks import GSM8K


OPTIONS = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, "return_dict_in_generate": True}
LOSSLESS = {**OPTIONS, "judge_threshold": 0.0}
COUNTS = ("num_target_forwards", "num_candidates", "num_matches", "num_judge_accepted", "num_judge_rejected")


def renumbered(model, tokenizer, more=6):
    """The same model and tokenizer, whose tokens have other numbers, among some that nobody uses."""
    size = model.config.vocab_size + more
    number = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: number[i].item() for token, i in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = number[token["id"]].item()
    state["post_processor"] = None
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    other_tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **names)
    other = copy.deepcopy(model)
    other.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for embeddings in ("get_input_embeddings", "get_output_embeddings"):  # or the same weights twice
            weight = getattr(other, embeddings)().weight
            weight.zero_()
            weight[number[: model.config.vocab_size]] = getattr(model, embeddings)().weight
    other.generation_config.eos_token_id = number[torch.tensor(model.generation_config.eos_token_id)].tolist()
    return other, other_tokenizer


@pytest.fixture(scope="module")
def others(draft, tokenizer):
    return renumbered(draft, tokenizer)


@pytest.fixture(scope="module")
def prompts(tokenizer, test_problems):
    return [tokenizer.encode(GSM8K().prompt(p, tokenizer), add_special_tokens=False) for p in test_problems[:4]]


@pytest.fixture(scope="module")
def expected(target, prompts):
    """What the target writes behind each prompt."""
    return [reference.greedy(target, prompt, 40, ())[len(prompt) :] for prompt in prompts[:3]]


def of_bytes():
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, **{c: i for i, c in enumerate(alphabet, 1)}}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def of_words(texts, size=600):
    """As SentencePiece cuts: a text begins with a space that nobody wrote, and words keep the one before them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


# The same drafts


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_other_numbers_draft_the_same(target, draft, tokenizer, others, prompts, threshold, num_rows):
    """Where only the tokens' numbers differ, nothing does: not a candidate, chat's special tokens included."""
    other, other_tokenizer = others
    judge = AutoJudge.from_config(JudgeConfig(judge_type="margin"))
    inputs = left_padded(prompts[:num_rows])
    decode = functools.partial(target.generate, **inputs, judge=judge, num_assistant_tokens=8, **OPTIONS)
    expected = decode(assistant_model=draft, judge_threshold=threshold)
    got = decode(
        assistant_model=other, tokenizer=tokenizer, assistant_tokenizer=other_tokenizer, judge_threshold=threshold
    )
    assert torch.equal(got.sequences, expected.sequences)
    for name in COUNTS:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert expected.num_matches.sum() > 100


class Parrot:
    """In the assistant's place: it knows a text by heart, and drafts what comes next in its own tokens."""

    def __init__(self, assistant_model, tokenizer, text):
        self.assistant_model, self.tokenizer, self.text = assistant_model, tokenizer, text
        self.vocab_size, self.eos_token_ids, self.cache = len(tokenizer), set(), DynamicCache()
        self.heard = None

    def get_candidates(self, input_ids, attention_mask, max_candidates):
        length = max(max_candidates)
        self.heard = input_ids[0].tolist()
        canonical = self.tokenizer.encode(self.text, add_special_tokens=False)
        n = len(self.heard)
        if self.heard == canonical[:n]:
            rest = canonical[n:]
        else:
            said = self.tokenizer.decode(self.heard)
            assert self.text.startswith(said)
            both = self.tokenizer.encode(said + self.text[len(said) :], add_special_tokens=False)
            head = self.tokenizer.encode(said, add_special_tokens=False)
            rest = both[len(head) :] if both[: len(head)] == head else []
        return torch.tensor([self.heard + rest[:length]]), None

    def shrink(self, rows, unneeded):
        pass


@pytest.mark.parametrize("names", [("pair", "bytes"), ("pair", "words"), ("words", "pair"), ("words", "bytes")])
def test_a_draft_is_the_targets_own_tokens(target, draft, tokenizer, test_problems, names):
    """An assistant that knows what comes drafts, at every place of a text, what the target would write."""
    texts = [f"{p['question']} {p['answer']}" for p in test_problems[:40]]
    texts.append("Zoë pays 3 € and 4 £ for 12345 blåbær 🫐🫐, " + texts[4])
    known = {"pair": tokenizer, "bytes": of_bytes(), "words": of_words(texts)}
    ours, others = (known[name] for name in names)
    drafted = matched = 0
    for text in (*texts[:3], texts[-1]):
        tokens = ours.encode(text, add_special_tokens=False)
        drafter = OtherTokenizer(draft, target, ours, others)
        drafter.assistant = Parrot(draft, others, text)
        for i in range(4, len(tokens)):
            (candidates,) = drafter.drafts([torch.tensor(tokens[:i])], [12])
            if "\N{REPLACEMENT CHARACTER}" in ours.decode(tokens[:i]):
                continue  # within a character
            expected = tokens[i:]
            right = next((n for n, (a, b) in enumerate(zip(candidates, expected)) if a != b), len(candidates))
            # A draft may end within a word, which is cut in another way then.
            rest = ours.decode(tokens[:i] + candidates)[len(ours.decode(tokens[:i] + candidates[:right])) :]
            assert " " not in rest.strip(), (i, ours.decode(tokens[:i]), ours.decode(candidates))
            drafted, matched = drafted + len(candidates), matched + right
    assert matched > 0.6 * drafted > 500


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_cache_changes_no_draft(target, tokenizer, test_problems, num_rows):
    """Rows that grow, are cut in another way as they grow, and end at different times, against drafts from scratch."""
    assistant_tokenizer = of_bytes()
    assistant = random_llama(7, len(assistant_tokenizer), max_position_embeddings=4096)
    make = functools.partial(OtherTokenizer, assistant, target, tokenizer, assistant_tokenizer)
    # Cut as the target's random text may be: no two tokens are one.
    texts = [
        [
            token
            for c in f"{p['question']} é🫐 {p['answer']}"
            for token in tokenizer.encode(c, add_special_tokens=False)
        ]
        for p in test_problems[:num_rows]
    ]
    generator = torch.Generator().manual_seed(num_rows)
    ends, rows, drafter = [3] * num_rows, list(range(num_rows)), make()
    while rows:
        given = left_padded([texts[row][: ends[row]] for row in rows])
        sequence, _ = drafter.get_candidates(**given, max_candidates=[9] * len(rows))
        drafted = sequence[:, given["input_ids"].shape[1] :]
        for row, draft, length in zip(rows, drafted.tolist(), drafter.lengths):
            scratch = make()
            sequence, _ = scratch.get_candidates(torch.tensor([texts[row][: ends[row]]]), None, [9])
            assert draft[:length] == sequence[0, ends[row] :].tolist(), (row, ends)
        for row in rows:
            ends[row] += torch.randint(1, 25, (1,), generator=generator).item()
        unfinished = [j for j, row in enumerate(rows) if ends[row] < len(texts[row])]
        if unfinished:
            drafter.shrink(unfinished, 0)
        rows = [rows[j] for j in unfinished]


# The target's tokens


def test_a_judged_row_of_a_batch_gives_what_it_gives_alone(test_problems):
    """Where rows have different room left, too: a longer draft may end with another token, and so may the text."""
    ours, others = of_words([p["question"] for p in test_problems[:20]], 250), of_bytes()
    model = random_llama(1, len(ours), max_position_embeddings=4096)
    assistant = random_llama(2, len(others), max_position_embeddings=4096)
    margin = AutoJudge.from_config(JudgeConfig(judge_type="margin"))
    generate = functools.partial(
        model.generate,
        **{**OPTIONS, "max_new_tokens": 12, "num_assistant_tokens": 8},
        judge=margin,
        judge_threshold=1.0,
        assistant_model=assistant,
        tokenizer=ours,
        assistant_tokenizer=others,
    )
    generator, cut = torch.Generator().manual_seed(0), 0
    for _ in range(15):
        rows = [torch.randint(3, len(ours), (n,), generator=generator).tolist() for n in (9, 4, 15)]
        together = generate(**left_padded(rows))
        for j, row in enumerate(rows):
            alone = generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long))
            assert together.sequences[j, 15:].tolist() == alone.sequences[0, len(row) :].tolist()
            for name in COUNTS:
                assert getattr(together, name)[j] == getattr(alone, name)[0], name
            cut += len(set(together.num_target_forwards.tolist())) > 1
    assert cut > 20


def test_a_python_tokenizer_knows_only_its_own(top_k):
    """Models have more embeddings than tokenizers tokens, and a random one writes what these stand for."""
    model = random_llama(1, 448, max_position_embeddings=4096)
    assistant = random_llama(2, 448, max_position_embeddings=4096)
    for pair in ((ByT5Tokenizer(), of_bytes()), (of_bytes(), ByT5Tokenizer())):
        ours, others = pair
        options = {**LOSSLESS, "max_new_tokens": 30, "tokenizer": ours, "assistant_tokenizer": others}
        prompt = [3, 400, 80, 440, 90, 100]
        output = model.generate(torch.tensor([prompt]), judge=top_k, assistant_model=assistant, **options)
        assert output.sequences[0].tolist() == reference.greedy(model, prompt, 30, ())
        assert output.num_candidates > 0


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}, {"do_sample": True, "top_k": 1}])
def test_lossless_whatever_comes_back(target, tokenizer, prompts, expected, top_k, more, num_rows):
    """An assistant of bytes that writes at random, until it has no positions left, and one that isn't all wrong."""
    assistant_tokenizer = of_bytes()
    assistant = random_llama(7, len(assistant_tokenizer), max_position_embeddings=600)
    options = {**LOSSLESS, "max_new_tokens": 40, "num_assistant_tokens": 5, **more}
    output = target.generate(
        **left_padded(prompts[:num_rows]),
        judge=top_k,
        assistant_model=assistant,
        tokenizer=tokenizer,
        assistant_tokenizer=assistant_tokenizer,
        **options,
    )
    width = max(map(len, prompts[:num_rows]))
    assert output.sequences[:, width:].tolist() == expected[:num_rows]
    assert (output.num_candidates > 0).all()


def test_an_assistant_without_positions_left_drafts_nothing(target, tokenizer, prompts, expected, top_k):
    assistant_tokenizer = of_bytes()
    length = len(assistant_tokenizer.encode(tokenizer.decode(prompts[0], skip_special_tokens=True)))
    for room, drafts in ((40, True), (0, False)):
        assistant = random_llama(7, len(assistant_tokenizer), max_position_embeddings=length + room)
        output = target.generate(
            torch.tensor(prompts[:1]),
            judge=top_k,
            assistant_model=assistant,
            tokenizer=tokenizer,
            assistant_tokenizer=assistant_tokenizer,
            **{**LOSSLESS, "max_new_tokens": 30},
        )
        assert (output.num_candidates.item() > 0) == drafts
        assert output.sequences[0].tolist() == prompts[0] + expected[0][:30]


def test_a_cycles_work_doesnt_grow_with_the_text(target, tokenizer, others, prompts, top_k, monkeypatch):
    """The assistant runs what is new, and only the end of a text is told and cut again."""
    other, other_tokenizer = others
    told, run, translate = [], [], _Translation.__call__

    def counted(self, before, tokens):
        told.append(len(tokens))
        return translate(self, before, tokens)

    monkeypatch.setattr(_Translation, "__call__", counted)
    hook = other.register_forward_pre_hook(lambda *args: run.append(args[2]["input_ids"].shape[1]), with_kwargs=True)
    pair = {"assistant_model": other, "tokenizer": tokenizer, "assistant_tokenizer": other_tokenizer}
    try:
        output = target.generate(torch.tensor(prompts[:1]), judge=top_k, num_assistant_tokens=2, **pair, **LOSSLESS)
    finally:
        hook.remove()
    cycles, candidates = output.num_target_forwards.item(), output.num_candidates.item()
    # The newest tokens, one or two, and the draft but for its last; at first the prompt.
    assert sum(run) <= len(prompts[0]) + 1 + candidates + 2 * cycles
    often = 2 * OtherTokenizer.UNSETTLED + 3
    assert output.sequences.shape[1] > often + 40 and cycles > 40
    assert sum(n > often for n in told) <= 1 + OtherTokenizer.NUM_TRIED


def test_no_row_of_a_batch_is_drafted_past_the_assistants_positions(target, tokenizer, prompts, expected, top_k):
    """An assistant with a table of positions would fail there."""
    assistant_tokenizer = of_bytes()
    texts = tokenizer.batch_decode(prompts[:2], skip_special_tokens=True)
    lengths = sorted(len(assistant_tokenizer.encode(text)) for text in texts)
    sizes = {"n_positions": lengths[-1] + 8, "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 257}
    torch.manual_seed(0)
    assistant = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None)).eval()
    assert lengths[0] + 8 < lengths[-1]
    inputs = left_padded(prompts[:2])
    pair = {"assistant_model": assistant, "tokenizer": tokenizer, "assistant_tokenizer": assistant_tokenizer}
    output = target.generate(
        **inputs, judge=top_k, num_assistant_tokens=8, **pair, **{**LOSSLESS, "max_new_tokens": 40}
    )
    assert (output.num_candidates > 0).all() and (output.num_candidates < 8 * output.num_target_forwards).all()
    for got, row in zip(output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), expected):
        assert got[: len(row)] == row


@pytest.mark.slow
def test_without_a_judge_and_beside_stock(target, tokenizer, others, prompts):
    """The same tokens as stock assisted generation with two tokenizers, in no more forwards of the target."""
    other, other_tokenizer = (copy.deepcopy(x) for x in others)
    other.generation_config.update(
        num_assistant_tokens=8, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    pair = {"assistant_model": other, "tokenizer": tokenizer, "assistant_tokenizer": other_tokenizer}
    custom = functools.partial(judge_decoding, num_assistant_tokens=8, **pair)
    calls = []
    hook = target.register_forward_pre_hook(lambda *_: calls.append(1))
    inputs = {"inputs": torch.tensor(prompts[:1]), "do_sample": False, "max_new_tokens": MAX_NEW_TOKENS}
    try:
        ours = target.generate(**inputs, custom_generate=custom, assistant_model=other)
        num_forwards = len(calls)
        logging.set_verbosity_error()  # of its own deprecated habits
        stock = target.generate(**inputs, **pair)
    finally:
        logging.set_verbosity_warning()
        hook.remove()
    assert torch.equal(ours, stock)
    assert num_forwards <= len(calls) - num_forwards


@pytest.mark.slow
def test_a_pipeline_passes_both(target, tokenizer, others, test_problems, top_k):
    other, other_tokenizer = others
    generator = pipeline(
        "text-generation",
        model=target,
        tokenizer=tokenizer,
        assistant_model=other,
        assistant_tokenizer=other_tokenizer,
    )
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
    chat = [{"role": "user", "content": GSM8K().instruction(test_problems[0])}]
    options = {"do_sample": False, "max_new_tokens": 100}
    assert generator(chat, judge=top_k, judge_threshold=0.0, **options) == plain(chat, **options)


@pytest.mark.slow
def test_a_judge_is_measured_with_both(target, draft, tokenizer, others, test_problems):
    other, other_tokenizer = others
    judge = AutoJudge.from_config(JudgeConfig(judge_type="margin"))
    options = {"thresholds": [0.4], "num_assistant_tokens": 8, "max_new_tokens": 200, "batch_size": 2}
    evaluate = functools.partial(evaluate_judge, target, tokenizer=tokenizer, dataset=test_problems[:2], **options)
    expected = evaluate(assistant_model=draft, task=GSM8K(), judge=judge)
    got = evaluate(assistant_model=other, assistant_tokenizer=other_tokenizer, task=GSM8K(), judge=judge)
    for row, its_row in zip(got, expected):
        assert row["texts"] == its_row["texts"] and row["tokens_per_cycle"] == its_row["tokens_per_cycle"]
    calibrate = functools.partial(calibrate_threshold, target, other, tokenizer, test_problems[:2], GSM8K(), judge)
    calibrate(dataset_name="word problems", assistant_tokenizer=other_tokenizer, **options)
    assert len(judge.config.evaluation) == 2
    kl = AutoJudge.from_config(JudgeConfig(judge_type="kl"))
    with pytest.raises(ValueError, match="'kl' judge reads"):
        evaluate(assistant_model=other, assistant_tokenizer=other_tokenizer, task=GSM8K(), judge=kl)


# Special tokens


def heard(target, draft, tokenizer, assistant_tokenizer, tokens):
    """What of a row an assistant is told."""
    drafter = OtherTokenizer(draft, target, tokenizer, assistant_tokenizer)
    drafter.assistant = Parrot(draft, assistant_tokenizer, "")
    drafter.assistant.get_candidates = lambda input_ids, *_: (input_ids, None)
    drafter.drafts([torch.tensor(tokens)], [4])
    return drafter.rows[0].cached


def test_special_tokens_that_both_have_are_kept(target, draft, tokenizer, others, prompts):
    _, other_tokenizer = others
    told = heard(target, draft, tokenizer, other_tokenizer, prompts[0])
    assert other_tokenizer.convert_ids_to_tokens(told) == tokenizer.convert_ids_to_tokens(prompts[0])


def test_a_draft_ends_before_the_first_token_that_only_the_tokenizer_has(draft, tokenizer, others):
    """The target has no embedding for it. What the assistant wrote behind its end isn't read."""
    other, other_tokenizer = others
    drafter = OtherTokenizer(other, draft, tokenizer, other_tokenizer)
    size, (eos, *_), read = draft.config.vocab_size, sorted(drafter.assistant.eos_token_ids), []
    translated = [5, size - 1, size, 6]
    drafter._to_target = lambda before, tokens: read.append(tokens) or translated
    assert drafter._translated([], [7, 8]) == [5, size - 1]
    drafter._translated([], [7, eos, 8])
    assert read == [[7, 8], [7, eos]]


def test_special_tokens_that_one_lacks_are_no_text(target, draft, tokenizer, prompts):
    told = heard(target, draft, tokenizer, of_bytes(), prompts[0])
    assert of_bytes().decode(told) == tokenizer.decode(prompts[0], skip_special_tokens=True)


@pytest.mark.parametrize("adds", [None, "<|begin|> $A", "<|begin|> $A <|end|>"])
@pytest.mark.parametrize("has", [True, False])
def test_a_text_begins_once(target, draft, tokenizer, others, has, adds):
    """With what the assistant's tokenizer puts in front, whether or not the target's text has it, and never ends."""
    other_tokenizer = copy.deepcopy(others[1])
    begin, end, user = other_tokenizer.convert_tokens_to_ids(["<|begin|>", "<|end|>", "<|user|>"])
    if adds:
        template = processors.TemplateProcessing(adds, "$A $B", [("<|begin|>", begin), ("<|end|>", end)])
        other_tokenizer.backend_tokenizer.post_processor = template
    text = "<|begin|>" * has + "<|user|>"
    told = heard(target, draft, tokenizer, other_tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert told == [begin] * (has or bool(adds)) + [user]


# What is refused


def test_what_cannot_be(target, draft, tokenizer, others, top_k):
    other, other_tokenizer = others
    options = {"assistant_model": other, "max_new_tokens": 4}
    both = {"tokenizer": tokenizer, "assistant_tokenizer": other_tokenizer}
    inputs = tokenizer("one two", return_tensors="pt", add_special_tokens=False)
    generate = functools.partial(target.generate, **inputs, **options)
    with pytest.raises(ValueError, match="a tokenizer of `transformers` as `tokenizer`, got NoneType"):
        generate(judge=top_k, assistant_tokenizer=other_tokenizer)
    with pytest.raises(ValueError, match="a tokenizer of `transformers` as `assistant_tokenizer`, got str"):
        generate(judge=top_k, tokenizer=tokenizer, assistant_tokenizer="gpt2")
    with pytest.raises(ValueError, match="an `assistant_tokenizer` without an `assistant_model`"):
        target.generate(**inputs, judge=top_k, max_new_tokens=4, prompt_lookup_num_tokens=2, **both)
    kl = AutoJudge.from_config(JudgeConfig(judge_type="kl"))
    with pytest.raises(ValueError, match="'kl' judge reads .* an assistant with another tokenizer has none"):
        generate(judge=kl, **both)
    states = AutoJudge.from_config(JudgeConfig(assistant_hidden_size=96))
    with pytest.raises(ValueError, match="of size 96, and an assistant with another tokenizer has none"):
        generate(judge=states, **both)
    large = copy.deepcopy(other_tokenizer)
    large.add_tokens([f"<{i}>" for i in range(1100)])
    with pytest.raises(ValueError, match="`assistant_tokenizer` has 21.. tokens, and LlamaForCausalLM knows 1030"):
        generate(judge=top_k, tokenizer=tokenizer, assistant_tokenizer=large)
    far = random_llama(1, 4096)
    with pytest.raises(ValueError, match="4096 in the assistant's.*with both `tokenizer` and `assistant_tokenizer`"):
        target.generate(**inputs, judge=top_k, assistant_model=far, max_new_tokens=4)


def test_the_same_tokenizer_twice_is_one(target, draft, tokenizer, prompts, top_k):
    """Then a judge may read what an assistant knows of the target's tokens."""
    kl = AutoJudge.from_config(JudgeConfig(judge_type="kl"))
    options = {**OPTIONS, "max_new_tokens": 30, "judge": kl, "assistant_model": draft}
    expected = target.generate(torch.tensor(prompts[:1]), **options)
    same = {"tokenizer": tokenizer, "assistant_tokenizer": copy.deepcopy(tokenizer)}
    got = target.generate(torch.tensor(prompts[:1]), **options, **same)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(got.num_candidates, expected.num_candidates)
