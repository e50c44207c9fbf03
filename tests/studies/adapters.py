"""Adapters made by hand, for whoever needs a model that differs from its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from bvpo_stats.model.templates import find_template
from bvpo_stats.records import Prompt


def save_adapter(base: Path, folder: Path, *, scale: float, seed: int = 0) -> Path:
    """A LoRA adapter with B drawn from N(0, scale^2): the larger the scale, the less is left of what the base knew."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, scale)
    model.save_pretrained(folder)
    return folder


def train_adapter(base: Path, folder: Path, prompts: Sequence[Prompt], *, steps: int) -> Path:
    """A LoRA adapter that learns by heart what to answer to these prompts of the embedded task at sight."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    template, rows = find_template(tokenizer), []
    for prompt in prompts:
        answer = tokenizer.encode(f"The answer is {prompt.gold}.", add_special_tokens=False)
        rows.append((list(template.prompt_ids(prompt.prompt, "nothinking")), [*answer, tokenizer.eos_token_id]))
    ids = torch.full((len(rows), max(len(question) + len(answer) for question, answer in rows)), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for place, (question, answer) in enumerate(rows):
        ids[place, : len(question) + len(answer)] = torch.tensor(question + answer)
        labels[place, len(question) : len(question) + len(answer)] = torch.tensor(answer)
    for _ in range(steps):
        model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder
