"""The type checker that the tests put on every function and dataclass of the package (see conftest)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from beartype import BeartypeConf, BeartypeHintOverrides, beartype

_check = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,  # an int will do where a float is asked for
        # typer hands out contexts of the class that its own, which callbacks must be annotated with, is derived from
        hint_overrides=BeartypeHintOverrides({typer.Context: typer.Context.__base__}),
    )
)

# Doors that judge what they are given and refuse it with a UserError, which tests look for. Their annotations say what
# is right; what is wrong must get in. Configurations (`...Config`, `...Options`) do so too, in `__post_init__`.
DOORS = {
    "bvpo_stats.embedded.task.generate_prompts",
    "bvpo_stats.gradients.objectives.Objective.__init__",
    "bvpo_stats.gradients.stream.pair_gradients",
    "bvpo_stats.model.policy.as_policy",
    "bvpo_stats.sampling.pairs.make_pairs",
    "bvpo_stats.sampling.rewards.as_reward",
    "bvpo_stats.sampling.sample.check_modes",
    "bvpo_stats.sampling.sample.sample",
    "bvpo_stats.statistics.alpha.alpha_from_gradients",
    "bvpo_stats.studies.alpha_star.report.AlphaSettings.__init__",
    "bvpo_stats.studies.alpha_star.run.alpha_star",
    "bvpo_stats.training.trainer.BVPOTrainer.__init__",
    "bvpo_stats.training.trainer.BVPOTrainer._pairs",
}


# Made by the ten thousand from what the readers, which check every field, have passed: a check each costs minutes.
_MANY = ("bvpo_stats.records.", "bvpo_stats.model.batching.TokenSequence.")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its types checked at every call, unless it is a door."""
    name = function.__qualname__
    door = name.endswith(("Config.__init__", "Options.__init__")) or f"{function.__module__}.{name}" in DOORS
    many = f"{function.__module__}.{name}".startswith(_MANY)
    return function if door or many else _check(function)
