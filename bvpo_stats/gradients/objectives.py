"""Preference objectives as scalar weights on scores, with their loss values.

Every pairwise loss here depends on theta only through the log-probabilities of the chosen and the rejected response, so
its gradient is a linear combination of two scores:

    grad loss = chosen_weight * s(chosen) + rejected_weight * s(rejected),    weight = d loss / d log pi(response)

Conventions are TRL's (1.16): DPO (``sigmoid``) sums log-ratios over tokens, IPO averages them per token; SimPO is
-log sigmoid(beta * (average log pi(chosen) - average log pi(rejected)) - gamma).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from bvpo_stats.errors import UserError

ObjectiveName = Literal["dpo", "simpo", "ipo"]

LOSSES: dict[str, ObjectiveName] = {"sigmoid": "dpo", "simpo": "simpo", "ipo": "ipo"}
"""TRL's names of the losses, which users give, and the package's."""


@dataclass(frozen=True)
class PairLogps:
    """Sequence log-probabilities of pairs, in nats, summed over completion tokens.

    Attributes:
        chosen: log pi_theta of the chosen responses.
        rejected: log pi_theta of the rejected responses.
        chosen_tokens: Completion lengths.
        rejected_tokens: Completion lengths.
        ref_chosen: log pi_ref of the chosen responses; None where the objective has no reference.
        ref_rejected: log pi_ref of the rejected responses.
    """

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]
    chosen_tokens: Float[Tensor, " pairs"]
    rejected_tokens: Float[Tensor, " pairs"]
    ref_chosen: Float[Tensor, " pairs"] | None = None
    ref_rejected: Float[Tensor, " pairs"] | None = None


@dataclass(frozen=True)
class PairTerms:
    """An objective's value on pairs.

    Attributes:
        loss: Loss per pair.
        chosen_weight: d loss / d log pi(chosen).
        rejected_weight: d loss / d log pi(rejected).
        chosen_reward: Implicit reward of the chosen response (TRL's ``rewards/chosen``).
        rejected_reward: Implicit reward of the rejected response.
    """

    loss: Float[Tensor, " pairs"]
    chosen_weight: Float[Tensor, " pairs"]
    rejected_weight: Float[Tensor, " pairs"]
    chosen_reward: Float[Tensor, " pairs"]
    rejected_reward: Float[Tensor, " pairs"]

    @property
    def margin(self) -> Float[Tensor, " pairs"]:
        """Reward margin m = chosen reward - rejected reward."""
        return self.chosen_reward - self.rejected_reward


@dataclass(frozen=True)
class Objective:
    """Which loss, with its constants.

    Attributes:
        name: ``dpo``, ``simpo`` or ``ipo``.
        beta: Inverse temperature of the implicit reward.
        gamma: Target margin, SimPO only.
    """

    name: ObjectiveName = "dpo"
    beta: float = 0.1
    gamma: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in get_args(ObjectiveName):
            raise UserError(f"Unknown objective {self.name!r}; choose {', '.join(get_args(ObjectiveName))}.")
        if not self.beta > 0:
            raise UserError(f"beta must be positive, not {self.beta}.")
        if self.gamma and self.name != "simpo":
            raise UserError(f"gamma belongs to simpo; {self.name} has none.")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss contrasts the policy with a reference."""
        return self.name != "simpo"

    def __call__(self, logps: PairLogps) -> PairTerms:
        """Loss and score weights of every pair.

        Args:
            logps: The log-probabilities.

        Raises:
            UserError: The objective needs a reference and the log-probabilities have none.
        """
        if self.needs_reference and (logps.ref_chosen is None or logps.ref_rejected is None):
            raise UserError(f"The objective {self.name} needs reference log-probabilities; use simpo to do without.")
        rules: dict[str, Callable[[PairLogps], PairTerms]] = {"dpo": self._dpo, "simpo": self._simpo, "ipo": self._ipo}
        return rules[self.name](logps)

    def _dpo(self, logps: PairLogps) -> PairTerms:
        """-log sigmoid(m), m = beta (Delta(chosen) - Delta(rejected)), Delta = log pi_theta - log pi_ref."""
        chosen, rejected = (self.beta * ratio for ratio in _log_ratios(logps))
        weight = self.beta * torch.sigmoid(rejected - chosen)
        return PairTerms(-logsigmoid(chosen - rejected), -weight, weight, chosen, rejected)

    def _simpo(self, logps: PairLogps) -> PairTerms:
        """-log sigmoid(beta (log pi(chosen) / |chosen| - log pi(rejected) / |rejected|) - gamma)."""
        chosen = self.beta * logps.chosen / logps.chosen_tokens
        rejected = self.beta * logps.rejected / logps.rejected_tokens
        excess = chosen - rejected - self.gamma
        weight = self.beta * torch.sigmoid(-excess)
        chosen_weight, rejected_weight = -weight / logps.chosen_tokens, weight / logps.rejected_tokens
        return PairTerms(-logsigmoid(excess), chosen_weight, rejected_weight, chosen, rejected)

    def _ipo(self, logps: PairLogps) -> PairTerms:
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


def _log_ratios(logps: PairLogps) -> tuple[Tensor, Tensor]:
    assert logps.ref_chosen is not None  # checked in Objective.__call__
    assert logps.ref_rejected is not None
    return logps.chosen - logps.ref_chosen, logps.rejected - logps.ref_rejected
