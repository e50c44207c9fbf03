"""``bvpo-stats traces``: the trace bank."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from bvpo_stats.cli import options as o

EXAMPLES = """Examples:

bvpo-stats traces --pairs runs/pairs --samples runs/sample --output runs/traces

bvpo-stats traces --pairs runs/pairs --samples runs/sample --traces-per-answer 16 --sources anchor,mh --mh-moves 5"""


def traces(
    context: typer.Context,
    pairs: Annotated[Path, typer.Option(help="Folder of a pairs run that holds D_t (thinking.jsonl).")],
    samples: Annotated[Path, typer.Option(help="Folder of the sampling run that the pairs were made from.")],
    traces_per_answer: Annotated[
        int, typer.Option(help="K: posterior traces per answer (anchor, same-answer, mh), and as many prior ones.")
    ] = 8,
    sources: Annotated[
        str, typer.Option(help="Kinds of traces: a comma-separated choice of anchor, same-answer, mh, prior.")
    ] = "anchor,same-answer,mh,prior",
    temperature: Annotated[float, typer.Option(help="Temperature of newly drawn traces.")] = 1.0,
    mh_moves: Annotated[int, typer.Option(help="Metropolis-Hastings moves for each trace that is kept.")] = 3,
    burn_in: Annotated[
        int | None,
        typer.Option(
            help="Moves before the first is kept. [default: 0 for samples at temperature 1, else 10]",
            show_default=False,
        ),
    ] = None,
    prior: Annotated[
        Literal["fresh", "samples"],
        typer.Option(
            help="Prior traces: drawn anew, or the prompt's other samples (free, but biased by the selection)."
        ),
    ] = "fresh",
    model: o.Model = "embedded",
    adapter: o.Adapter = None,
    template: o.Template = None,
    empty_trace: o.EmptyTrace = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    batch_size: Annotated[int, typer.Option(help="Traces drawn at once. Does not change the results.")] = 64,
    seed: o.Seed = 0,
    limit: Annotated[int | None, typer.Option(help="Use only the first so many pairs.")] = None,
    output: o.Output = Path("runs/traces"),
    config: o.Config = None,
) -> None:
    """Collect K traces for each answer of D_t: its own, other samples', regenerated ones, and prior ones."""
    from bvpo_stats.errors import UserError
    from bvpo_stats.sampling.traces import BankOptions
    from bvpo_stats.studies.traces.run import TracesConfig, run_traces

    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: at least 1.")
    settings = TracesConfig(
        pairs=pairs,
        samples=samples,
        policy=o.policy_options(context),
        bank=BankOptions(
            traces_per_answer=traces_per_answer,
            sources=tuple(word.strip() for word in sources.split(",") if word.strip()),  # type: ignore[misc]
            temperature=temperature,
            mh_moves=mh_moves,
            burn_in=burn_in,
            prior=prior,
        ),
        seed=seed,
        batch_size=batch_size,
        limit=limit,
    )
    run_traces(settings, output).print(output)
