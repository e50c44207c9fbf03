"""Any Python function as a reward, in the calling convention of TRL's reward functions."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.sampling.rewards.base import Answer


class FunctionReward:
    """A Python function: ``function(question, answer) -> score``, or one in the convention of TRL's reward functions.

    The latter is known by its parameters and called once for many, as
    ``function(prompts=[...], completions=[...], gold=[...]) -> [score, ...]``. Answers are final answers, traces left
    out; a score of None leaves a response out. Scores must depend on nothing else.

    Args:
        function: The function, or ``module:function``, always in TRL's convention; the module is looked for in the
            working folder too.

    Raises:
        UserError: The module cannot be imported, or has no such function.
    """

    text_only = True

    def __init__(self, function: str | Callable[..., Any]) -> None:
        if isinstance(function, str):
            self._name, self._function, self._batched = function, _import(function), True
        else:
            self._name = getattr(function, "__qualname__", type(function).__name__)
            self._function, self._batched = function, _takes_lists(function)
        self.identity = f"{self._name}@{_fingerprint(self._function)}"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One score per answer.

        Raises:
            UserError: The function fails, or returns something other than numbers.
        """
        try:
            if self._batched:
                scores = self._function(
                    prompts=[answer.prompt for answer in answers],
                    completions=[answer.text for answer in answers],
                    gold=[answer.gold for answer in answers],
                )
            else:
                scores = [self._function(answer.prompt, answer.text) for answer in answers]
            return [None if score is None else float(score) for score in scores]
        except Exception as error:  # the function is the user's program; whatever it raises is about that program
            call = (
                "function(prompts=[...], completions=[...], gold=[...]) and must return a list of numbers or None"
                if self._batched
                else "function(question, answer) and must return a number or None"
            )
            reason = next(iter(str(error).splitlines()), "")
            raise UserError(
                f"`reward={self._name!r}` fails with {type(error).__name__}: {reason}. It is called as {call}."
            ) from error


def _takes_lists(function: Callable[..., Any]) -> bool:
    try:
        return "completions" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # built in
        return False


def _import(spec: str) -> Callable[..., Any]:
    module_name, _, name = spec.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"`reward={spec!r}`: cannot import {module_name} ({type(error).__name__}: {error}).") from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"`reward={spec!r}`: the module {module_name} has no function {name!r}.")
    return function


def _fingerprint(function: Callable[..., Any]) -> str:
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # built in, or defined where no source is kept
        source = repr(getattr(function, "__qualname__", ""))
    return hashlib.sha256(source.encode()).hexdigest()[:12]
