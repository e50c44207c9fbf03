"""What this machine and a model are good for, before anything is run: versions, room, refusals, an estimate."""

from __future__ import annotations

import os
import platform
import re
import shutil
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Any

from bvpo_stats import __version__
from bvpo_stats import options as o
from bvpo_stats.errors import UserError
from bvpo_stats.model.options import PolicyOptions
from bvpo_stats.progress import spoken_bytes
from bvpo_stats.records import MODES

_PACKAGE = "bvpo-stats"
_SHARE = 0.4
"""Of the operations of a large product of matrices, what a pass through a model gets."""
_QUESTION = "What is 2 + 3?"


@dataclass(frozen=True)
class DoctorConfig:
    """What to look at, and which run to estimate.

    Attributes:
        policy: Which model.
        prompts: Prompts of the run.
        tokens: Tokens of all sequences of a prompt; None for five of 1,500, or of a quarter of the model's positions.
        gpus: GPUs that share the run.
        max_tokens: Padded tokens of a pass.
        lora_r: Rank of the adapter.
        json: Whether a program will read it.
    """

    policy: PolicyOptions = field(default_factory=PolicyOptions)
    prompts: Annotated[int, o.Option("Prompts of the run that is estimated.", low=1, high=10**12)] = 1_000
    tokens: Annotated[
        int | None,
        o.Option(
            "Tokens of all sequences of a prompt.",
            low=1,
            high=10**9,
            shown="five sequences of 1500, or of a quarter of the model's positions",
        ),
    ] = None
    gpus: Annotated[int, o.Option("GPUs that share the run.", low=1, high=10**6)] = 1
    max_tokens: o.MaxTokens = 16_384
    lora_r: Annotated[int, o.Option("Rank of the adapter.", low=1, high=10**5)] = 16
    json: Annotated[bool, o.Option("Print one JSON object in the place of lines.")] = False

    def __post_init__(self) -> None:
        o.check_options(self)


@dataclass(frozen=True)
class Diagnosis:
    """What was found; `asdict` of it is what ``doctor --json`` prints.

    Attributes:
        versions: Of Python, this package and those it needs, as installed.
        outdated: Packages that are missing or too old for this version, with what is asked for.
        extras: Missing packages of each extra; none where it is complete.
        machine: Cores, memory, devices, the device that would be used.
        disk: Free bytes where runs go, and in the cache of models.
        model: Shape, template, prompts of both modes; empty where the model cannot be used.
        refused: What commands would refuse, or what would not fit.
        estimate: Bytes and seconds of a run, from the formulas of page "What a run needs".
    """

    versions: dict[str, str]
    outdated: tuple[str, ...]
    extras: dict[str, tuple[str, ...]]
    machine: dict[str, Any]
    disk: dict[str, int]
    model: dict[str, Any]
    refused: tuple[str, ...]
    estimate: dict[str, Any]

    @property
    def well(self) -> bool:
        """Whether nothing stands in the way of the run."""
        return not self.outdated and not self.refused

    def lines(self) -> Iterator[str]:
        """What people read."""
        yield from textwrap.wrap(", ".join(f"{name} {number}" for name, number in self.versions.items()), 80)
        for entry in self.outdated:
            yield f"WRONG  {entry}"
        for name, missing in self.extras.items():
            yield f"extra  [{name}]: " + (f"not installed: {', '.join(missing)}" if missing else "there")
        m = self.machine
        memory = f"{spoken_bytes(m['memory_free'])} of {spoken_bytes(m['memory'])} free"
        yield f"device {m['device']} ({m['dtype']}), {m['threads']} threads on {m['cores']} cores; memory {memory}"
        for gpu in m["gpus"]:
            yield f"GPU    {gpu['name']}: {spoken_bytes(gpu['free'])} of {spoken_bytes(gpu['memory'])} free"
        for place, free in self.disk.items():
            yield f"disk   {place}: {spoken_bytes(free)} free"
        if self.model:
            d = self.model
            size = f"{d['parameters'] / 1e6:,.1f} M parameters"
            yield f"model  {d['name']}: {d['type']}, {size}, {d['words']:,} words, {d['positions']} positions"
            yield f"prompt template {d['template']}, empty trace {d['empty_trace']!r}, ends in {d['ends']}"
            yield f"       Thinking   {d['thinking']!r}"
            yield f"       NoThinking {d['nothinking']!r}"
        if self.estimate:
            e = self.estimate
            yield f"run    {e['prompts']:,} prompts of {e['tokens']:,} tokens, {e['gpus']} device(s), from formulas:"
            for name, label in (
                ("alpha_star", "alpha-star"),
                ("train_lora", "train, LoRA"),
                ("train_all", "train, all weights"),
            ):
                need = e[name]
                fits = "" if need["fits"] is None else ", fits" if need["fits"] else ", does NOT fit"
                disk = f", {spoken_bytes(need['disk'])} on disk" if need.get("disk") else ""
                yield f"       {label}: {spoken_bytes(need['memory'])} each{fits}; {spoken_time(need['seconds'])}{disk}"
        elif self.model:
            yield "run    no estimate: the formulas are for models of Llama's kind"
        for entry in self.refused:
            yield f"REFUSED {entry}"
        yield "Nothing stands in the way." if self.well else "See the lines in capitals."


