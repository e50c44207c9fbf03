"""What an alpha-star run starts from: pairs of both kinds, traces, and the parameters to study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import Joined, join
from bvpo_stats.model.policy import Policy, PolicyOptions, load_template
from bvpo_stats.model.subset import LoraOptions, Subset, create_lora, linear_subset, lora_subset
from bvpo_stats.records import MODES, Mode, PreferencePair, TraceRecord
from bvpo_stats.sampling.layouts import read_pairs
from bvpo_stats.store.tables import fingerprint, read_records
from bvpo_stats.studies.alpha_star.config import AlphaInputs


@dataclass(frozen=True)
class SubsetOptions:
    """Which parameters theta is.

    Attributes:
        params: Patterns of layer names (see :mod:`bvpo_stats.model.subset`): of the adapter's layers where the policy
            has one, else of the Linear weights of the model itself.
        lora: The new adapter, where the policy has none and no patterns are given.
    """

    params: tuple[str, ...] = ()
    lora: LoraOptions = field(default_factory=LoraOptions)


def prepare_subset(policy: Policy, options: SubsetOptions) -> tuple[Policy, Subset, str]:
    """The policy with its parameters selected: a loaded adapter's, named weights, or those of a fresh LoRA adapter.

    A fresh adapter has B = 0, hence theta = theta_ref.

    Returns:
        The policy (wrapped, where an adapter was added), the subset, and the choice in words.

    Raises:
        UserError: The selection is empty or not supported.
    """
    model: Any = policy.model
    if hasattr(model, "disable_adapter"):
        subset = lora_subset(model, options.params or None)
        return policy, subset, f"loaded adapter{_chosen(options.params)}"
    if options.params:
        return policy, linear_subset(model, options.params), f"weights of {', '.join(options.params)}"
    model = create_lora(model, options.lora)
    targets = options.lora.targets if isinstance(options.lora.targets, str) else ", ".join(options.lora.targets)
    words = f"fresh LoRA adapter, rank {options.lora.r}, on {targets}"
    return replace(policy, model=model), lora_subset(model), words


def theta_words(policy: Policy, subset: Subset, words: str) -> str:
    """What theta is, and what the start of LoRA means for it: the gradient of A is B' times something, so zero.

    Args:
        policy: The policy at theta.
        subset: The parameters theta.
        words: What they are.
    """
    if policy.at_reference and any(".lora_A." in name for name in subset.parameters):
        return f"{words} (with B = 0, so that only the B half has a gradient yet and A has none)"
    return words


def _chosen(params: Sequence[str]) -> str:
    return f", layers {', '.join(params)}" if params else ""


def load_examples(inputs: AlphaInputs, policy: PolicyOptions | None = None) -> Joined:
    """Pairs and traces of the prompts that have both a D_t and a D_e pair, joined.

    Args:
        inputs: Where they are.
        policy: Whose template renders pairs that are no records yet (TRL's layouts); the embedded model's when None.

    Raises:
        UserError: Records are missing fields, a file holds the wrong kind of pairs, or no prompt has both.
    """
    pairs = (pair for mode in MODES for pair in load_set(inputs, mode, policy))
    return join(pairs, load_traces(inputs), unmatched="drop", limit=inputs.limit)


def load_set(inputs: AlphaInputs, mode: Mode, policy: PolicyOptions | None = None) -> list[PreferencePair]:
    """All pairs of D_t (``thinking``) or D_e (``nothinking``); arguments as in `load_examples`.

    Raises:
        UserError: The file is missing, records lack fields, or it holds the wrong kind of pairs.
    """
    path, option = inputs.set_path(mode), "pairs" if mode == "thinking" else "empty_pairs"
    pairs = read_pairs(path, lambda: load_template(policy or PolicyOptions()), mode, name=option)
    if not pairs:
        raise UserError(f"`{option}={str(path)!r}` holds no pairs.")
    for pair in pairs:
        if pair.mode != mode:
            raise UserError(
                f"`{option}={str(path)!r}`: the pair of prompt {pair.prompt_id} is a {pair.mode} pair; {mode} pairs "
                "are needed here."
            )
    return pairs


def load_traces(inputs: AlphaInputs) -> Iterator[TraceRecord]:
    """The bank's traces, one at a time; none where there is no bank.

    Raises:
        UserError: The bank is missing, or records are missing fields.
    """
    path = inputs.traces_path()
    return iter(()) if path is None else iter(read_records(path, TraceRecord))


def fingerprints(inputs: AlphaInputs) -> dict[str, str | None]:
    """Hashes of the input files: what tells two runs apart."""
    names = ("pairs", "empty_pairs", "traces")
    return {name: None if path is None else fingerprint(path) for name, path in zip(names, inputs.paths(), strict=True)}
