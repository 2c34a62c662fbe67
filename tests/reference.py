# SPDX-License-Identifier: Apache-2.0
"""Literal references: no caches, no batches, no cleverness. Only as fast as they have to be."""

import torch
from scipy.stats import chisquare


#: Rarer than this isn't chance. Another version of torch draws other samples, and the suite compares thirty times: so
#: samples are large enough that what's wrong shows all the same.
NOT_CHANCE = 1e-4


def chi_square_p(counts, expected):
    """How rare it is that counts of a distribution differ from it by so much; outcomes seldom expected are pooled."""
    assert not counts[expected == 0].any()
    ideal = expected.double() / expected.double().sum() * counts.sum()
    common = ideal >= 5
    observed, ideal = (torch.cat([x[common], x[~common].sum()[None]]).double() for x in (counts, ideal))
    keep = ideal > 0
    assert keep.sum() > min(10, (expected > 0).sum() - 1)
    return chisquare(observed[keep], ideal[keep] * (observed[keep].sum() / ideal[keep].sum())).pvalue


@torch.no_grad()
def logits_after(model, tokens):
    return model(torch.tensor([tokens])).logits[0].float()


@torch.no_grad()
def greedy(model, tokens, max_new_tokens, eos_ids):
    """Plain greedy decoding: one full forward per token."""
    tokens = list(tokens)
    for _ in range(max_new_tokens):
        tokens.append(logits_after(model, tokens)[-1].argmax().item())
        if tokens[-1] in eos_ids:
            break
    return tokens


@torch.no_grad()
def judged(model, assistant, tokens, max_new_tokens, eos_ids, num_assistant_tokens, weight, bias, threshold):
    """Judge decoding, greedy, as the paper describes it: draft, verify, keep what matches or scores below."""
    limit = len(tokens) + max_new_tokens
    tokens = greedy(model, tokens, 1, eos_ids)
    matched = judge_accepted = judge_rejected = 0
    while tokens[-1] not in eos_ids and len(tokens) < limit:
        k = min(num_assistant_tokens, limit - len(tokens) - 1)
        draft = greedy(assistant, tokens, k, eos_ids)[len(tokens) :]
        outputs = model(torch.tensor([tokens + draft]), output_hidden_states=True)
        logits, states = outputs.logits[0].float(), outputs.hidden_states[-1][0].float()
        for candidate in draft:
            at = len(tokens) - 1
            choice = logits[at].argmax().item()
            score = torch.sigmoid(states[at + 1].double() @ weight.double() + bias.double()).item()
            if candidate == choice:
                matched += 1
            elif score < threshold:
                judge_accepted += 1
            else:
                judge_rejected += 1
                break
            tokens.append(candidate)
            if candidate in eos_ids:
                return tokens, (matched, judge_accepted, judge_rejected)
        tokens.append(logits[len(tokens) - 1].argmax().item())
    return tokens, (matched, judge_accepted, judge_rejected)


def _asked(model, tokenizer, task, prompt, max_new_tokens, eos_ids, noise):
    """What algorithm 1 asks: the target's response behind a prefix, and the answer of a response."""

    def respond(prefix):
        room = len(prompt) + max_new_tokens - len(prefix)
        if room == 0 or (len(prefix) > len(prompt) and prefix[-1] in eos_ids):
            return prefix
        ids = torch.tensor([prefix])
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "repetition_penalty": 1.0}
        if noise is not None:
            options["logits_processor"] = [noise]
        return model.generate(ids, max_new_tokens=room, **options)[0].tolist()

    def answer(tokens):
        return task.extract_answers([{}], [tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)])[0]

    return respond, answer


@torch.no_grad()
def algorithm_1(model, assistant, tokenizer, task, prompt, max_new_tokens, eos_ids, noise=None):
    """The semi-greedy search (arXiv 2504.20039, algorithm 1), `model.generate` for every continuation.

    Yields `(position, candidate, target_token, label)`; nothing where the target gives no answer.
    """
    respond, answer = _asked(model, tokenizer, task, prompt, max_new_tokens, eos_ids, noise)
    y = respond(prompt)
    reference = answer(y)
    t = len(prompt)
    while reference is not None and t < len(y):
        logits = logits_after(assistant, y[:t])[-1:]
        candidate = (logits if noise is None else noise(torch.tensor([y[:t]]), logits)).argmax().item()
        if candidate != y[t]:
            alternative = respond([*y[:t], candidate])
            important = not task.equivalent(answer(alternative), reference)
            yield t, candidate, y[t], int(important)
            if not important:
                y = alternative
        t += 1


@torch.no_grad()
def algorithm_1_by_drafts(model, draft, length, tokenizer, task, prompt, max_new_tokens, eos_ids, noise=None):
    """The same for a drafter that is asked as in decoding: `draft(text)` is what it drafts behind a text."""
    respond, answer = _asked(model, tokenizer, task, prompt, max_new_tokens, eos_ids, noise)
    y = respond(prompt)
    reference = answer(y)
    t = len(prompt) + 1  # the prefill's token is the target's own
    while reference is not None and t < len(y):
        room = len(prompt) + max_new_tokens - t - 1
        for candidate in draft(y[:t])[: min(length, room)]:
            if t == len(y):
                break
            important = False
            if candidate != y[t]:
                alternative = respond([*y[:t], candidate])
                important = not task.equivalent(answer(alternative), reference)
                yield t, candidate, y[t], int(important)
                if important:
                    break
                y = alternative
            t += 1
        t += 1  # the target's own
