"""The type checker that the tests put on every function and dataclass of the package (see conftest)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import typer
from beartype import BeartypeConf, BeartypeHintOverrides, beartype
from jaxtyping import AbstractArray
from jaxtyping import jaxtyped as jaxtyping_jaxtyped

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


def jaxtyped(*, typechecker: object) -> Callable[[Any], Any]:
    """What jaxtyping's import hook puts on every function and class, in the place of its own.

    Its own binds every call's arguments by name, which takes ten times as long as looking at their types. Arrays need a
    context for each call, in which a name of an axis has one length; everything else needs beartype alone.
    """
    return checked


def checked(thing: Any) -> Any:
    """A function with its types checked at every call, unless it is a door; likewise what makes a dataclass."""
    if isinstance(thing, type):
        if dataclasses.is_dataclass(thing) and "__init__" in vars(thing):
            thing.__init__ = checked(thing.__init__)  # type: ignore[misc]
        return thing
    if isinstance(thing, (classmethod, staticmethod)):
        return type(thing)(checked(thing.__func__))
    if isinstance(thing, property):
        return property(*(part and checked(part) for part in (thing.fget, thing.fset, thing.fdel)))
    name = thing.__qualname__
    if name.endswith(("Config.__init__", "Options.__init__")) or f"{thing.__module__}.{name}" in DOORS:
        return thing
    if "<locals>" in name:  # made anew at every call of the function around it, and so would its checks be
        return thing
    built: Callable[..., Any] | None = None

    @functools.wraps(thing)
    def at_first_call(*arguments: Any, **named: Any) -> Any:
        nonlocal built
        if built is None:
            try:
                built = _built(thing)
            except NameError:  # what is imported for type checkers alone: jaxtyping checks the other hints, slowly
                built = jaxtyping_jaxtyped(thing, typechecker=_check)
        return built(*arguments, **named)

    try:
        return _built(thing)
    except NameError:  # a hint names what the module defines further down
        return at_first_call


def _built(thing: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its checks.

    Raises:
        NameError: A hint names what is not there yet.
    """
    hints = get_type_hints(thing)
    function = _check(thing)
    if not any(map(_has_array, hints.values())):
        return function

    @functools.wraps(thing)
    def in_context(*arguments: Any, **named: Any) -> Any:
        with jaxtyping_jaxtyped("context"):
            return function(*arguments, **named)

    return in_context


def _has_array(hint: Any) -> bool:
    """Whether a hint says anything of shapes."""
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(_has_array, get_args(hint)))