def spoken_time(seconds: float) -> str:
    """A time in words.

    >>> spoken_time(12), spoken_time(600), spoken_time(9000), spoken_time(400_000)
    ('about 12 s', 'about 10 min', 'about 2.5 h', 'about 4.6 days')
    """
    for unit, one in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * one:
            return f"about {seconds / one:.2g} {unit}"
    return f"about {max(seconds, 1):.0f} s"


def diagnose(config: DoctorConfig, runs: Path) -> Diagnosis:
    """Looks at versions, machine and model, without the model's weights.

    Args:
        config: What to look at.
        runs: Where runs would be written.
    """
    refused: list[str] = []
    versions, outdated, extras = packages()
    machine = _machine(config.policy, refused)
    disk = {str(runs): _free(runs), "models' cache": _free(_cache())}
    model, shape = _model(config.policy, config.lora_r, refused)
    estimate: dict[str, Any] = {}
    if shape is not None:
        estimate = _estimate(config, shape, machine, model["positions"])
        for name, command in (("alpha_star", "alpha-star"), ("train_lora", "train")):
            if estimate[name]["fits"] is False:
                refused.append(
                    f"`bvpo-stats {command}` would need {spoken_bytes(estimate[name]['memory'])} on a device, and "
                    f"{spoken_bytes(machine['room'])} are free: lower `max_tokens`, or take a larger one."
                )
        if estimate["alpha_star"]["disk"] > disk[str(runs)]:
            refused.append(f"{runs} has no room for {spoken_bytes(estimate['alpha_star']['disk'])}.")
    return Diagnosis(versions, outdated, extras, machine, disk, model, tuple(refused), estimate)


def packages() -> tuple[dict[str, str], tuple[str, ...], dict[str, tuple[str, ...]]]:
    """(installed versions, what is missing or too old, what each extra lacks), from what the package says it needs."""
    from packaging.requirements import Requirement

    versions, outdated = {"python": platform.python_version(), _PACKAGE: __version__}, []
    extras: dict[str, tuple[str, ...]] = {}
    for text in requires(_PACKAGE) or ():
        need = Requirement(text)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", text)
        name = extra[1] if extra else ""
        if need.name == _PACKAGE or name in _OURS or (need.marker and not need.marker.evaluate({"extra": name})):
            continue
        found = _version(need.name)
        short = found is None or not need.specifier.contains(found, prereleases=True)
        words = f"{need.name}{need.specifier}" + ("" if found is None else f" (has {found})")
        if extra:
            extras[name] = (*extras.get(name, ()), *([words] if short else []))
        else:
            versions[need.name] = found or "missing"
            outdated += [f"{words} is needed"] if short else []
    return versions, tuple(outdated), dict(sorted(extras.items()))


_OURS = ("test", "lint", "docs", "bench")
"""Extras for those who work on this package."""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine(options: PolicyOptions, refused: list[str]) -> dict[str, Any]:
    import torch

    from bvpo_stats.model.policy import pick_device

    try:
        device = pick_device(options.device)
    except UserError as error:
        refused.append(str(error))
        device = torch.device("cpu")
    gpus = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, whole = torch.cuda.mem_get_info(number)
        gpus.append({"name": torch.cuda.get_device_name(number), "memory": whole, "free": free})
    memory, free = _memory()
    dtype = options.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "the checkpoint's"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory": memory,
        "memory_free": free,
        "device": str(device),
        "dtype": dtype,
        "gpus": gpus,
        "room": gpus[device.index or 0]["free"] if gpus and device.type == "cuda" else free,
        "operations": _operations(device),
    }


