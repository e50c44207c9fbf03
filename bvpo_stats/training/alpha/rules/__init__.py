"""Rules for alpha by name: what is done with the estimates. Each file has a rule's formula and the case against it."""

from __future__ import annotations

from bvpo_stats.errors import check_choice
from bvpo_stats.training.alpha.rules.base import Decision, Rule, Seen
from bvpo_stats.training.alpha.rules.descent import Descent
from bvpo_stats.training.alpha.rules.direction import Direction
from bvpo_stats.training.alpha.rules.hypergradient import Hypergradient
from bvpo_stats.training.alpha.rules.rising import Rising
from bvpo_stats.training.alpha.rules.theorem4 import Theorem4

__all__ = ["DEFAULT_RULE", "RULES", "Decision", "Rule", "Seen", "rule_named"]

RULES: dict[str, Rule] = {rule.name: rule for rule in (Rising(), Theorem4(), Descent(), Direction(), Hypergradient())}

DEFAULT_RULE = "rising"


def rule_named(name: str) -> Rule:
    """The rule of a name.

    Raises:
        UserError: There is none.
    """
    check_choice("alpha_rule", name, tuple(RULES))
    return RULES[name]
