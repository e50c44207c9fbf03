"""Rewards of final answers: reward models, verifiers, functions, files, behind one small interface."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.sampling.rewards.base import Answer, Reward, score_answers
from bvpo_stats.sampling.rewards.external import FileReward, FunctionReward
from bvpo_stats.sampling.rewards.model import ModelReward, RewardModelOptions
from bvpo_stats.sampling.rewards.verifiers import EmbeddedJudge, EmbeddedReward, MathVerifyReward

__all__ = ["Answer", "Reward", "as_reward", "load_reward", "score_answers"]

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load_reward(spec: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> Reward:
    """The reward behind a ``--reward`` value.

    Args:
        spec: ``embedded`` (correctness first), ``embedded-judge`` (wording alone), ``math-verify``, ``model:PATH``
            (sequence-classification reward model, folder or hub id), ``file:scores.jsonl`` (scores computed elsewhere)
            or ``module:function`` (Python).
        device: Where a reward model goes.
        dtype: In which type it is loaded.
        trust_remote_code: Runs code shipped with a reward model.

    Raises:
        UserError: An unknown spec, or a reward that cannot be loaded.
    """
    kind, _, rest = spec.partition(":")
    if spec == EmbeddedReward.identity:
        return EmbeddedReward()
    if spec == EmbeddedJudge.identity:
        return EmbeddedJudge()
    if spec == MathVerifyReward.identity:
        return MathVerifyReward()
    if kind == "model" and rest:
        return ModelReward(RewardModelOptions(rest, device, dtype, trust_remote_code))
    if kind == "file" and rest:
        return FileReward(Path(rest).expanduser())
    if kind not in ("model", "file") and _FUNCTION.fullmatch(spec):
        return FunctionReward(spec)
    raise UserError(
        f"`reward={spec!r}`: unknown. Choose embedded, embedded-judge, math-verify, model:PATH, file:SCORES.jsonl or "
        "module:function."
    )


def as_reward(reward: Callable[..., Any] | str | Reward) -> Reward:
    """A reward from a reward, its name (:func:`load_reward`), or a Python function.

    Raises:
        UserError: It is none of these, or its name is unknown.
    """
    if isinstance(reward, str):
        return load_reward(reward)
    if isinstance(reward, Reward) and not isinstance(reward, type):
        return reward
    if callable(reward) and not isinstance(reward, type):
        return FunctionReward(reward)
    raise UserError(f"`reward`: a {type(reward).__name__}. Give a function (question, answer) -> number, or a name.")
