"""Bad input at the front door, in a process of its own: here nothing but the package checks the arguments.

Prints one JSON object: name of the call to what it raised, ``[type, message]``; ``null`` where it raised nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bvpo_stats as bvpo

CALLS: dict[str, Callable[[], Any]] = {}
BAD: list[Any] = [17, 3.5, True, b"x", {"a": 1}, object(), [17], float("nan")]
"""What hardly any argument may be; each call below leaves out what it takes."""


def refuses(name: str, call: Callable[[Any], Any], values: Sequence[Any]) -> None:
    for number, value in enumerate(values):
        CALLS[f"{name}[{number}]={type(value).__name__}"] = lambda value=value: call(value)


def without(*kinds: type) -> list[Any]:
    return [value for value in BAD if type(value) not in kinds]


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    plain = bvpo.load_policy("embedded")
    policy = bvpo.load_policy(plain.model, plain.tokenizer, lora=2)
    samples = bvpo.sample(policy, list(bvpo.read_records("embedded", bvpo.Prompt))[:4], n=3)
    pairs = bvpo.make_pairs(samples, reward="embedded")
    t, e = np.random.default_rng(0).normal(size=(2, 6, 3))
    d_t = [{"prompt": "What is 1 + 2?", "chosen": "<think>\n1\n</think>\n3", "rejected": "<think>\n1\n</think>\n4"}]
    d_e = [{"prompt": "What is 1 + 2?", "chosen": "3", "rejected": "4"}]

    def config(**options: Any) -> Any:
        return bvpo.BVPOConfig(str(folder), report_to="none", unmatched_prompts="drop", **options)

    def trainer(*data: Any, model: Any = policy, **options: Any) -> Any:
        return bvpo.BVPOTrainer(model, config(per_device_train_batch_size=1), *data, **options)

    refuses("load_policy model", bvpo.load_policy, [*BAD, None, "no/such/folder"])
    for name in ("adapter", "dtype", "device", "template", "empty_trace", "attention"):
        refuses(f"load_policy {name}", lambda x, name=name: bvpo.load_policy("embedded", **{name: x}), BAD)
        named = {name: 17}
        CALLS[f"load_policy(model) {name}"] = lambda named=named: bvpo.load_policy(
            plain.model, plain.tokenizer, **named
        )
    refuses("load_policy lora", lambda x: bvpo.load_policy("embedded", lora=x), [*without(int), 0, -1, "x"])
    refuses("load_policy tokenizer", lambda x: bvpo.load_policy(plain.model, x), [*BAD, None])
    CALLS["load_policy Linear"] = lambda: bvpo.load_policy(__import__("torch").nn.Linear(2, 2), plain.tokenizer)
    CALLS["load_policy lora twice"] = lambda: bvpo.load_policy(policy.model, policy.tokenizer, lora=2)

    refuses("sample policy", lambda x: bvpo.sample(x, ["1 + 2?"]), [*BAD, None])
    refuses("sample prompts", lambda x: bvpo.sample(policy, x), [*BAD, None, [], "What is 1 + 2?"])
    for name in ("n", "seed", "max_new_tokens", "batch_size"):
        values = [*without(int), -1, "x", 1.5, float("inf")]
        refuses(f"sample {name}", lambda x, name=name: bvpo.sample(policy, ["1 + 2?"], **{name: x}), values)
    for name in ("temperature", "top_p"):
        values = [*without(int, float), float("nan"), 0, -1, "x", None]
        refuses(f"sample {name}", lambda x, name=name: bvpo.sample(policy, ["1 + 2?"], **{name: x}), values)
    refuses("sample modes", lambda x: bvpo.sample(policy, ["1 + 2?"], modes=x), [*BAD, [], "x", ["thinking"] * 2])

    def raises(error: BaseException) -> Callable[[str, str], float]:
        def reward(prompt: str, answer: str) -> float:
            raise error

        return reward

    class Scores:
        identity, text_only = "scores", True

        def __init__(self, found: Any) -> None:
            self.found = found

        def score(self, answers: Sequence[Any]) -> Any:
            if isinstance(self.found, BaseException):
                raise self.found
            return self.found

    refuses(
        "make_pairs samples", lambda x: bvpo.make_pairs(x, "embedded", policy=policy), [*BAD, None, [], ["a"], pairs]
    )
    refuses("make_pairs policy", lambda x: bvpo.make_pairs(samples, "embedded", policy=x), BAD)
    refuses("make_pairs reward", lambda x: bvpo.make_pairs(samples, x), [*BAD, None, "nope", "file:nope", Scores])
    errors = (KeyError("oh"), ValueError("two\nlines"), SystemExit(3), StopIteration())
    refuses("make_pairs raising", lambda x: bvpo.make_pairs(samples, x), [raises(error) for error in errors])
    found = (None, 1.0, [1.0], ["a"] * 99, ValueError("two\nlines"), SystemExit("bye"))
    refuses("make_pairs scores", lambda x: bvpo.make_pairs(samples, Scores(x)), found)
    values = [None, "x", [1.0, 2.0], float("nan"), float("inf"), 1.0]
    refuses("make_pairs value", lambda x: bvpo.make_pairs(samples, lambda prompt, answer: x), values)

    refuses("make_traces policy", lambda x: bvpo.make_traces(x, samples, pairs), [*BAD, None])
    refuses("make_traces samples", lambda x: bvpo.make_traces(policy, x, pairs), [*BAD, None, [], pairs])
    refuses("make_traces pairs", lambda x: bvpo.make_traces(policy, samples, x), [*BAD, None, [], samples])
    for name in ("k", "seed", "batch_size"):
        values = [*without(int), -1, "x", 1.5, None]
        refuses(
            f"make_traces {name}", lambda x, name=name: bvpo.make_traces(policy, samples, pairs, **{name: x}), values
        )
    refuses("make_traces sources", lambda x: bvpo.make_traces(policy, samples, pairs, sources=x), [*BAD, [], "x"])

    consumed = iter(pairs)
    list(consumed)
    for call in (bvpo.pair_gradients, bvpo.alpha_star):
        name = call.__name__
        refuses(f"{name} policy", lambda x, call=call: call(x, pairs), [*BAD, None])
        wrong = [*BAD, None, [], ["a"], samples, consumed, "no/such.jsonl", d_t, [{"question": "1 + 1?"}]]
        refuses(f"{name} pairs", lambda x, call=call: call(policy, x), wrong)
        refuses(f"{name} traces", lambda x, call=call: call(policy, pairs, traces=x), [*BAD, None, "embedded", pairs])
        for field in ("objective", "subset"):
            refuses(f"{name} {field}", lambda x, call=call, f=field: call(policy, pairs, **{f: x}), [*BAD, [], "x"])
    refuses("pair_gradients unmatched", lambda x: bvpo.pair_gradients(policy, pairs, unmatched=x), [*BAD, "x"])
    refuses("pair_gradients options", lambda x: bvpo.pair_gradients(policy, pairs, options=x), [*BAD, "x"])
    CALLS["pair_gradients without lora"] = lambda: bvpo.pair_gradients(plain, pairs)
    for name in ("marginal", "curvature", "second_moments", "stream"):
        refuses(f"alpha_star {name}", lambda x, name=name: bvpo.alpha_star(policy, pairs, **{name: x}), [*BAD, "x"])
    for name in ("batch_size", "eta_l", "level", "epsilon"):
        values = [*without(int, float), float("nan"), 0, -1, "x", None]
        refuses(f"alpha_star {name}", lambda x, name=name: bvpo.alpha_star(policy, pairs, **{name: x}), values)
    refuses("alpha_star groups", lambda x: bvpo.alpha_star(policy, pairs, groups=x), [*BAD, 1, "x", None])
    refuses("alpha_star one prompt", lambda x: bvpo.alpha_star(policy, x), [pairs[:2], pairs[:1]])

    refuses(
        "alpha_from_gradients t",
        lambda x: bvpo.alpha_from_gradients(x, e),
        [*BAD, None, "x", t[:5], t[:, :2], t[0], t[None]],
    )
    refuses(
        "alpha_from_gradients both", lambda x: bvpo.alpha_from_gradients(x, x), [*BAD, t[:0], t[:1], t[:2], t[:, :0]]
    )
    kinds = [t.astype(str), t + 1j, np.where(t > 0, np.nan, t), np.full_like(t, np.inf)]
    refuses("alpha_from_gradients kind", lambda x: bvpo.alpha_from_gradients(x, e), kinds)
    for name in ("clusters", "blocks", "m"):
        values = [*BAD, "x", [0] * 5]
        refuses(
            f"alpha_from_gradients {name}", lambda x, name=name: bvpo.alpha_from_gradients(t, e, **{name: x}), values
        )
    for name in ("batch_size", "eta_l", "level"):
        values = [*without(int, float), float("nan"), 0, -1, "x", None]
        refuses(
            f"alpha_from_gradients {name}", lambda x, name=name: bvpo.alpha_from_gradients(t, e, **{name: x}), values
        )
    refuses("Moments.init members", bvpo.Moments.init, [*without(dict, list), None, []])
    refuses("Moments.init groups", lambda x: bvpo.Moments.init(groups=x), [*without(int), 1, "x"])
    refuses("Moments.update", lambda x: bvpo.Moments.init(("t", "e")).update(x, ["a"]), [*BAD, None])

    refuses("read_records source", lambda x: list(bvpo.read_records(x)), [*BAD, None, "no/such.jsonl", "embedded/x"])
    refuses("read_records kind", lambda x: list(bvpo.read_records("embedded", x)), [*BAD, int])
    refuses("read_records mode", lambda x: list(bvpo.read_records(pairs, mode=x)), [*BAD, "x"])
    refuses("write_records path", lambda x: bvpo.write_records(x, pairs), [*BAD, None, "x.csv", str(folder)])
    for suffix in ("jsonl", "parquet"):
        wrong = [*BAD, None, "x", [{"a": 1}], pairs[0], [pairs[0], samples[0]]]
        refuses(f"write_records {suffix}", lambda x, s=suffix: bvpo.write_records(folder / f"x.{s}", x), wrong)

    refuses("Objective name", lambda x: bvpo.Objective(x), [*BAD, "x"])
    refuses("Objective beta", lambda x: bvpo.Objective(beta=x), [*without(int, float), float("nan"), 0, -1, "x"])
    whole = ("max_length", "max_tokens", "alpha_update_steps")
    for name in (*whole, "alpha_traces_per_answer", "per_device_train_batch_size", "gradient_accumulation_steps"):
        values = [*without(int), -1, "x", 1.5]
        refuses(f"BVPOConfig {name}", lambda x, name=name: config(**{name: x}), values)
    for name in ("beta", "alpha", "alpha_prior", "alpha_level", "eta_l", "learning_rate"):
        values = [b"x", {"a": 1}, object(), [17], "x", *([] if name == "learning_rate" else [-1, float("nan")])]
        refuses(f"BVPOConfig {name}", lambda x, name=name: config(**{name: x}), values)
    for name in ("loss_type", "unmatched_prompts", "eval_strategy", "alpha_rule"):
        refuses(f"BVPOConfig {name}", lambda x, name=name: bvpo.BVPOConfig(str(folder), **{name: x}), [*BAD, "x"])
    CALLS["BVPOConfig eval_do_concat_batches"] = lambda: config(eval_do_concat_batches=False)
    CALLS["BVPOConfig label_smoothing_factor"] = lambda: config(label_smoothing_factor=0.1)

    refuses("trainer model", lambda x: trainer(pairs, model=x), [*BAD, None, plain.model])
    refuses("trainer args", lambda x: bvpo.BVPOTrainer(policy, x, pairs), BAD)
    refuses("trainer train_dataset", trainer, [*BAD, None, [], "What?", [{"question": 1}], d_t, {"train": d_t}])
    refuses("trainer empty_dataset", lambda x: trainer(d_t, x), [*BAD, [], [d_e[0] | {"prompt": "What is 3 + 3?"}]])
    refuses("trainer eval_dataset", lambda x: trainer(pairs, eval_dataset=x), [*without(dict), []])
    refuses("trainer named", lambda x: trainer(pairs, eval_dataset={"val": x}), [*BAD, None, []])
    for name in ("processing_class", "callbacks", "optimizers", "peft_config"):
        values = without(list) if name == "callbacks" else BAD
        values = [value for value in values if name != "callbacks" or not isinstance(value, dict)]
        refuses(f"trainer {name}", lambda x, name=name: trainer(pairs, model="embedded", **{name: x}), values)
    peft = __import__("peft")
    CALLS["trainer peft twice"] = lambda: trainer(pairs, peft_config=peft.LoraConfig(r=2))
    CALLS["trainer peft targets"] = lambda: trainer(
        pairs, model="embedded", peft_config=peft.LoraConfig(target_modules=["x"])
    )
    refuses("trainer predict", lambda x: trainer(pairs).predict(x), [*BAD, None, []])
    say = lambda content: [{"role": "assistant", "content": content}]  # noqa: E731
    rows = [
        {"prompt": 5}, {"chosen": 5}, {"chosen": None}, {"chosen": "4", "rejected": "4"}, {"mode": "x"},
        {"temperature": "hot"}, {"prompt": []}, {"prompt": [1]}, {"chosen": [2], "rejected": [3]},
        {"chosen": say(None), "rejected": say(3)}, {"chosen": [{"role": "assistant"}], "rejected": say("3")},
        {"prompt_ids": [1]}, *({"prompt_ids": ids, "chosen_ids": [2], "rejected_ids": [3]} for ids in ("a", [], [[1]])),
        *({"prompt_ids": [1], "chosen_ids": [id], "rejected_ids": [3]} for id in (-1, 999_999)),
    ]  # fmt: skip
    refuses("trainer row", lambda x: trainer([d_t[0] | x], d_e), rows)

    outcomes: dict[str, Any] = {}
    for name, call in CALLS.items():
        with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            try:
                call()
                outcomes[name] = None
            except BaseException as error:
                outcomes[name] = [type(error).__name__, str(error)]
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
