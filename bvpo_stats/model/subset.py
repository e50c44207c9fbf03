"""Which weights the scores are taken of: LoRA adapters or named Linear weights, everything else refused by name."""

from __future__ import annotations

import copy
import difflib
import fnmatch
import hashlib
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bvpo_stats.errors import UserError, check_whole
from bvpo_stats.model.head import causal_lm_of


@dataclass(frozen=True)
class LoraSite:
    """One LoRA layer, y = W x + scaling * B A x (+ bias), whose A, B or both are in the subset.

    Attributes:
        name: Path of the layer in the model.
        layer: PEFT's layer.
        adapter: The active adapter.
        name_a: Parameter name of A; None where only B is selected.
        name_b: Parameter name of B; None where only A is selected.
    """

    name: str
    layer: Any
    adapter: str
    name_a: str | None
    name_b: str | None


@dataclass(frozen=True)
class LinearSite:
    """One Linear (or GPT-2 Conv1D) layer whose weight is in the subset.

    Attributes:
        name: Path of the layer in the model.
        layer: The layer.
        name_weight: Parameter name of the weight; layers that share a weight share the name.
    """

    name: str
    layer: Any
    name_weight: str


@dataclass(frozen=True)
class Probe:
    """A Gaussian view of weight gradients: dL/dW A' instead of dL/dW, A ``[r, d_in]`` with variance 1 / r.

    Inner products of two gradients, all that alpha needs, keep their mean: E_A <X A', Y A'> = <X, Y>. Nothing is added
    to the model. Rows of A are independent: what r of them differ by says how much alpha owes to the draw of A.

    Attributes:
        rank: r.
        seed: Decides A, together with the weight's name.
    """

    rank: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("probe_rank", self.rank, low=2)
        check_whole("seed", self.seed, low=0)

    def matrix(self, name: str, d_in: int) -> torch.Tensor:
        """A of a weight, in float64 on the CPU; the same in every process and in every run."""
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        return torch.randn(self.rank, d_in, generator=generator, dtype=torch.float64) / self.rank**0.5


