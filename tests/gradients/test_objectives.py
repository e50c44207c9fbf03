import dataclasses

import pytest
import torch
from torch.nn.functional import logsigmoid

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective, PairLogps

PAIRS = 7


def random_logps(seed: int = 0) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> torch.Tensor:
        return -50 * torch.rand(PAIRS, generator=generator, dtype=torch.float64)

    def counts() -> torch.Tensor:
        return torch.randint(1, 30, (PAIRS,), generator=generator).double()

    return PairLogps(draw(), draw(), counts(), counts(), draw(), draw())


def textbook_loss(objective: Objective, p: PairLogps) -> torch.Tensor:
    """The losses as their papers and TRL write them."""
    delta = (p.chosen - p.ref_chosen) - (p.rejected - p.ref_rejected)
    if objective.name == "dpo":
        return -torch.log(torch.sigmoid(objective.beta * delta))
    if objective.name == "simpo":
        average = p.chosen / p.chosen_tokens - p.rejected / p.rejected_tokens
        return -logsigmoid(objective.beta * average - objective.gamma)
    ratios = (p.chosen - p.ref_chosen) / p.chosen_tokens - (p.rejected - p.ref_rejected) / p.rejected_tokens
    return (ratios - 1 / (2 * objective.beta)) ** 2


@pytest.mark.parametrize("objective", [Objective("dpo", 0.1), Objective("simpo", 2.5, 1.0), Objective("ipo", 0.3)])
def test_loss_and_weights_are_the_textbook_loss_and_its_derivatives(objective: Objective) -> None:
    logps = random_logps()
    leaves = dataclasses.replace(
        logps, chosen=logps.chosen.clone().requires_grad_(), rejected=logps.rejected.clone().requires_grad_()
    )
    loss = textbook_loss(objective, leaves)
    terms = objective(logps)
    torch.testing.assert_close(terms.loss, loss.detach(), rtol=1e-12, atol=1e-12)
    chosen, rejected = torch.autograd.grad(loss.sum(), (leaves.chosen, leaves.rejected))
    torch.testing.assert_close(terms.chosen_weight, chosen, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(terms.rejected_weight, rejected, rtol=1e-10, atol=1e-14)


def test_at_the_reference_all_dpo_margins_are_zero() -> None:
    logps = random_logps()
    terms = Objective("dpo", 0.2)(dataclasses.replace(logps, ref_chosen=logps.chosen, ref_rejected=logps.rejected))
    assert (terms.margin == 0).all()
    assert (terms.chosen_weight == -0.1).all()
    assert (terms.rejected_weight == 0.1).all()


def test_extreme_margins_stay_finite() -> None:
    logps = random_logps()
    far = dataclasses.replace(logps, chosen=logps.chosen - 1e5)
    terms = Objective("dpo", 1.0)(far)
    assert torch.isfinite(terms.loss).all()
    assert (terms.chosen_weight == -1).all()


def test_refusals() -> None:
    with pytest.raises(UserError, match="Unknown objective 'kto'"):
        Objective("kto")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="beta must be positive"):
        Objective("dpo", 0.0)
    with pytest.raises(UserError, match="gamma belongs to simpo"):
        Objective("dpo", 0.1, gamma=1.0)
    without = dataclasses.replace(random_logps(), ref_chosen=None, ref_rejected=None)
    with pytest.raises(UserError, match="ipo needs reference"):
        Objective("ipo")(without)
    assert torch.isfinite(Objective("simpo", 2.5, 1.0)(without).loss).all()
