# SPDX-License-Identifier: Apache-2.0
"""The whole job on the embedded pair, in five minutes on two CPU cores: mine, train, save, load, decode.

    python examples/quickstart.py

Ends with one table and one response in which the mismatches that the judge let pass are coloured.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import torch
from arguments import positive_int
from benchmark import assistant_settings
from embedded_pair import MAX_NEW_TOKENS, load_pair, num_problems, read_problems

from autojudge_hf import (
    AutoJudge,
    JudgeTrainer,
    JudgeTrainingArguments,
    calibrate_threshold,
    judge_decoding,
    mine_mismatches,
)
from autojudge_hf.highlighting import highlight_accepted
from autojudge_hf.measuring import measure_decoding
from autojudge_hf.tasks import GSM8K


THRESHOLDS = (0.03, 0.06, 0.1, 0.2)
DATASET = "word problems of the embedded pair"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output_dir", default="runs/quickstart", help="the judge goes to its subfolder judge")
    parser.add_argument("--num_mined", type=num_problems, default=120, help="training problems to mine")
    parser.add_argument(
        "--num_validation", type=num_problems, default=240, help="validation problems for the threshold"
    )
    parser.add_argument("--num_test", type=num_problems, default=40, help="held-out problems for the table")
    parser.add_argument("--num_assistant_tokens", type=positive_int, default=16, help="draft length")
    args = parser.parse_args()
    judge_dir = str(Path(args.output_dir) / "judge")
    started = time.perf_counter()
    torch.set_num_threads(2)
    torch.manual_seed(0)

    model, draft, tokenizer = load_pair()
    task = GSM8K()

    print("1. Mine: where do the two models differ, and which differences change the answer?")
    mined = mine_mismatches(
        model,
        draft,
        tokenizer,
        read_problems("train", args.num_mined),
        task,
        max_new_tokens=MAX_NEW_TOKENS,
        num_assistant_tokens=8,
        state_position="both",
        logit_features=True,
    )
    print(f"   {len(mined)} mismatches, {sum(mined['label']) / len(mined):.1%} of them important")

    print("2. Train a judge on the target's hidden states and logits, save it, load it back")
    arguments = JudgeTrainingArguments(output_dir=judge_dir, overwrite_output_dir=True, validation_size=0.2)
    trainer = JudgeTrainer(arguments, mined)
    trainer.train()
    trainer.save_model()
    judge = AutoJudge.from_pretrained(judge_dir)
    print(f"   validation ROC-AUC {trainer.state.best_metric:.3f}; saved to {judge_dir}")

    print("3. Choose the threshold on validation problems")
    calibrate_threshold(
        model,
        draft,
        tokenizer,
        read_problems("validation", args.num_validation),
        task,
        judge,
        thresholds=THRESHOLDS,
        max_drops={"2 points": 0.02},
        confidence=0.5,  # what cost two points at most here: so few problems are never sure
        dataset_name=DATASET,
        num_assistant_tokens=args.num_assistant_tokens,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=16,
    )
    judge.save_pretrained(judge_dir)
    print(f"   threshold {judge.config.threshold:.3g}")

    print(f"4. Decode {args.num_test} problems that nothing was chosen on, draft length {args.num_assistant_tokens}")
    problems = read_problems("test", args.num_test)
    assisted = {"assistant_model": draft, "do_sample": False}
    ours = {**assisted, "return_dict_in_generate": True}
    lossless = functools.partial(judge_decoding, assistant_model=draft, num_assistant_tokens=args.num_assistant_tokens)
    measure = functools.partial(measure_decoding, model, tokenizer, problems, task, max_new_tokens=MAX_NEW_TOKENS)
    table = [("target alone", measure("target alone", do_sample=False))]
    table.append(("assisted generation, its defaults", measure("stock, defaults", **assisted)))
    # A confidence threshold of 0 turns off the early stop of stock drafts.
    with assistant_settings(draft, num_assistant_tokens=args.num_assistant_tokens, assistant_confidence_threshold=0.0):
        table.append(("assisted generation, same draft length", measure("stock, same length", **assisted)))
    table.append(("ours, lossless", measure("lossless", custom_generate=lossless, **ours)))
    judged = {"judge": judge, "num_assistant_tokens": args.num_assistant_tokens}
    table.append(("ours, judged", measure("judged", **judged, **ours)))

    problem = problems[0]
    inputs = tokenizer(task.prompt(problem, tokenizer), return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **judged, **assisted)
    print(f"\n{problem['question']}\n")
    print(highlight_accepted(model, tokenizer, output[0], inputs["input_ids"].shape[1]))
    print("\n(coloured: tokens the target would not have written, and the judge let pass)\n")

    print(f"{'':40}  accuracy  tokens/cycle  tokens/s  mean length")
    for name, row in table:
        print(
            f"{name:40}  {row['accuracy']:8.1%}  {row['tokens_per_cycle']:12.2f}  {row['tokens_per_second']:8.0f}"
            f"  {row['mean_response_length']:11.1f}"
        )
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes, {torch.get_num_threads()} threads, fp32")


if __name__ == "__main__":
    main()
