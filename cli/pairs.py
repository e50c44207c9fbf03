"""``bvpo-stats pairs``: preference data from samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from bvpo_stats.cli import options as o

EXAMPLES = """Examples:

bvpo-stats pairs --samples runs/sample --reward embedded --output runs/pairs

bvpo-stats pairs --samples runs/r1 --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --reward model:PATH --ref-logps

bvpo-stats pairs --samples runs/maths --reward math-verify --mode thinking"""


def pairs(
    context: typer.Context,
    samples: Annotated[Path, typer.Option(help="Folder of a sampling run (the --output of `bvpo-stats sample`).")],
    reward: Annotated[
        str,
        typer.Option(
            help="Ranks the final answers: embedded, math-verify, model:PATH, file:SCORES.jsonl or module:function."
        ),
    ],
    mode: Annotated[
        Literal["both", "thinking", "nothinking"], typer.Option(help="D_t (thinking), D_e (nothinking) or both.")
    ] = "both",
    ref_logps: Annotated[
        bool, typer.Option("--ref-logps", help="Store the sampling model's log-probabilities of both responses.")
    ] = False,
    model: o.Model = "embedded",
    adapter: o.Adapter = None,
    template: o.Template = None,
    empty_trace: o.EmptyTrace = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    output: o.Output = Path("runs/pairs"),
    config: o.Config = None,
) -> None:
    """Pair the best and the worst response of each prompt, by the final answer alone (Sections 3.3, 5.1, C.3)."""
    from bvpo_stats.records import MODES
    from bvpo_stats.studies.pairs.run import PairsConfig, run_pairs

    settings = PairsConfig(
        samples=samples,
        reward=reward,
        policy=o.policy_options(context),
        modes=MODES if mode == "both" else (mode,),
        ref_logps=ref_logps,
    )
    run_pairs(settings, output).print(output)
