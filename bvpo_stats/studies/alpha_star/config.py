"""Settings of an alpha-star run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from bvpo_stats import options as o
from bvpo_stats.errors import UserError
from bvpo_stats.model.options import EMBEDDED, PolicyOptions
from bvpo_stats.records import Mode, PreferencePair, TraceRecord
from bvpo_stats.store.tables import record_paths


@dataclass(frozen=True)
class AlphaInputs:
    """Where the records of a run are.

    Attributes:
        pairs: D_t: ``embedded``, a file, or the folder of a pairs run.
        empty_pairs: D_e, likewise; None for what lies beside D_t.
        traces: Trace bank: a file or the folder of a traces run; None for none (or the embedded one).
        limit: Use only the first so many prompts.
    """

    pairs: Annotated[
        str, o.Option("D_t: a pairs file (JSONL or Parquet) or the folder of a pairs run; `embedded`.")
    ] = EMBEDDED
    empty_pairs: Annotated[str | None, o.Option("D_e, likewise.", shown="what lies beside `pairs`")] = None
    traces: Annotated[
        str | None, o.Option("Trace bank, for mu away from the reference point: file or folder of a run.")
    ] = None
    limit: o.Limit = None

    def __post_init__(self) -> None:
        o.check_options(self)

    def paths(self) -> tuple[Path, Path, Path | None]:
        """Files of D_t, D_e and the traces.

        Raises:
            UserError: One of them is not there.
        """
        return self.set_path("thinking"), self.set_path("nothinking"), self.traces_path()

    def set_path(self, mode: Mode) -> Path:
        """File of D_t (``thinking``) or D_e (``nothinking``).

        Raises:
            UserError: It is not there.
        """
        if mode == "thinking":
            (path,) = record_paths(self.pairs, PreferencePair, mode=mode, name="pairs")
        else:
            source = self.pairs if self.empty_pairs is None else self.empty_pairs
            (path,) = record_paths(source, PreferencePair, mode=mode, name="empty_pairs")
        return path

    def traces_path(self) -> Path | None:
        """File of the trace bank; None where there is none.

        Raises:
            UserError: It is not there.
        """
        traces = EMBEDDED if self.traces is None and self.pairs == EMBEDDED else self.traces
        return None if traces is None else record_paths(traces, TraceRecord, name="traces")[0]


@dataclass(frozen=True)
class AlphaConfig:
    """Settings of an alpha-star run.

    Attributes:
        policy: Which model.
        inputs: Where pairs and traces are.
        loss_type: ``sigmoid`` (DPO), ``simpo`` or ``ipo``.
        beta: Inverse temperature of the loss.
        simpo_gamma: Target margin of SimPO.
        lora_r: Rank of a fresh adapter, where the policy has none and no patterns are given.
        target_modules: Its layers: names as PEFT takes them, or ``all-linear``.
        theta: ``lora``; ``probe`` for all Linear weights of the model, seen through a Gaussian probe; or a pattern of
            layer names, as ``params``.
        probe_rank: Rank of the probe.
        params: Patterns of layer names (see :mod:`bvpo_stats.model.subset`): of the adapter's layers where the policy
            has one, else of the Linear weights of the model itself.
        batch_size: Examples per optimizer step, B.
        eta_l: Learning rate times smoothness; ``auto`` measures it.
        learning_rate: eta, for ``optimizer`` and for ``eta_l="auto"``.
        optimizer: Measure eta L along the noise in the metric of ``adamw`` or ``sgd``, and say alpha* there.
        traces_per_answer: K, most traces of the bank behind each answer.
        method: Estimator of the marginal gradient.
        optimizer_state: File of Adam's state; None with ``adamw`` for the second moments of these gradients.
        level: Confidence level.
        groups: Jackknife groups; ``auto`` for the rule of `bvpo_stats.statistics.moments.jackknife_groups`.
        seed: Decides the fresh adapter and every draw.
        max_tokens: Budget of padded tokens per forward.
        allow_mismatch: Take pairs and traces of another model or template.
    """

    policy: PolicyOptions = field(default_factory=PolicyOptions)
    inputs: AlphaInputs = field(default_factory=AlphaInputs)
    loss_type: Annotated[Literal["sigmoid", "simpo", "ipo"], o.Option("sigmoid (DPO), simpo or ipo.", name="loss")] = (
        "sigmoid"
    )
    beta: Annotated[float, o.Option("Inverse temperature of the loss.", above=0, high=1e3)] = 0.1
    simpo_gamma: Annotated[float, o.Option("Target margin, simpo only.", name="gamma", low=0, high=1e3)] = 0.0
    lora_r: Annotated[
        int, o.Option("Rank of a fresh LoRA adapter, where no `adapter` is given.", low=1, high=10**5)
    ] = 16
    target_modules: Annotated[
        str | tuple[str, ...],
        o.Option(
            "Layers of the fresh adapter: comma-separated names, or all-linear.",
            read=o.names_or_all,
            spelled="all-linear",
        ),
    ] = "all-linear"
    theta: Annotated[
        str,
        o.Option(
            "Whose gradients: lora, the adapter's; probe, those of all Linear weights through a random projection; or "
            "a pattern of layer names."
        ),
    ] = "lora"
    probe_rank: Annotated[int, o.Option("Rank of that projection, drawn by `seed`.", low=2, high=10**4)] = 8
    params: Annotated[
        tuple[str, ...],
        o.Option("Only layers that match this pattern; without `adapter`, weights of the model itself."),
    ] = ()
    batch_size: Annotated[
        float, o.Option("Examples per optimizer step: alpha* belongs to one.", above=0, high=1e12)
    ] = 128
    eta_l: Annotated[
        float | Literal["auto"],
        o.Option(
            "Learning rate times smoothness, or `auto` to measure it (needs `learning_rate`).",
            above=0,
            high=1e6,
            read=o.number_or_word,
            spelled="1",
        ),
    ] = 1.0
    optimizer: Annotated[
        Literal["adamw", "sgd"] | None,
        o.Option("adamw or sgd: eta L of its steps in its own metric, and alpha* there (needs `learning_rate`)."),
    ] = None
    learning_rate: Annotated[float | None, o.Option("For `optimizer` and `eta_l='auto'`.", above=0, high=100)] = None
    traces_per_answer: Annotated[int, o.Option("K, most traces of the bank behind each answer.", low=1, high=10**5)] = 8
    method: Annotated[
        Literal["auto", "reference-point", "anchored", "posterior", "prior", "multilevel", "jackknife"],
        o.Option(
            "Estimator of the marginal gradient: auto, reference-point, anchored, posterior, prior, multilevel, "
            "jackknife.",
            name="marginal",
        ),
    ] = "auto"
    optimizer_state: Annotated[
        Path | None,
        o.Option(
            "Adam's state (optimizer.pt or safetensors, or its folder), for alpha* in Adam's metric.",
            shown="with `optimizer='adamw'`, the second moments of these gradients",
        ),
    ] = None
    level: o.Level = 0.95
    groups: Annotated[
        int | Literal["auto"],
        o.Option(
            "Groups of the jackknife. `auto`: single prompts, beyond 256 of them 20 groups.",
            low=2,
            high=10**6,
            read=o.whole_or_word,
            spelled="auto",
        ),
    ] = "auto"
    seed: o.Seed = 0
    max_tokens: o.MaxTokens = 16_384
    allow_mismatch: Annotated[bool, o.Option("Take pairs and traces of another model or template.")] = False

    def __post_init__(self) -> None:
        o.check_options(self)
        if not self.theta.strip():
            raise UserError("`theta=''`: give lora, probe or a pattern of layer names.")
        if self.theta == "probe" and (self.optimizer is not None or self.optimizer_state is not None):
            named = "optimizer" if self.optimizer is not None else "optimizer_state"
            raise UserError(
                f"`{named}` needs the gradients themselves, weight by weight, and `theta='probe'` sees inner products "
                "only; leave it out, or name fewer layers by a pattern."
            )
        for name in ("optimizer", "eta_l"):
            if getattr(self, name) in ("auto", "adamw", "sgd") and self.learning_rate is None:
                raise UserError(
                    f"`{name}={getattr(self, name)!r}` measures the curvature L and needs eta: give `learning_rate`."
                )
        if self.simpo_gamma and self.loss_type != "simpo":
            raise UserError(f"`simpo_gamma={self.simpo_gamma:g}` belongs to `loss_type='simpo'`; leave it out.")
        if self.optimizer == "sgd" and self.optimizer_state is not None:
            raise UserError(
                "`optimizer_state` is the metric of Adam's kin, and `optimizer='sgd'` has none; leave one out."
            )
