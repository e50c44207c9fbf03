"""Every setting of every command either decides what a run is, or leaves it the same run; none is undecided.

For each field another value is given: those that decide a number must change the identity that `open_run` gets, the
others (speed, memory, where, and what is worked out anew from what is kept) must not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bvpo_stats.model.policy import PolicyOptions
from bvpo_stats.store.run_folder import Shard, differences
from bvpo_stats.studies.alpha_star.config import AlphaConfig, AlphaInputs
from bvpo_stats.studies.evaluate.config import EvaluateConfig
from bvpo_stats.studies.pairs.config import PairsConfig
from bvpo_stats.studies.sample.config import SampleConfig
from bvpo_stats.studies.traces.config import TracesConfig
from bvpo_stats.studies.train.config import TrainConfig
from bvpo_stats.studies.variance.config import VarianceConfig
from tests.sampling.samples import both_modes, write_samples
from tests.studies.adapters import save_adapter
from tests.training.records import write_run

OTHER = "another input of the same kind, made below"
_POLICY = {"policy.model": OTHER, "policy.adapter": OTHER, "policy.dtype": "float64", "policy.template": "r1-distill",
           "policy.empty_trace": "<think>\n</think>"}  # fmt: skip
_LOADING = {"policy.device": "cpu", "policy.trust_remote_code": True, "policy.attention": "eager"}
_DRAWING: dict[str, Any] = {"prompts": OTHER, "samples": 3, "temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7,
                            "seed": 1, "limit": 1}  # fmt: skip
_DATASET = {"split": "test"}  # what it leads to counts, not its name

# Study: (fields that decide, fields that do not, fields that make it another kind of run and are tested with it).
FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "sample": (
        _POLICY | _DRAWING | {"modes": ("thinking",)},
        _LOADING | _DATASET | {"shard": Shard(1, 2), "parquet": True, "batch_size": 3},
        {"engine", "server", "samples_from", "config_name"}
        | {"vllm.tensor_parallel", "vllm.gpu_memory", "vllm.in_flight"},
    ),
    "variance": (
        _POLICY | _DRAWING,
        _LOADING | _DATASET | {"batch_size": 3, "nll": "questions", "ddof": 0, "level": 0.9},
        {"samples_from", "config_name"},
    ),
    "pairs": (
        _POLICY
        | {"samples": OTHER, "reward": "math-verify", "modes": ("thinking",), "ref_logps": False}
        | {"min_gap": 0.1},
        _LOADING,
        {"preferences", "push_to_hub"},
    ),
    "traces": (
        _POLICY
        | {"pairs": OTHER, "samples": OTHER, "traces_per_answer": 3, "sources": ("mh",), "temperature": 0.5}
        | {"mh_moves": 5, "burn_in": 3, "prior": "samples", "seed": 1, "limit": 2},
        _LOADING | {"batch_size": 3},
        set(),
    ),
    "alpha_star": (
        _POLICY
        | {"inputs.pairs": OTHER, "inputs.empty_pairs": OTHER, "inputs.traces": OTHER, "inputs.limit": 4}
        | {"loss_type": "ipo", "beta": 0.2, "lora_r": 3, "target_modules": ("q_proj",), "theta": "probe"}
        | {"params": ("*q_proj*",), "traces_per_answer": 2, "method": "prior", "groups": 4, "seed": 1},
        _LOADING
        | {"batch_size": 64, "eta_l": 0.5, "learning_rate": 1e-3, "level": 0.9}
        | {"max_tokens": 999, "allow_mismatch": True},
        {"optimizer", "optimizer_state", "simpo_gamma", "probe_rank"},
    ),
    "train": (
        _POLICY
        | {"inputs.pairs": OTHER, "inputs.empty_pairs": OTHER, "inputs.traces": OTHER, "inputs.limit": 9}
        | {"alpha": 0.3, "loss_type": "ipo", "beta": 0.2, "learning_rate": 1e-3}
        | {"batch_size": 2, "num_train_epochs": 3.0, "max_steps": 3, "lr_scheduler_type": "linear"}
        | {"warmup_steps": 0.3, "max_length": 99, "lora_r": 3, "lora_alpha": 7, "target_modules": ("q_proj",)}
        | {"precompute_ref_log_probs": True, "alpha_prior": 0.4, "alpha_update_steps": 3, "alpha_rule": "direction"}
        | {"alpha_traces_per_answer": 2, "eta_l": 0.5}
        | {"logging_steps": 3, "seed": 1, "preset": "embedded", "bf16": True},
        _LOADING
        | {"unmatched_prompts": "drop", "max_tokens": 999, "gradient_checkpointing": True, "save_steps": 3}
        | {"report_to": ("tensorboard",), "allow_mismatch": True, "resume": True},
        {"method", "simpo_gamma", "push_to_hub"},
    ),
    "evaluate": (
        {"policy.model": OTHER, "adapters": OTHER, "instruction": "Think.", "samples": 3, "temperature": 0.5}
        | {"top_p": 0.9, "max_new_tokens": 7, "seed": 1, "modes": ("thinking",), "limit": 1, "data": OTHER},
        {"policy.device": "cpu", "policy.trust_remote_code": True, "policy.attention": "eager"}
        | {"split": "other", "level": 0.9, "batch_size": 3, "shard": Shard(1, 2)},
        {"task", "engine", "server", "samples_from", "judge", "reward", "baseline", "config_name"}
        | {"policy.adapter", "policy.dtype", "policy.template", "policy.empty_trace"},  # its sampling runs refuse them
    ),
}


class _Found(Exception):
    pass


@pytest.fixture(scope="module")
def inputs(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model with pairs and traces, and of everything another one."""
    import shutil

    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("identities")
    other_model = folder / "other-model"
    shutil.copytree(random_model, other_model)
    model = AutoModelForCausalLM.from_pretrained(random_model)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    model.save_pretrained(other_model)
    pairs = write_run(random_model, folder / "pairs", 12)
    found: dict[str, Any] = {"model": str(random_model), "policy.model": str(other_model), "pairs": pairs}
    found["policy.adapter"] = str(save_adapter(random_model, folder / "adapter", scale=0.1))
    for name in ("thinking", "nothinking", "traces"):
        rows = (pairs / f"{name}.jsonl").read_text().splitlines(keepends=True)
        changed = rows[0].replace('"model": "', '"model": "not-', 1) if name != "traces" else ""
        (folder / f"{name}.jsonl").write_text("".join([changed, *rows[1:]]))
        found[name] = folder / f"{name}.jsonl"
    (folder / "other-pairs").mkdir()
    for name in ("thinking", "nothinking"):
        shutil.copy(found[name] if name == "thinking" else pairs / f"{name}.jsonl", folder / "other-pairs")
    found["other-pairs"] = folder / "other-pairs"
    found["problems"] = folder / "problems.jsonl"
    found["problems"].write_text('{"problem": "1+1=?", "answer": "2"}\n')
    for number in (2, 3):
        samples = [c for p in range(number) for c in both_modes(f"p{p}", ["17", "18", "19"])]
        found[f"samples-{number}"] = write_samples(folder / f"samples-{number}", samples)
    for name, question in (("prompts", "1+1=?"), ("other-prompts", "1+2=?")):
        found[name] = folder / f"{name}.jsonl"
        rows = [{"prompt": question, "answer": "2"}, {"prompt": "2+2=?", "answer": "4"}]
        found[name].write_text("".join(f"{row}\n".replace("'", '"') for row in rows))
    return found