@dataclass(frozen=True)
class Subset:
    """The parameters theta of a study, in the order of ``model.named_parameters()``.

    Attributes:
        parameters: Name to weight.
        sites: The layers that use them.
        probe: How gradients of the weights are seen; None for all of each.
    """

    parameters: dict[str, nn.Parameter]
    sites: tuple[LoraSite | LinearSite, ...]
    probe: Probe | None = None

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of a score of each weight: the weight's, or ``(out, r)`` under a probe."""
        found = {name: tuple(weight.shape) for name, weight in self.parameters.items()}
        if self.probe is not None:
            for site in self.sites:
                assert isinstance(site, LinearSite)
                found[site.name_weight] = (_sides(site.layer)[0], self.probe.rank)
        return found

    def seen(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """A gradient of a weight in the shape of its scores, in float64: under a probe, times A'."""
        gradient = gradient.double()
        if self.probe is None:
            return gradient
        layer = next(site.layer for site in self.sites if isinstance(site, LinearSite) and site.name_weight == name)
        matrix = self.probe.matrix(name, _sides(layer)[1]).to(gradient.device)
        return (gradient.T if isinstance(layer, Conv1D) else gradient) @ matrix.T

    @property
    def size(self) -> int:
        """Dimension of theta."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def carried(self) -> Subset:
        """Without the A of LoRA layers whose B is zero: its gradient is B' times something, so zero exactly."""
        still = {
            site.name_a
            for site in self.sites
            if isinstance(site, LoraSite) and site.name_a and not bool(site.layer.lora_B[site.adapter].weight.any())
        }
        parameters = {name: weight for name, weight in self.parameters.items() if name not in still}
        if not still or not parameters:  # nothing but zeros: no reason to look for another form
            return self
        sites = [
            replace(site, name_a=None) if isinstance(site, LoraSite) and site.name_a in still else site
            for site in self.sites
        ]
        return Subset(parameters, tuple(s for s in sites if isinstance(s, LinearSite) or s.name_a or s.name_b))


@dataclass(frozen=True)
class LoraOptions:
    """A new adapter.

    Attributes:
        r: Rank.
        alpha: Numerator of the scaling alpha / r; None for 2 r.
        targets: Names of layers as PEFT takes them, or ``all-linear``.
        seed: Decides A's random start; B starts at zero.
    """

    r: int = 16
    alpha: int | None = None
    targets: str | tuple[str, ...] = "all-linear"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise UserError(f"LoRA rank {self.r}: must be a whole number of at least 1.")


def create_lora(model: nn.Module, options: LoraOptions) -> Any:
    """A model with a new LoRA adapter: no dropout, no biases, A random by the seed, B zero.

    The given model stays as it is: the adapter goes into new layers around the same weights.

    Args:
        model: A transformers causal LM without adapter.
        options: The adapter.

    Returns:
        The PEFT model in evaluation mode.

    Raises:
        UserError: The model has an adapter already, the rank is not positive, or the targets match nothing.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        raise UserError("The model has an adapter already; use it, or start from the base model.")
    config = LoraConfig(
        r=options.r,
        lora_alpha=2 * options.r if options.alpha is None else options.alpha,
        target_modules=options.targets if isinstance(options.targets, str) else list(options.targets),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT asks transformers by a name that is going out of use; nothing a user could do about it.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        torch.manual_seed(options.seed)
        try:
            adapted: Any = sharing_copy(model)
            return get_peft_model(adapted, config).eval()
        except ValueError as error:
            names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
            wanted = [options.targets] if isinstance(options.targets, str) else options.targets
            raise UserError(f"LoRA targets {', '.join(wanted)}: {error} {_near(wanted, names)}") from error


_ATTENTION = re.compile(r"(?:\A|\.)\w*att(?:n|ention)\w*\.(\w+)\Z")


def attention_advice(model: nn.Module | None) -> str:
    """What to select instead of layers that mix sequences, as experts do: those of the attention."""
    found = {}
    for name, module in () if model is None else model.named_modules():
        ending = _ATTENTION.search(name)
        if ending and type(getattr(module, "base_layer", module)) in (nn.Linear, Conv1D):
            found[ending.group(1)] = True
    if not found:
        return "Leave it out of the subset."
    return f"Select the attention layers alone: `target_modules='{','.join(found)}'` for a new adapter."


def sharing_copy(model: nn.Module) -> nn.Module:
    """The same model out of new modules around the same weights and buffers.

    PEFT puts its layers into the model it is given, which would change what every other holder of it computes.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def lora_subset(model: nn.Module, patterns: Sequence[str] | None = None) -> Subset:
    """The weights of the active LoRA adapter.

    Args:
        model: A PEFT model with one active LoRA adapter.
        patterns: Shell-style patterns (``*``, ``?``, ``[...]``) for the layer or parameter names to select, matched
            against whole names or their trailing parts, e.g. ``q_proj``, ``layers.3.*``, ``*lora_B*``. None for all.

    Raises:
        UserError: No adapter; a pattern that matches nothing; an adapter that is merged, disabled, one of several
            active ones; DoRA and other variants; adapters on embeddings, convolutions, experts or quantised layers;
            trainable biases, saved modules or tokens beside the adapter.
    """
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise UserError(
            "No trainable parameters are selected: the model has no adapter. Load it with one (`load_policy(..., "
            "lora=16)` or `adapter`), or name Linear weights of the base model (`linear_subset`)."
        )
    names = _first_names(model)
    for config in active_configs(model):
        _check_lora_config(config)
    candidates: dict[str, tuple[str, Any, str, bool]] = {}
    for name, layer in layers:
        if type(layer) is not LoraLinear:
            raise UserError(
                f"{name}: {_kind(layer)} is not supported; only LoRA on Linear layers is. {attention_advice(model)}"
            )
        adapter = _check_lora_layer(name, layer)
        if adapter is not None:
            candidates[names[id(layer.lora_A[adapter].weight)]] = (name, layer, adapter, True)
            candidates[names[id(layer.lora_B[adapter].weight)]] = (name, layer, adapter, False)
    selected = _select({parameter: entry[0] for parameter, entry in candidates.items()}, patterns)
    chosen: dict[str, dict[bool, str]] = {}
    for parameter in selected:
        chosen.setdefault(candidates[parameter][0], {})[candidates[parameter][3]] = parameter
    sites = tuple(
        LoraSite(name, layer, layer.active_adapters[0], chosen[name].get(True), chosen[name].get(False))
        for name, layer in layers
        if name in chosen
    )
    return Subset(_in_model_order(model, selected), sites)


def linear_subset(model: nn.Module, patterns: Sequence[str]) -> Subset:
    """Weights of named Linear layers of the base model (Conv1D in GPT-2); biases are not part of it.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not.
        patterns: Shell-style patterns for layer names, as in :func:`lora_subset`; at least one.

    Raises:
        UserError: No pattern; one that matches nothing, or only things that are not Linear layers; the output head; a
            weight tied to an embedding; a quantised layer.
    """
    if not patterns:
        raise UserError("No trainable parameters are selected: give at least one pattern of Linear layers.")
    head = causal_lm_of(model).get_output_embeddings()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    first_names = _first_names(model)
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor) and not _inside_adapter(name):
            layers[name] = module
    plain = {name: name for name, module in layers.items() if type(module) in (nn.Linear, Conv1D)}
    for pattern in patterns:
        matched = [name for name in layers if _matches(pattern, name)]
        odd = [name for name in matched if name not in plain and _is_linear_like(layers[name])]
        if odd or (matched and not any(name in plain for name in matched)):
            name = (odd or matched)[0]
            raise UserError(f"{name}: {_kind(layers[name])} is not supported; only weights of Linear layers are.")
    sites = []
    for name in _select(plain, patterns):
        weight: Any = layers[name].weight
        if id(weight) in embeddings:
            raise UserError(f"{name}: its weight is tied to an embedding, which is not supported; leave it out.")
        if layers[name] is head:
            raise UserError(f"{name}: the output head is not supported in a subset; leave it out.")
        _check_weight(name, layers[name])
        sites.append(LinearSite(name, layers[name], first_names[id(weight)]))
    return Subset(_in_model_order(model, {site.name_weight for site in sites}), tuple(sites))


