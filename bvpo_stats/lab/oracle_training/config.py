"""Settings of the oracle training study."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from bvpo_stats import options as o
from bvpo_stats.errors import UserError

Optimizer = Literal["sgd", "adamw", "adamw-decay"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "sgd", "adamw-decay")

ADAM_STEPS = {1.0: (3e-4, 1e-3, 3e-3), 0.1: (1e-3, 3e-3, 1e-2)}
"""Peak learning rates of AdamW by beta."""
SGD_STEPS = (0.2, 0.6, 1.4)
"""Peak step sizes of SGD, as learning rate times the spectral norm of L_m's Hessian at theta_ref."""
WEIGHT_DECAY = 0.1
"""Of ``adamw-decay``."""


def whole_numbers(words: str) -> tuple[int, ...]:
    """Reads whole numbers separated by commas.

    >>> whole_numbers("25,75")
    (25, 75)
    """
    try:
        return tuple(int(word) for word in words.split(","))
    except ValueError as error:
        raise UserError(f"`horizons={words}`: give whole numbers separated by commas, such as 25,75,150.") from error


def optimizer_words(words: str) -> tuple[str, ...]:
    """Reads names of optimizers separated by commas."""
    return tuple(words.replace(" ", "").split(","))


@dataclass(frozen=True)
class DrawnModel:
    """An enumerable model of the study.

    Attributes:
        number: Its place in the draw.
        prompts: Prompts of its language.
        beta: DPO's beta.
        oracle_seed: Decides its weights and rewards.
        judges: Whether it judges the default rule; else it chooses it.
    """

    number: int
    prompts: int
    beta: float
    oracle_seed: int
    judges: bool


def drawn_models(count: int, seed: int) -> list[DrawnModel]:
    """The models of the study: decided by the seed alone, before anything is trained.

    Prompts are uniform over 2 to 8, oracle seeds over 0 to 999; models 0, 1, 4, 5, ... have beta 1, the others 0.1;
    the second half judges. Two symbols, traces of up to two, three answers.

    >>> [(m.prompts, m.beta, m.judges) for m in drawn_models(4, 14)][1:3]
    [(..., 1.0, False), (..., 0.1, True)]
    """
    import numpy as np  # not for `--help`

    rng = np.random.default_rng(seed)
    draws = [(int(rng.integers(2, 9)), int(rng.integers(1000))) for _ in range(count)]
    return [
        DrawnModel(k, prompts, (1.0, 0.1)[k // 2 % 2], own, k >= count / 2) for k, (prompts, own) in enumerate(draws)
    ]


@dataclass(frozen=True)
class OracleTrainingConfig:
    """Settings of the study.

    Attributes:
        optimizers: ``sgd``, ``adamw`` and ``adamw-decay``, in this order of work.
        models: Enumerable models, drawn by ``draw_seed``.
        horizons: Lengths of runs, in steps.
        seeds: Runs of each method in each setting; a seed fixes the data of every method.
        batch_size: Pairs a step.
        level: Of the intervals.
        draw_seed: Decides the models.
        seed: The first of the seeds.
    """

    optimizers: Annotated[
        tuple[str, ...],
        o.Option(
            "Optimizers, comma-separated: adamw, adamw-decay, sgd.",
            read=optimizer_words,
            spelled="adamw,sgd,adamw-decay",
        ),
    ] = OPTIMIZERS
    models: Annotated[
        int, o.Option("Enumerable models; the first half choose the rule, the others judge it.", low=1, high=1000)
    ] = 24
    horizons: Annotated[
        tuple[int, ...],
        o.Option(
            "Lengths of runs in steps, comma-separated.", read=whole_numbers, spelled="25,75,150", low=4, high=10**6
        ),
    ] = (25, 75, 150)
    seeds: Annotated[
        int,
        o.Option(
            "Runs of each method in each setting.",
            low=2,
            high=10**4,
            hint="be 2 to 10,000: the intervals are over seeds",
        ),
    ] = 5
    batch_size: Annotated[int, o.Option("Pairs of D_t and of D_e in a step.", low=1, high=10**6)] = 8
    level: Annotated[
        float, o.Option("Confidence level of the intervals.", above=0, below=1, hint="lie between 0 and 1, e.g. 0.95")
    ] = 0.95
    draw_seed: Annotated[int, o.Option("Decides the models.", low=0, high=2**32 - 1)] = 14
    seed: o.Seed = 0

    def __post_init__(self) -> None:
        o.check_options(self)
        for name in self.optimizers:
            if name not in OPTIMIZERS:
                raise UserError(f"`optimizers={name!r}`: choose among {', '.join(OPTIMIZERS)}.")

    @property
    def drawn(self) -> list[DrawnModel]:
        """The models."""
        return drawn_models(self.models, self.draw_seed)

    def to_dict(self) -> dict[str, Any]:
        """The settings as they stand in ``run.json`` and ``report.json``."""
        return {"models": [asdict(model) for model in self.drawn]} | {
            name: getattr(self, name) for name in ("optimizers", "horizons", "seeds", "batch_size", "level", "seed")
        }
