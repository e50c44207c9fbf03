"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

from bvpo_stats import options as o
from bvpo_stats.errors import UserError
from bvpo_stats.model.options import EMBEDDED, PolicyOptions
from bvpo_stats.studies.alpha_star.config import AlphaInputs

if TYPE_CHECKING:
    from bvpo_stats.model.subset import LoraOptions
    from bvpo_stats.training.presets import Preset


MODEL = "model"
"""Folder of the trained adapter or model inside a run's folder."""


def _trackers(words: str) -> tuple[str, ...]:
    return tuple(words.replace(" ", "").split(","))


_POLICY = o.Group({"model": o.Option("Model folder or hub id.", shown="the preset's, or embedded")})
_INPUTS = o.Group({"traces": o.Option("Trace bank for `alpha='adaptive'`: file or folder of a traces run.")})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    A field that is None stands for the preset's value (``alpha`` to ``max_length``) or for the trainer's own. Fields
    with the name of one of `bvpo_stats.training.config.BVPOConfig` mean the same there, where they are explained.

    Attributes:
        policy: Which model.
        inputs: Where pairs and traces are.
        method: ``bvpo`` trains on both sets, ``dpo`` and ``simpo`` on D_t alone.
        preset: Name of a preset (`bvpo_stats.training.presets`); None for ``embedded`` with the embedded model, else
            ``lora``.
        batch_size: Prompts per optimizer step, over all processes.
        lora_r: Rank of the new adapter; 0 trains all weights (or a loaded adapter's).
        lora_alpha: Numerator of the adapter's scaling; None for twice the rank.
        target_modules: Layers of the new adapter.
        gradient_checkpointing: Compute activations again in backward.
        bf16: Products in bfloat16, trained weights in float32; None for the preset's.
        report_to: Trackers of transformers.
        resume: Refuse to start anew.
        push_to_hub: Repository on the hub that takes the trained model with its card.
    """

    policy: Annotated[PolicyOptions, _POLICY] = field(default_factory=PolicyOptions)
    inputs: Annotated[AlphaInputs, _INPUTS] = field(default_factory=AlphaInputs)
    method: Annotated[Literal["dpo", "simpo", "bvpo"], o.Option("bvpo (both sets), dpo or simpo (D_t alone).")] = "bvpo"
    preset: Annotated[
        str | None,
        o.Option(
            "Settings by name: the paper's for r1-qwen-7b, r1-qwen-1.5b, r1-0528-qwen3-8b; lora; embedded. "
            "Options given beside it win.",
            shown="embedded for the embedded model, else lora",
        ),
    ] = None
    alpha: Annotated[
        float | str | None,
        o.Option(
            "Weight of the trace loss: a number, `adaptive`, or a schedule such as 0:0.2,100:0.8 (steps) or "
            "0%:0.5,100%:1 (of the run).",
            shown="0.5",
            read=str,
        ),
    ] = None
    loss_type: Annotated[
        Literal["sigmoid", "simpo", "ipo"] | None,
        o.Option("sigmoid (DPO), simpo or ipo.", shown="the method's", name="loss"),
    ] = None
    beta: Annotated[
        float | None, o.Option("Inverse temperature of the loss.", shown="the preset's", above=0, high=1e3)
    ] = None
    simpo_gamma: Annotated[
        float | None, o.Option("Target margin, simpo only.", shown="the preset's", name="gamma", low=0, high=1e3)
    ] = None
    learning_rate: Annotated[float | None, o.Option("Peak learning rate.", shown="the preset's", above=0, high=100)] = (
        None
    )
    batch_size: Annotated[
        int | None, o.Option("Prompts per step, over all processes.", shown="the preset's", low=1, high=10**6)
    ] = None
    num_train_epochs: Annotated[
        float | None, o.Option("Passes over the prompts.", shown="the preset's, 1", name="epochs", above=0, high=1e6)
    ] = None
    max_steps: Annotated[
        int | None, o.Option("Stop after this many optimizer steps; replaces `num_train_epochs`.", low=1, high=10**9)
    ] = None
    lr_scheduler_type: Annotated[
        str | None, o.Option("cosine, linear, constant, ...", shown="the preset's", name="scheduler")
    ] = None
    warmup_steps: Annotated[
        float | None,
        o.Option(
            "Share of the steps with a rising learning rate.",
            shown="the preset's, 0.1",
            name="warmup",
            low=0,
            high=1e9,
        ),
    ] = None
    max_length: Annotated[
        int | None,
        o.Option("Longest sequence; prompts with longer ones are set aside.", shown="the preset's", low=1, high=10**9),
    ] = None
    lora_r: Annotated[
        int | None, o.Option("Rank of a new adapter; 0 trains all weights.", shown="the preset's", low=0, high=10**5)
    ] = None
    lora_alpha: Annotated[
        int | None, o.Option("Numerator of LoRA's scaling.", shown="twice the rank", low=1, high=10**6)
    ] = None
    target_modules: Annotated[
        str | tuple[str, ...],
        o.Option(
            "Layers of the new adapter: comma-separated names, or all-linear.",
            read=o.names_or_all,
            spelled="all-linear",
        ),
    ] = "all-linear"
    precompute_ref_log_probs: Annotated[
        bool,
        o.Option(
            "Take the reference's log-probabilities once, before the first step (stored ones are used).",
            name="precompute-ref-logps",
        ),
    ] = False
    alpha_rule: Annotated[
        Literal["rising", "theorem4", "descent", "direction", "hypergradient"],
        o.Option("adaptive: what is done with the estimates: rising, theorem4, descent, direction or hypergradient."),
    ] = "rising"
    alpha_prior: Annotated[float, o.Option("adaptive: what estimates are shrunk toward.", low=0, high=1)] = 0.5
    alpha_update_steps: Annotated[
        int | None,
        o.Option(
            "adaptive: steps between two looks at the traces, if any.", shown="1% of the tokens", low=1, high=10**9
        ),
    ] = None
    alpha_traces_per_answer: Annotated[
        int, o.Option("adaptive: traces behind each answer of a look.", low=1, high=10**5)
    ] = 4
    eta_l: Annotated[
        float | Literal["auto"],
        o.Option(
            "adaptive: eta L at the peak learning rate (1 is the paper's); `auto`: measured in the optimizer's metric.",
            above=0,
            high=1e6,
            read=o.number_or_word,
            spelled="auto",
        ),
    ] = "auto"
    unmatched_prompts: Annotated[
        Literal["error", "drop"] | None,
        o.Option("Prompts in one set only: error or drop.", shown="error; embedded pairs: drop", name="unmatched"),
    ] = None
    max_tokens: o.MaxTokens = 16_384
    bf16: Annotated[
        bool | None,
        o.Option(
            "Products in bfloat16, trained weights in float32.",
            shown="the preset's: on for the paper's, off otherwise",
        ),
    ] = None
    gradient_checkpointing: Annotated[bool, o.Option("Recompute activations: less memory, more time.")] = False
    save_steps: Annotated[int, o.Option("Steps between checkpoints; the newest two are kept.", low=1, high=10**9)] = 50
    logging_steps: Annotated[int, o.Option("Steps between log entries.", low=1, high=10**9)] = 1
    report_to: Annotated[
        tuple[str, ...],
        o.Option(
            "Trackers of transformers, comma-separated: tensorboard, wandb, ...; none.",
            read=_trackers,
            spelled="none",
        ),
    ] = ("none",)
    seed: o.Seed = 0
    allow_mismatch: Annotated[bool, o.Option("Take pairs and traces of another model or template.")] = False
    resume: Annotated[bool, o.Option("Refuse to start anew (a run in its folder goes on anyway).")] = False
    push_to_hub: o.PushToHub = None

    def __post_init__(self) -> None:
        o.check_options(self)
        if self.warmup_steps is not None and self.warmup_steps > 1 and self.warmup_steps % 1:
            raise UserError(f"`warmup_steps={self.warmup_steps}`: a share of at most 1, or a whole number of steps.")
        if self.alpha is not None and self.method != "bvpo":
            raise UserError(
                f"`alpha={self.alpha!r}`: `method={self.method!r}` trains on D_t alone; give `alpha` to "
                "`method='bvpo'`."
            )
        _ = self.named  # refuses an unknown preset

    @property
    def named(self) -> Preset:
        """The preset."""
        from bvpo_stats.training.presets import preset

        return preset(self.preset or (EMBEDDED if self.policy.model == EMBEDDED else "lora"), self.method)

    def with_preset_model(self) -> TrainConfig:
        """The same with the preset's model, where it has one."""
        return replace(self, policy=replace(self.policy, model=self.named.model or EMBEDDED))

    @property
    def trains_all_weights(self) -> bool:
        """Whether there is no adapter, neither a new one nor a loaded one."""
        return self.lora is None and self.policy.adapter is None

    @property
    def lora(self) -> LoraOptions | None:
        """The new adapter; None trains all weights."""
        from bvpo_stats.model.subset import LoraOptions

        rank = self.named.lora_r if self.lora_r is None else self.lora_r
        return LoraOptions(r=rank, alpha=self.lora_alpha, targets=self.target_modules, seed=self.seed) if rank else None
