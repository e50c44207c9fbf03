"""Preference objectives as scalar weights on scores, with their loss values, on numpy arrays and torch tensors alike.

Every pairwise loss here depends on theta only through the log-probabilities of the chosen and the rejected response, so
its gradient is a linear combination of two scores:

    grad loss = chosen_weight * s(chosen) + rejected_weight * s(rejected),    weight = d loss / d log pi(response)

Conventions are TRL's (1.16): DPO (``sigmoid``) sums log-ratios over tokens, IPO averages them per token; SimPO is
-log sigmoid(beta * (average log pi(chosen) - average log pi(rejected)) - gamma).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from bvpo_stats.errors import UserError, check_number

if TYPE_CHECKING:
    import torch

ObjectiveName = Literal["dpo", "simpo", "ipo"]

LOSSES: dict[str, ObjectiveName] = {"sigmoid": "dpo", "simpo": "simpo", "ipo": "ipo"}
"""TRL's names of the losses, which users give, and the package's."""

A = TypeVar("A", NDArray[np.floating], "torch.Tensor")


@dataclass(frozen=True)
class PairLogps(Generic[A]):
    """Sequence log-probabilities of pairs, in nats, summed over completion tokens; arrays of any one shape.

    Attributes:
        chosen: log pi_theta of the chosen responses.
        rejected: log pi_theta of the rejected responses.
        chosen_tokens: Completion lengths.
        rejected_tokens: Completion lengths.
        ref_chosen: log pi_ref of the chosen responses; None where the objective has no reference.
        ref_rejected: log pi_ref of the rejected responses.
    """

    chosen: A
    rejected: A
    chosen_tokens: A
    rejected_tokens: A
    ref_chosen: A | None = None
    ref_rejected: A | None = None


@dataclass(frozen=True)
class PairTerms(Generic[A]):
    """An objective's value on pairs.

    Attributes:
        loss: Loss per pair.
        chosen_weight: d loss / d log pi(chosen).
        rejected_weight: d loss / d log pi(rejected).
        chosen_reward: Implicit reward of the chosen response (TRL's ``rewards/chosen``).
        rejected_reward: Implicit reward of the rejected response.
    """

    loss: A
    chosen_weight: A
    rejected_weight: A
    chosen_reward: A
    rejected_reward: A

    @property
    def margin(self) -> A:
        """Reward margin m = chosen reward - rejected reward."""
        return self.chosen_reward - self.rejected_reward


@dataclass(frozen=True)
class Objective:
    """Which loss, with its constants.

    Attributes:
        name: ``dpo``, ``simpo`` or ``ipo``.
        beta: Inverse temperature of the implicit reward.
        gamma: Target margin, SimPO only.

    Example:
        >>> at_reference = PairLogps(*np.array([[-3.0], [-4.0], [5.0], [6.0], [-3.0], [-4.0]]))
        >>> terms = Objective("dpo", beta=0.1)(at_reference)
        >>> terms.chosen_weight, terms.rejected_weight
        (array([-0.05]), array([0.05]))
    """

    name: ObjectiveName = "dpo"
    beta: float = 0.1
    gamma: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in get_args(ObjectiveName):
            raise UserError(f"Unknown objective {self.name!r}; choose {', '.join(get_args(ObjectiveName))}.")
        check_number("beta", self.beta)
        check_number("gamma", self.gamma)
        if not math.isfinite(self.beta + self.gamma):
            raise UserError(f"beta and gamma must be finite, not {self.beta} and {self.gamma}.")
        if not self.beta > 0:
            raise UserError(f"beta must be positive, not {self.beta}.")
        if self.gamma and self.name != "simpo":
            raise UserError(f"gamma belongs to simpo; {self.name} has none.")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss contrasts the policy with a reference."""
        return self.name != "simpo"

    def __call__(self, logps: PairLogps[A]) -> PairTerms[A]:
        """Loss and score weights of every pair.

        Raises:
            UserError: The objective needs a reference and the log-probabilities have none.
        """
        if self.needs_reference and (logps.ref_chosen is None or logps.ref_rejected is None):
            raise UserError(f"The objective {self.name} needs reference log-probabilities; use simpo to do without.")
        rules: dict[str, Callable[[PairLogps[A]], PairTerms[A]]] = {
            "dpo": self._dpo,
            "simpo": self._simpo,
            "ipo": self._ipo,
        }
        return rules[self.name](logps)

    def curvature(self, before: PairLogps[A], after: PairLogps[A]) -> A:
        """Gauss-Newton curvature between two policies: l''(z) (dz)^2 of each pair, z what the loss is a function of.

        With w the weights on the scores, ``dw_chosen dlogp_chosen + dw_rejected dlogp_rejected``, exact as the step
        goes to zero.

        Args:
            before: The pairs' log-probabilities at theta.
            after: The same at theta plus a small step.
        """
        one, two = self(before), self(after)
        chosen = (two.chosen_weight - one.chosen_weight) * (after.chosen - before.chosen)
        rejected = (two.rejected_weight - one.rejected_weight) * (after.rejected - before.rejected)
        return chosen + rejected  # type: ignore[no-any-return]

    def _dpo(self, logps: PairLogps[A]) -> PairTerms[A]:
        """-log sigmoid(m), m = beta (Delta(chosen) - Delta(rejected)), Delta = log pi_theta - log pi_ref."""
        chosen, rejected = (self.beta * ratio for ratio in _log_ratios(logps))
        weight = self.beta * _sigmoid(rejected - chosen)
        return PairTerms(-_log_sigmoid(chosen - rejected), -weight, weight, chosen, rejected)

    def _simpo(self, logps: PairLogps[A]) -> PairTerms[A]:
        """-log sigmoid(beta (log pi(chosen) / |chosen| - log pi(rejected) / |rejected|) - gamma)."""
        chosen = self.beta * logps.chosen / logps.chosen_tokens
        rejected = self.beta * logps.rejected / logps.rejected_tokens
        excess = chosen - rejected - self.gamma
        weight = self.beta * _sigmoid(-excess)
        chosen_weight, rejected_weight = -weight / logps.chosen_tokens, weight / logps.rejected_tokens
        return PairTerms(-_log_sigmoid(excess), chosen_weight, rejected_weight, chosen, rejected)

    def _ipo(self, logps: PairLogps[A]) -> PairTerms[A]:
        """(Delta(chosen) / |chosen| - Delta(rejected) / |rejected| - 1 / (2 beta))^2."""
        chosen, rejected = _log_ratios(logps)
        excess = chosen / logps.chosen_tokens - rejected / logps.rejected_tokens - 1 / (2 * self.beta)
        return PairTerms(
            excess**2,
            2 * excess / logps.chosen_tokens,
            -2 * excess / logps.rejected_tokens,
            self.beta * chosen,
            self.beta * rejected,
        )


def _log_ratios(logps: PairLogps[Any]) -> tuple[Any, Any]:
    return logps.chosen - logps.ref_chosen, logps.rejected - logps.ref_rejected


def _sigmoid(x: Any) -> Any:
    return x.sigmoid() if hasattr(x, "sigmoid") else expit(x)


def _log_sigmoid(x: Any) -> Any:
    if hasattr(x, "sigmoid"):
        from torch.nn.functional import logsigmoid

        return logsigmoid(x)
    return -np.logaddexp(0.0, -x)
