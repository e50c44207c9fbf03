"""What a TRL user writes: datasets of text, then of messages; seconds on the model that ships with the package."""

from datasets import Dataset
from peft import LoraConfig

import bvpo_stats as bvpo


def rows(numbers: range, *, trace: bool, messages: bool) -> Dataset:
    """Right and wrong sums with TRL's columns; those of D_t say their reasoning."""
    found = []
    for a, b in ((n, 7 * n % 60) for n in numbers):
        row = {"prompt": f"What is {a}+{b}?"}
        for side, value in (("chosen", a + b), ("rejected", a + b - 10)):
            row[side] = (f"{a}+{b}={value}</think>" if trace else "") + f"The answer is {value}."
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        found.append({k: [{"role": roles[k], "content": v}] for k, v in row.items()} if messages else row)
    return Dataset.from_list(found)


args = bvpo.BVPOConfig("runs/trl-user", alpha=0.5, max_steps=4, learning_rate=3e-3, per_device_train_batch_size=16,
                       eval_strategy="steps", eval_steps=2, save_strategy="no", report_to="none")  # fmt: skip
for messages in (False, True):
    d_t, d_e = (rows(range(2, 66), trace=trace, messages=messages) for trace in (True, False))
    held_out = {"trace": rows(range(66, 98), trace=True, messages=messages)}  # and "empty": D_e, where it matters
    lora = LoraConfig(r=8, target_modules="all-linear")
    trainer = bvpo.BVPOTrainer("embedded", args, d_t, d_e, eval_dataset=held_out, peft_config=lora)
    trainer.train()
    print({name: round(value, 4) for name, value in trainer.evaluate().items() if "rewards" in name})