def probe_subset(model: nn.Module, probe: Probe | None = None, patterns: Sequence[str] = ()) -> Subset:
    """Every Linear weight of the decoder, seen through a Gaussian probe.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not.
        probe: Rank and seed; None for the defaults.
        patterns: Only layers that match, as in :func:`linear_subset`; empty for all.

    Raises:
        UserError: Weight matrices that are no Linear layer's (experts, convolutions, quantised ones), with their share
            of all parameters; a pattern that matches nothing.
    """
    if not patterns:
        head = causal_lm_of(model).get_output_embeddings()
        names = {
            name: module
            for name, module in model.named_modules()
            if type(module) in (nn.Linear, Conv1D) and not _inside_adapter(name) and module is not head
        }
        # no subset covers embeddings and the output head
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)] + [head]
        known = {id(getattr(module, "weight", None)) for module in (*names.values(), *tables)}
        odd = [
            (name, weight.numel())
            for name, weight in model.named_parameters()
            if id(weight) not in known and weight.squeeze().dim() > 1 and not _inside_adapter(name)
        ]
        if odd or not names:
            missing = sum(size for _, size in odd) or sum(p.numel() for p in model.parameters())
            share = missing / sum(p.numel() for p in model.parameters())
            raise UserError(
                f"`theta='probe'` sees the weights of Linear layers, and {odd[0][0] if odd else 'nothing here'} "
                f"{'is none' if odd else 'is one'}: {share:.1%} of the parameters would be left out. Name layers that "
                f"are Linear by a pattern. {attention_advice(model)}"
            )
        patterns = tuple(names)
    found = linear_subset(model, patterns)
    return replace(found, probe=probe or Probe())


def uncovered_share(model: nn.Module, subset: Subset) -> float:
    """Share of a model's own parameters that are not in a subset: embeddings, head, norms, biases."""
    own = sum(weight.numel() for name, weight in model.named_parameters() if not _inside_adapter(name))
    return 1 - subset.size / own