def base_config(study: str, inputs: dict[str, Any]) -> Any:
    policy = PolicyOptions(model=inputs["model"])
    records = AlphaInputs(pairs=str(inputs["pairs"]), traces=str(inputs["pairs"]))
    configs: dict[str, Callable[[], Any]] = {
        "sample": lambda: SampleConfig(policy=policy, prompts=str(inputs["prompts"])),
        "variance": lambda: VarianceConfig(policy=policy, prompts=str(inputs["prompts"])),
        "pairs": lambda: PairsConfig(inputs["samples-2"], "embedded", policy, ref_logps=True),
        "traces": lambda: TracesConfig(inputs["pairs"], inputs["samples-2"], policy=policy),
        "alpha_star": lambda: AlphaConfig(policy, records),
        "train": lambda: TrainConfig(policy, records, alpha="adaptive", batch_size=3, unmatched_prompts="error"),
        "evaluate": lambda: EvaluateConfig(PolicyOptions(), limit=2),
    }
    return configs[study]()


def other(study: str, name: str, inputs: dict[str, Any]) -> Any:
    """What `OTHER` stands for."""
    match name:
        case "prompts":
            return str(inputs["other-prompts"])
        case "samples":
            return inputs["samples-3"]
        case "pairs":
            return inputs["thinking"]
        case "adapters":
            return (inputs["policy.adapter"],)
        case "data":
            return (str(inputs["problems"]),)
        case "inputs.pairs":
            return str(inputs["other-pairs"])
        case "inputs.empty_pairs" | "inputs.traces":
            return str(inputs["nothinking" if name == "inputs.empty_pairs" else "traces"])
    return inputs[name]


def leaves(config: Any, path: str = "") -> Iterator[str]:
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value) and not isinstance(value, Shard):
            yield from leaves(value, f"{path}{entry.name}.")
        else:
            yield path + entry.name


def changed(config: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    return replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


@pytest.mark.slow
@pytest.mark.parametrize("study", FIELDS)
def test_every_setting_is_decided(
    study: str, inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decides, free, elsewhere = FIELDS[study]
    base = base_config(study, inputs)
    assert {*decides, *free, *elsewhere} == set(leaves(base)), "say of each field whether it decides a number"
    module = import_module(f"bvpo_stats.studies.{study}.run")

    @contextmanager
    def found(folder: Path, command: str, identity: dict[str, Any], **_: Any) -> Iterator[Path]:
        raise _Found(identity)
        yield folder

    monkeypatch.setattr(module, "open_run", found)
    if hasattr(module, "load_policy"):
        monkeypatch.setattr(module, "load_policy", functools.cache(module.load_policy))
    run = getattr(module, {"evaluate": "evaluate"}.get(study, f"run_{study}"))

    def identity(config: Any) -> Any:
        with pytest.raises(_Found) as caught:
            run(config, tmp_path / "run")
        return caught.value.args[0]

    kept = identity(base)
    assert identity(base) == kept
    wrong = {}
    for path, value in (decides | free).items():
        config = changed(base, path, other(study, path, inputs) if value is OTHER else value)
        found_here = identity(config)
        if (found_here == kept) == (path in decides):
            wrong[path] = differences(kept, found_here) or "the same run"
    assert wrong == {}
