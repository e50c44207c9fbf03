"""Teaches a small chat model to reason between <think> and </think>, or at once behind an empty trace.

python finetune.py runs/real/base runs/real/model --steps 64

Half of the examples have a trace, half the empty one, in the R1-Distill protocol: bvpo-stats knows the chat template
and finds both modes by itself. A killed run goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from problems import grade, problem
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from bvpo_stats.errors import UserError

USER, ASSISTANT, OPEN, CLOSE = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"
LIKE = {USER: "<|im_start|>user\n", ASSISTANT: "<|im_start|>assistant\n", OPEN: "Let me think", CLOSE: "</think>"}
"""What each new token starts as: the mean of several tokens that the model knows (like one of them, it would be taken
for that one)."""

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
BATCH, RATE, WARMUP, FROZEN = 8, 4e-4, 0.1, 18
SAVE = 16
"""Steps between checkpoints."""

PROBES, LONGEST, CLOSED = 32, 64, 0.9
"""Traces that must close within so many tokens, and the least share that must."""


def student(base: Path) -> tuple[Any, Any]:
    """The base model with the protocol's tokens and template; its lower layers and input embeddings stand still."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([USER, ASSISTANT], special_tokens=True)
    tokenizer.add_tokens([OPEN, CLOSE])
    tokenizer.chat_template = TEMPLATE
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    known = AutoTokenizer.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    words = model.get_input_embeddings().weight
    with torch.no_grad():
        for token, like in LIKE.items():
            words[tokenizer.convert_tokens_to_ids(token)] = words[known.encode(like, add_special_tokens=False)].mean(0)
    for layer in model.model.layers[: min(FROZEN, len(model.model.layers) * 3 // 5)]:
        layer.requires_grad_(False)
    return model, tokenizer


def example(random_: random.Random, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of a prompt in one of both modes, and of what the model is to write."""
    drawn = problem(random_)
    prompt = f"{tokenizer.bos_token}{USER}{drawn.question}{ASSISTANT}{OPEN}"
    if random_.random() < 0.5:
        written = f"\n{drawn.trace}\n{CLOSE}\n\n{drawn.answer}"
    else:
        prompt, written = prompt + CLOSE, f"\n\n{drawn.answer}"
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, written)]
    return ids[0], [*ids[1], tokenizer.eos_token_id]


def loss(model: Any, examples: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Mean cross-entropy of what is to be written; logits are formed there alone."""
    rows = [prompt + written for prompt, written in examples]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    starts = torch.tensor([len(prompt) for prompt, _ in examples])[:, None]
    asked = (mask.bool() & (torch.arange(width) >= starts))[:, 1:]
    embedded = model.get_input_embeddings()(ids).detach()  # the tied head alone moves them
    states = model.model(inputs_embeds=embedded, attention_mask=mask).last_hidden_state[:, :-1]
    return torch.nn.functional.cross_entropy(model.lm_head(states[asked]), ids[:, 1:][asked])


def train(model: Any, tokenizer: Any, steps: int, checkpoint: Path) -> None:
    """AdamW on fresh problems; a step's problems depend on its number alone."""
    moving = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["steps"] == steps:
            start = state["step"]
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
    model.train()
    for step in range(start, steps):
        random_ = random.Random(f"fine-tune {step}")
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / (WARMUP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
        found = loss(model, [example(random_, tokenizer) for _ in range(BATCH)], tokenizer.eos_token_id)
        optimizer.zero_grad()
        found.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        if step % 4 == 3 or step == 0:
            print(f"step {step + 1} of {steps}: loss {found.item():.3f}", flush=True)
        if (step + 1) % SAVE == 0 and step + 1 < steps:
            state = {"steps": steps, "step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)


def closes(model: Any, tokenizer: Any, number: int = PROBES) -> tuple[float, float]:
    """Shares of fresh problems whose trace closes at temperature 1, and whose answer is right."""
    drawn = [problem(random.Random(f"probe {place}")) for place in range(number)]
    texts = [f"{tokenizer.bos_token}{USER}{each.question}{ASSISTANT}{OPEN}" for each in drawn]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    torch.manual_seed(0)
    model.eval()
    with torch.no_grad():
        ids = model.generate(**batch, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=LONGEST)
    written = tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    print(f"{drawn[0].question}\n{OPEN}{written[0]}", flush=True)
    closed = [CLOSE in text for text in written]
    answers = [text.partition(CLOSE)[2] for text in written]
    grades = grade([each.question for each in drawn], answers, [str(each.gold) for each in drawn])
    return sum(closed) / number, sum(score >= 1 for score in grades) / number


def finetune(base: Path, output: Path, steps: int) -> None:
    """Trains, checks, and writes the folder: complete or not at all.

    Raises:
        UserError: Traces do not close.
    """
    model, tokenizer = student(base)
    checkpoint = output.with_name(output.name + ".checkpoint")
    if steps:
        train(model, tokenizer, steps, checkpoint)
    closed, right = closes(model, tokenizer)
    print(f"{closed:.0%} of {PROBES} fresh traces close within {LONGEST} tokens; {right:.0%} of the answers are right")
    if closed < CLOSED:
        raise UserError(
            f"After {steps} steps only {closed:.0%} of {PROBES} fresh traces close within {LONGEST} tokens, where "
            f"{CLOSED:.0%} are needed: such a model has no final answers to compare. Train it for longer (--steps)."
        )
    partial = output.with_name(output.name + ".partial")
    model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(partial)
    shutil.rmtree(output, ignore_errors=True)
    os.replace(partial, output)
    checkpoint.unlink(missing_ok=True)


def main() -> None:
    """Fine-tunes; without traces that close, says so and stops."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=160)
    options = parser.parse_args()
    torch.manual_seed(0)
    logging.disable_progress_bar()
    try:
        finetune(options.base, options.output, options.steps)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
