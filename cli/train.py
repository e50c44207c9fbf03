"""``bvpo-stats train``: BVPO, DPO and SimPO on preference pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from bvpo_stats.cli import options as o

from bvpo_stats.errors import UserError

if TYPE_CHECKING:
    pass

EXAMPLES = """Examples:

bvpo-stats train --max-steps 50

bvpo-stats train --method bvpo --alpha adaptive --output runs/adaptive

bvpo-stats train --method dpo --output runs/dpo

bvpo-stats train --preset r1-qwen-1.5b --pairs runs/pairs --report-to tensorboard --output runs/paper

bvpo-stats train --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --pairs runs/pairs --traces runs/traces
--alpha adaptive --lora-r 16 --learning-rate 1e-5 --output runs/adaptive

torchrun --nproc-per-node 4 -m bvpo_stats.cli.main train --model ... --pairs runs/pairs"""


def train(
    model: Annotated[
        str | None,
        typer.Option(help="Model folder or hub id. [default: the preset's, or embedded]", show_default=False),
    ] = None,
    pairs: Annotated[
        str, typer.Option(help="D_t: a pairs file (JSONL or Parquet) or the folder of a pairs run; `embedded`.")
    ] = "embedded",
    empty_pairs: Annotated[
        str | None, typer.Option(help="D_e, likewise. [default: what lies beside --pairs]", show_default=False)
    ] = None,
    traces: Annotated[
        str | None, typer.Option(help="Trace bank for --alpha adaptive: file or folder of a traces run.")
    ] = None,
    method: Annotated[str, typer.Option(help="bvpo (both sets), dpo or simpo (D_t alone).")] = "bvpo",
    preset: Annotated[
        str | None,
        typer.Option(
            help="Settings by name: the paper's for r1-qwen-7b, r1-qwen-1.5b, r1-0528-qwen3-8b; lora; embedded. "
            "Options given beside it win. [default: embedded for the embedded model, else lora]",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            help="Weight of the trace loss: a number, `adaptive`, or a schedule such as 0:0.2,100:0.8. [default: 0.5]",
            show_default=False,
        ),
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="sigmoid (DPO), simpo or ipo. [default: the method's]", show_default=False)
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="Inverse temperature of the loss. [default: the preset's]", show_default=False)
    ] = None,
    gamma: Annotated[
        float | None, typer.Option(help="Target margin, simpo only. [default: the preset's]", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate. [default: the preset's]", show_default=False)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Prompts per step, over all processes. [default: the preset's]", show_default=False),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the prompts. [default: the preset's, 1]", show_default=False)
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Stop after this many optimizer steps; replaces --epochs.", show_default=False)
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="cosine, linear, constant, ... [default: the preset's]", show_default=False)
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps with a rising learning rate. [default: the preset's, 0.1]", show_default=False
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Longest sequence; prompts with longer ones are set aside. [default: the preset's]", show_default=False
        ),
    ] = None,
    lora_r: Annotated[
        int | None,
        typer.Option(help="Rank of a new adapter; 0 trains all weights. [default: the preset's]", show_default=False),
    ] = None,
    lora_alpha: Annotated[
        int | None, typer.Option(help="Numerator of LoRA's scaling. [default: twice the rank]", show_default=False)
    ] = None,
    target_modules: Annotated[
        str, typer.Option(help="Layers of the new adapter: comma-separated names, or all-linear.")
    ] = "all-linear",
    adapter: o.Adapter = None,
    precompute_ref_logps: Annotated[
        bool,
        typer.Option(
            "--precompute-ref-logps",
            help="Take the reference's log-probabilities once, before the first step (stored ones are used).",
        ),
    ] = False,
    alpha_prior: Annotated[float, typer.Option(help="adaptive: alpha until its interval excludes it.")] = 0.5,
    alpha_update_steps: Annotated[
        int | None,
        typer.Option(
            help="adaptive: steps between two looks at the probe set. [default: 2% of the tokens]", show_default=False
        ),
    ] = None,
    alpha_sums_steps: Annotated[
        int, typer.Option(help="adaptive: one step in so many forms its gradients prompt by prompt, for the variances.")
    ] = 4,
    alpha_ema: Annotated[
        float | None,
        typer.Option(help="adaptive: what averages keep from look to look. [default: 0.8]", show_default=False),
    ] = None,
    alpha_probe_prompts: Annotated[int, typer.Option(help="adaptive: prompts held out to estimate mu.")] = 32,
    alpha_traces_per_answer: Annotated[int, typer.Option(help="adaptive: traces behind each probe answer.")] = 4,
    eta_l: Annotated[
        str,
        typer.Option(help="adaptive: eta L at the peak learning rate, or `auto`: L is the curvature along the noise."),
    ] = "1",
    unmatched: Annotated[
        str | None,
        typer.Option(
            help="Prompts in one set only: error or drop. [default: error; embedded pairs: drop]", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Padded tokens per forward: what bounds memory. Does not change the results.")
    ] = 16_384,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations: less memory, more time.")
    ] = False,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints; the newest two are kept.")] = 50,
    logging_steps: Annotated[int, typer.Option(help="Steps between log entries.")] = 1,
    report_to: Annotated[
        str, typer.Option(help="Trackers of transformers, comma-separated: tensorboard, wandb, ...; none.")
    ] = "none",
    seed: o.Seed = 0,
    limit: o.Limit = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    template: o.Template = None,
    empty_trace: o.EmptyTrace = None,
    trust_remote_code: o.TrustRemoteCode = False,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Take probe pairs and traces of another model or template.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Refuse to start anew (a run in its folder goes on anyway)."),
    ] = False,
    output: o.Output = Path("runs/train"),
    config: o.Config = None,
) -> None:
    """Train on preference pairs with L_c = alpha L_t + (1 - alpha) L_e: BVPO, or DPO and SimPO on D_t.

    Writes the adapter (or model), checkpoints, a report and figures. Killed at any step, the same command goes on from
    the newest checkpoint, and the trajectory is that of an uninterrupted run.
    """
    from bvpo_stats.model.policy import EMBEDDED, PolicyOptions
    from bvpo_stats.model.subset import LoraOptions
    from bvpo_stats.studies.alpha_star.inputs import AlphaInputs
    from bvpo_stats.studies.train.run import TrainConfig, run_train
    from bvpo_stats.training.presets import METHODS
    from bvpo_stats.training.presets import preset as find_preset

    if method not in METHODS:
        raise UserError(f"--method {method}: choose {', '.join(METHODS)}.")
    if alpha is not None and method != "bvpo":
        raise UserError(f"--alpha {alpha}: --method {method} trains on D_t alone; give --alpha to --method bvpo.")
    named = find_preset(preset or (EMBEDDED if model in (None, EMBEDDED) else "lora"), method)  # type: ignore[arg-type]
    rank = _chosen(lora_r, named.lora_r)
    settings = named.settings(
        alpha=alpha,
        loss_type=loss,
        beta=beta,
        simpo_gamma=gamma,
        learning_rate=learning_rate,
        num_train_epochs=epochs,
        lr_scheduler_type=scheduler,
        warmup_steps=warmup,
        max_length=max_length,
    )
    settings |= {
        "max_steps": -1 if max_steps is None else max_steps,
        "precompute_ref_log_probs": precompute_ref_logps,
        "alpha_prior": alpha_prior,
        "alpha_update_steps": alpha_update_steps,
        "alpha_sums_steps": alpha_sums_steps,
        "alpha_ema": alpha_ema,
        "alpha_probe_prompts": alpha_probe_prompts,
        "alpha_traces_per_answer": alpha_traces_per_answer,
        "eta_l": eta_l,
        "unmatched_prompts": unmatched or ("drop" if pairs == EMBEDDED else "error"),
        "allow_mismatch": allow_mismatch,
        "max_tokens": max_tokens,
        "save_steps": save_steps,
        "save_total_limit": 2,
        "logging_steps": logging_steps,
        "report_to": report_to.replace(" ", "").split(","),
        "seed": seed,
    }
    targets = "all-linear" if target_modules == "all-linear" else tuple(target_modules.replace(" ", "").split(","))
    options = TrainConfig(
        method=method,  # type: ignore[arg-type]
        policy=PolicyOptions(
            model=model or named.model or EMBEDDED,
            adapter=adapter,
            device=device,
            dtype=dtype,
            template=template,
            empty_trace=empty_trace,
            trust_remote_code=trust_remote_code,
        ),
        inputs=AlphaInputs(pairs=pairs, empty_pairs=empty_pairs, traces=traces, limit=limit),
        batch_size=_chosen(batch_size, named.batch_size),
        lora=LoraOptions(r=rank, alpha=lora_alpha, targets=targets, seed=seed) if rank else None,
        settings=settings,
        checkpointing=gradient_checkpointing,
        must_resume=resume,
    )
    report = run_train(options, output)
    if report is not None:
        report.print(output)


def _chosen(given: Any, default: Any) -> Any:
    return default if given is None else given
