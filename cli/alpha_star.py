"""``bvpo-stats alpha-star``: the optimal mixing weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from bvpo_stats.cli import options as o

from bvpo_stats.errors import UserError

if TYPE_CHECKING:
    from bvpo_stats.gradients.curvature import CurvatureOptions

EXAMPLES = """Examples:

bvpo-stats alpha-star

bvpo-stats alpha-star --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --pairs runs/pairs --batch-size 128

bvpo-stats alpha-star --model base --adapter checkpoint-200 --pairs runs/pairs --traces runs/traces --eta-l auto
--learning-rate 1e-5 --optimizer-state checkpoint-200

accelerate launch --num-processes 4 -m bvpo_stats.cli.main alpha-star --model ... --pairs runs/pairs

torchrun --nproc-per-node 4 -m bvpo_stats.cli.main alpha-star --model ... --pairs runs/pairs"""


def alpha_star(
    context: typer.Context,
    model: o.Model = "embedded",
    pairs: Annotated[
        str, typer.Option(help="D_t: a pairs file (JSONL or Parquet) or the folder of a pairs run; `embedded`.")
    ] = "embedded",
    empty_pairs: Annotated[
        str | None, typer.Option(help="D_e, likewise. [default: what lies beside --pairs]", show_default=False)
    ] = None,
    traces: Annotated[
        str | None, typer.Option(help="Trace bank, for mu away from the reference point: file or folder of a run.")
    ] = None,
    loss: Annotated[str, typer.Option(help="sigmoid (DPO), simpo or ipo.")] = "sigmoid",
    beta: Annotated[float, typer.Option(help="Inverse temperature of the loss.")] = 0.1,
    gamma: Annotated[float, typer.Option(help="Target margin, simpo only.")] = 0.0,
    lora_r: Annotated[int, typer.Option(help="Rank of a fresh LoRA adapter, where no --adapter is given.")] = 16,
    target_modules: Annotated[
        str, typer.Option(help="Layers of the fresh adapter: comma-separated names, or all-linear.")
    ] = "all-linear",
    adapter: o.Adapter = None,
    params: Annotated[
        list[str] | None,
        typer.Option(help="Only layers that match this pattern; without --adapter, weights of the model itself."),
    ] = None,
    batch_size: Annotated[float, typer.Option(help="Examples per optimizer step: alpha* belongs to one.")] = 128,
    eta_l: Annotated[
        str, typer.Option(help="Learning rate times smoothness, or `auto` to measure it (needs --learning-rate).")
    ] = "1",
    learning_rate: Annotated[float | None, typer.Option(help="For --eta-l auto.")] = None,
    traces_per_answer: Annotated[int, typer.Option(help="K, most traces of the bank behind each answer.")] = 8,
    marginal: Annotated[
        str,
        typer.Option(
            help="Estimator of the marginal gradient: auto, reference-point, anchored, posterior, prior, multilevel, "
            "jackknife."
        ),
    ] = "auto",
    optimizer_state: Annotated[
        Path | None,
        typer.Option(help="Adam's state (optimizer.pt or safetensors, or its folder), for alpha* in Adam's metric."),
    ] = None,
    level: Annotated[float, typer.Option(help="Confidence level of the intervals.")] = 0.95,
    interval: Annotated[str, typer.Option(help="fieller, or hall, cautious under heavy tails.")] = "fieller",
    groups: Annotated[
        str, typer.Option(help="Groups of the jackknife. `auto`: single prompts, beyond 256 of them 20 groups.")
    ] = "auto",
    seed: o.Seed = 0,
    limit: o.Limit = None,
    max_tokens: Annotated[
        int, typer.Option(help="Padded tokens per forward: what bounds memory. Does not change the results.")
    ] = 16_384,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    template: o.Template = None,
    empty_trace: o.EmptyTrace = None,
    trust_remote_code: o.TrustRemoteCode = False,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Take pairs and traces of another model or template.")
    ] = False,
    output: o.Output = Path("runs/alpha-star"),
    config: o.Config = None,
) -> None:
    """Find the optimal weight of the trace gradient for a model, a batch size and a step size, with its interval.

    Batch size, step size and level may change from call to call: the same folder answers at once.

    Started by torchrun or accelerate launch, the processes (on one GPU each) share the prompts and one reports.
    """
    from bvpo_stats.gradients.objectives import LOSSES, Objective
    from bvpo_stats.gradients.options import StreamOptions
    from bvpo_stats.model.subset import LoraOptions
    from bvpo_stats.studies.alpha_star.inputs import AlphaInputs, SubsetOptions
    from bvpo_stats.studies.alpha_star.run import AlphaConfig, AlphaOptions, run_alpha_star
    from bvpo_stats.studies.alpha_star.settings import AlphaSettings

    if loss not in LOSSES:
        raise UserError(f"--loss {loss}: choose {', '.join(LOSSES)}.")
    curvature = _curvature(eta_l, learning_rate, seed)
    targets = "all-linear" if target_modules == "all-linear" else tuple(target_modules.replace(" ", "").split(","))
    settings = AlphaConfig(
        policy=o.policy_options(context),
        inputs=AlphaInputs(pairs=pairs, empty_pairs=empty_pairs, traces=traces, limit=limit),
        subset=SubsetOptions(params=tuple(params or ()), lora=LoraOptions(r=lora_r, targets=targets, seed=seed)),
        options=AlphaOptions(
            stream=StreamOptions(
                objective=Objective(LOSSES[loss], beta, gamma),
                method=marginal,  # type: ignore[arg-type]
                traces_per_answer=traces_per_answer,
                half_splits=True,
                allow_mismatch=allow_mismatch,
                seed=seed,
                max_tokens=max_tokens,
            ),
            settings=AlphaSettings(
                batch_size=batch_size,
                eta_l=1.0 if curvature is not None else _number(eta_l),
                level=level,
                method=interval,  # type: ignore[arg-type]
            ),
            groups=_groups(groups),
            curvature=curvature,
        ),
        optimizer_state=optimizer_state,
    )
    report = run_alpha_star(settings, output)
    if report is not None:
        report.print(output)


def _curvature(eta_l: str, learning_rate: float | None, seed: int) -> CurvatureOptions | None:
    from bvpo_stats.gradients.curvature import CurvatureOptions

    if eta_l != "auto":
        return None
    if learning_rate is None:
        raise UserError("--eta-l auto measures the curvature L and needs eta: give --learning-rate.")
    return CurvatureOptions(learning_rate, seed=seed)


def _groups(groups: str) -> int | Literal["auto"]:
    if groups == "auto":
        return "auto"
    if not groups.isdecimal():
        raise UserError(f"--groups {groups}: give a whole number, or auto.")
    return int(groups)


def _number(eta_l: str) -> float:
    try:
        return float(eta_l)
    except ValueError:
        raise UserError(f"--eta-l {eta_l}: give a positive number, or auto.") from None