def _memory() -> tuple[int, int]:
    """(all, available) bytes of memory."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        whole, free = (int(rows[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        return whole, free
    except (OSError, ValueError, KeyError):
        pass
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0, 0


def _operations(device: Any) -> float:
    """Operations a second of a product of matrices there, in the type that a run would use."""
    import torch

    size, dtype = (512, torch.float32) if device.type == "cpu" else (4096, torch.bfloat16)
    a = torch.ones(size, size, dtype=dtype, device=device)
    spent, rounds = 0.0, 0
    a @ a  # the first one sets things up
    while spent < 0.05:
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for it
        spent, rounds = spent + time.perf_counter() - start, rounds + 1
    return rounds * 2.0 * size**3 / spent


def _free(place: Path) -> int:
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def _cache() -> Path:
    return Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser().absolute()


def _model(options: PolicyOptions, rank: int, refused: list[str]) -> tuple[dict[str, Any], Any]:
    """(what a model is, its shape), from its configuration and its tokenizer."""
    from transformers import AutoConfig

    from bvpo_stats.model.needs import ModelShape
    from bvpo_stats.model.policy import load_error, load_template, model_source, quiet_transformers

    try:
        template = load_template(options)
        try:
            with quiet_transformers():
                config: Any = AutoConfig.from_pretrained(
                    model_source(options.model), trust_remote_code=options.trust_remote_code
                )
        except Exception as error:
            raise load_error(options.model, error) from error
        shape = ModelShape.of(config)
        prompts = {mode: template.prompt_text(_QUESTION, mode) for mode in MODES}
        parameters = _check_layers(config, options, rank)
    except UserError as error:
        refused.append(str(error))
        return {}, None
    if shape is not None and abs(shape.parameters - parameters) > 0.05 * parameters:
        shape = None  # of another kind than Llama's, e.g. a mixture of experts: the formulas do not hold
    text = config.get_text_config()
    return {
        "name": options.model,
        "type": str(config.model_type),
        "parameters": parameters,
        "words": int(text.vocab_size),
        "positions": getattr(text, "max_position_embeddings", None),
        "template": template.name,
        "empty_trace": template.protocol.empty_trace,
        "ends": template.tokenizer.convert_ids_to_tokens(list(template.vocabulary.eos_ids)),
        **{str(mode): text for mode, text in prompts.items()},
    }, shape


def _check_layers(config: Any, options: PolicyOptions, rank: int) -> int:
    """Refuses what `alpha-star` and `train` would refuse, on a model without weights; returns its parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    from bvpo_stats.model.policy import load_error, quiet_transformers
    from bvpo_stats.model.subset import LoraOptions, create_lora, lora_subset

    try:
        with quiet_transformers(), torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=options.trust_remote_code)
    except Exception as error:
        raise load_error(options.model, error) from error
    parameters = sum(weight.numel() for weight in model.parameters())
    one = torch.zeros((), dtype=torch.float32)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):  # one number each, seen as a whole weight
            setattr(module, name, torch.nn.Parameter(one.expand(weight.shape), requires_grad=False))
    lora_subset(create_lora(model, LoraOptions(r=rank)))
    return parameters


def _estimate(config: DoctorConfig, shape: Any, machine: dict[str, Any], positions: int | None) -> dict[str, Any]:
    import torch

    wide = machine["device"] == "cpu" and machine["dtype"] in ("float32", "float64")
    dtype = torch.float32 if wide else torch.bfloat16
    each = config.tokens or 5 * min(1_500, max(1, (positions or 6_000) // 4))
    speed, tokens = _SHARE * machine["operations"], config.prompts * each / config.gpus
    numbers = shape.moving(config.lora_r)

    def need(memory: int, operations: float, disk: int | None = None) -> dict[str, Any]:
        room = machine["room"]
        found = {"memory": memory, "fits": memory <= room if room else None, "seconds": operations / speed}
        return found if disk is None else {**found, "disk": disk}

    reference = 2.0 * shape.parameters * tokens
    batch = config.max_tokens
    return {
        "prompts": config.prompts,
        "tokens": each,
        "gpus": config.gpus,
        "operations_per_second": speed,
        "alpha_star": need(
            shape.alpha_star(batch, numbers, dtype), shape.operations(tokens, trained=False), shape.closed(numbers)
        ),
        "train_lora": need(
            shape.training(config.gpus, batch, config.lora_r, dtype),
            shape.operations(tokens, trained=False) + reference,
        ),
        "train_all": need(
            shape.training(config.gpus, batch, None, dtype), shape.operations(tokens, trained=True) + reference
        ),
    }