def _sides(layer: Any) -> tuple[int, int]:
    """Outputs and inputs of a Linear layer or a Conv1D."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def _select(names: dict[str, str], patterns: Sequence[str] | None) -> list[str]:
    """Keys of ``names`` whose key or value matches a pattern; every pattern must match something."""
    if patterns is None:
        return list(names)
    selected: set[str] = set()
    for pattern in patterns:
        hits = {key for key, layer in names.items() if _matches(pattern, key) or _matches(pattern, layer)}
        if not hits:
            raise UserError(f"Pattern {pattern!r} matches no layer. {_near([pattern], names.values())}")
        selected |= hits
    if not selected:
        raise UserError("No trainable parameters are selected: the list of patterns is empty.")
    return [key for key in names if key in selected]


def _matches(pattern: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _near(patterns: Iterable[str], names: Iterable[str]) -> str:
    """Names a user may have meant, for the end of an error."""
    known = list(dict.fromkeys(names))
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in known))
    close: list[str] = []
    for pattern in patterns:
        bare = pattern.strip("*?.")
        close += difflib.get_close_matches(bare, endings, n=3, cutoff=0.5)
        close += difflib.get_close_matches(bare, known, n=2, cutoff=0.6)
    if close:
        return f"Near matches: {', '.join(dict.fromkeys(close))}."
    return f"Layers are called, for example, {', '.join(endings[:8])}."


def _in_model_order(model: nn.Module, selected: Iterable[str]) -> dict[str, nn.Parameter]:
    wanted = set(selected)
    return {name: parameter for name, parameter in model.named_parameters() if name in wanted}


def _first_names(model: nn.Module) -> dict[int, str]:
    """Parameter id to the name under which ``named_parameters`` lists it, however many layers share it."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def active_configs(model: nn.Module) -> list[Any]:
    """The PEFT configurations of a model's active adapters; none without PEFT."""
    configs = getattr(model, "peft_config", None)
    if not configs:  # transformers' own models have a method of the name below
        return []
    return [configs[name] for name in cast(Any, model).active_adapters if name in configs]


def check_adapter_config(config: Any, name: str) -> None:
    """Refuses adapters of which either the policy or the reference would be computed wrongly.

    Scores are taken below the model's own call, where prompt and prefix tuning do their work, and the reference is the
    model with the adapter disabled, which leaves trained biases in place.

    Args:
        config: A PEFT configuration.
        name: What to call the adapter in a message.

    Raises:
        UserError: Not LoRA, or LoRA that trains biases of the base model.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise UserError(
            f"{name} is of the kind {kind}, which is not supported; only LoRA is. Where PEFT can merge it "
            "(merge_and_unload), give the merged model as `model`."
        )
    if config.bias != "none":
        raise UserError(
            f"{name} trains biases (bias={config.bias!r}), which stay in place when it is disabled, so that the "
            "reference would be wrong; train it with bias='none', or give the merged model as `model`."
        )


def _check_lora_config(config: Any) -> None:
    """Refuses what an adapter trains besides A and B."""
    check_adapter_config(config, "The adapter")
    for setting in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, setting, None):
            raise UserError(f"The adapter uses {setting}={getattr(config, setting)!r}, which is not supported.")


def _check_lora_layer(name: str, layer: Any) -> str | None:
    """The layer's active adapter; None where the active adapter does not touch this layer."""
    if layer.merged:
        raise UserError(f"{name}: the adapter is merged into the base weight; call unmerge_adapter() first.")
    if layer.disable_adapters:
        raise UserError(f"{name}: the adapter is disabled; enable it first.")
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(layer.active_adapters) > 1:
        raise UserError(f"{name}: adapters {', '.join(layer.active_adapters)} are active at once; activate one.")
    if not active:
        return None
    (adapter,) = active
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__.removesuffix("LinearVariant")
        raise UserError(f"{name}: the LoRA variant {variant} is not supported; use plain LoRA.")
    if layer.lora_B[adapter].bias is not None:
        raise UserError(f"{name}: lora_bias=True is not supported; the bias would be missing from the scores.")
    _check_weight(name, layer.get_base_layer())
    _check_weight(name, layer.lora_A[adapter])
    return adapter


def _check_weight(name: str, layer: Any) -> None:
    weight = layer.weight
    if type(layer) not in (nn.Linear, Conv1D) or not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        kind = _kind(layer)
        advice = "load the model unquantised" if "quantised" in kind or weight.dtype.itemsize < 2 else _PLAIN
        raise UserError(f"{name}: {kind} ({weight.dtype}) is not supported; {advice}.")
    if weight.is_meta:
        raise UserError(f"{name}: the weight is offloaded; load the whole model on one device.")


_PLAIN = "only plain Linear layers are"


def _is_linear_like(layer: Any) -> bool:
    return isinstance(layer, nn.Linear) or "Linear" in type(layer).__name__


def _kind(layer: Any) -> str:
    """How to call an unsupported layer: by what users know it as."""
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if kind == "peft.tuners.lora.layer.Linear":
        return "a layer under an adapter (its weight is called base_layer)"
    if kind == "peft.tuners.lora.layer.Embedding":
        return "LoRA on an embedding"
    if any(word in kind for word in ("bnb", "4bit", "8bit", "gptq", "awq", "aqlm", "hqq", "eetq", "torchao")):
        return f"the quantised layer {kind}"
    return kind


def _inside_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))
