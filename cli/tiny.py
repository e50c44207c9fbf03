"""``bvpo-stats tiny``: train and measure the embedded reasoning model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .build import Command

TRAIN_EXAMPLES = """Examples:

bvpo-stats tiny train --output my-model --seed 1

bvpo-stats tiny train --output quick-look --steps 50"""

EVALUATE_EXAMPLES = """Examples:

bvpo-stats tiny evaluate

bvpo-stats tiny evaluate --model my-model --limit 60 --output measures.json"""

app = typer.Typer(
    help="Train and measure the embedded reasoning model (multi-step arithmetic, 0.7 M parameters).",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(cls=Command, epilog=TRAIN_EXAMPLES)
def train(
    output: Annotated[Path, typer.Option(help="New folder for model, tokenizer and generation configuration.")] = Path(
        "runs/tiny"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the examples.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; the committed recipe's number by default.")
    ] = None,
) -> None:
    """Train the embedded model from scratch on this machine's CPU.

    A run that was killed goes on where it stopped when the same command is given again.
    """
    from dataclasses import replace

    from bvpo_stats.lab.recipe.train import Recipe
    from bvpo_stats.lab.recipe.train import train as run_recipe

    recipe = replace(Recipe(), seed=seed)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    run_recipe(output, recipe)
    typer.echo(f"model written to {output}; measure it with: bvpo-stats tiny evaluate --model {output}")


@app.command(cls=Command, epilog=EVALUATE_EXAMPLES)
def evaluate(
    model: Annotated[Path | None, typer.Option(help="Model folder; the embedded model by default.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first LIMIT of the 200 held-out prompts.")] = None,
    samples: Annotated[int, typer.Option(help="Responses per prompt and mode.")] = 5,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Also write the measures to this JSON file.")] = None,
) -> None:
    """Measure accuracies, trace lengths and distinct answers on held-out prompts."""
    import json
    from dataclasses import asdict

    from bvpo_stats.embedded.assets import embedded_model_path
    from bvpo_stats.errors import UserError
    from bvpo_stats.lab.recipe.measure import evaluate_folder, render

    if output is not None and output.exists():
        raise UserError(f"--output {output} exists; name a new file, nothing was overwritten.")
    measures = evaluate_folder(
        model or embedded_model_path(), limit=limit, n_samples=samples, temperature=temperature, seed=seed
    )
    typer.echo(render(measures))
    if output is not None:
        output.write_text(json.dumps(asdict(measures), indent=2) + "\n", encoding="utf-8")
