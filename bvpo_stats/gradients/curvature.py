"""Curvature of the loss over a parameter subset: what eta L is.

Theorem 3 bounds steps by eta <= 1 / L; eta times the largest eigenvalue is what ``eta L`` is along the steepest
curvature (Lanczos, by Hessian-vector products). The curvature that gradient noise meets is smaller (`noise_curvature`);
training measures it along its own steps (`bvpo_stats.training.alpha.stream`). The Hessian is that of the mean pair loss
over D_t, at theta.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.gradients.reference import PairBatch, Reference, pair_batches
from bvpo_stats.model.batching import Batch
from bvpo_stats.model.exact import plain_attention
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.subset import Subset
from bvpo_stats.records import PreferencePair

Vector = Float[np.ndarray, " parameters"]


@dataclass(frozen=True)
class CurvatureOptions:
    """How eta L is measured.

    Attributes:
        learning_rate: eta.
        n_pairs: D_t pairs in the loss, spread evenly over those given.
        steps: Most Lanczos steps; their vectors are kept, ``steps * parameters`` float64 numbers.
        tolerance: Relative residual at which to stop.
        max_tokens: Budget of padded tokens per Hessian-vector product; full logits and a second backward need far more
            memory per token than scores do.
        seed: Decides the first vector.
    """

    learning_rate: float
    n_pairs: int = 64
    steps: int = 30
    tolerance: float = 1e-3
    max_tokens: int = 2_048
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"`learning_rate={self.learning_rate}`: must be positive.")


@dataclass(frozen=True)
class Curvature:
    """eta L, measured.

    Attributes:
        eta_l: Learning rate times the largest eigenvalue.
        learning_rate: eta.
        largest_eigenvalue: Of the Hessian of the mean loss over the pairs.
        smallest_eigenvalue: Its other end; negative where the loss is not convex.
        residual: Relative residual of the largest, ``norm(H v - lambda v) / lambda``.
        steps: Hessian-vector products made.
        n_pairs: Pairs in the loss.
    """

    eta_l: float
    learning_rate: float
    largest_eigenvalue: float
    smallest_eigenvalue: float
    residual: float
    steps: int
    n_pairs: int


@dataclass(frozen=True)
class Spectrum:
    """Ends of a symmetric operator's spectrum.

    Attributes:
        largest: Largest Ritz value.
        smallest: Smallest Ritz value.
        residual: ``norm(H v - largest v)``.
        steps: Products made.
    """

    largest: float
    smallest: float
    residual: float
    steps: int

    @property
    def smoothness(self) -> float:
        """L of an L-smooth function with this Hessian: the larger end in magnitude."""
        return max(abs(self.largest), abs(self.smallest))


def lanczos(
    product: Callable[[Vector], Vector], dimension: int, *, steps: int = 30, tolerance: float = 1e-3, seed: int = 0
) -> Spectrum:
    """Extreme eigenvalues of a symmetric operator, with full reorthogonalisation.

    Args:
        product: v to H v.
        dimension: Length of v.
        steps: Most products.
        tolerance: Stop when the residual of the largest is below this share of it.
        seed: Decides the first vector.

    >>> found = lanczos(lambda v: np.array([3.0, -1.0, 0.5]) * v, 3)
    >>> round(found.largest, 9), round(found.smallest, 9)
    (3.0, -1.0)
    """
    vector = np.random.default_rng(seed).normal(size=dimension)
    basis = [vector / np.linalg.norm(vector)]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(basis[-1])
        diagonal.append(float(basis[-1] @ image))
        for _ in range(2):  # twice is enough to stay orthogonal to rounding
            for other in basis:
                image = image - (other @ image) * other
        norm = float(np.linalg.norm(image))
        ritz, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
        residual = norm * abs(float(vectors[-1, -1]))
        scale = max(abs(ritz[0]), abs(ritz[-1]))
        exhausted = norm <= 1e-12 * scale or len(basis) == min(steps, dimension)
        if exhausted or residual <= tolerance * abs(ritz[-1]):
            return Spectrum(float(ritz[-1]), float(ritz[0]), residual, len(basis))
        beside.append(norm)
        basis.append(image / norm)


def measure_curvature(
    policy: Policy,
    subset: Subset,
    pairs: Sequence[PreferencePair],
    objective: Objective,
    options: CurvatureOptions,
) -> Curvature:
    """Learning rate times the largest Hessian eigenvalue of the mean loss over D_t pairs.

    Args:
        policy: The policy at theta.
        subset: The parameters theta.
        pairs: Records; those in ``thinking`` mode count.
        objective: The loss.
        options: How.

    Raises:
        UserError: No D_t pair, or a Hessian without a positive eigenvalue.
    """
    thinking = [pair for pair in pairs if pair.mode == "thinking"]
    if not thinking:
        raise UserError("eta L is measured on D_t pairs, and there are none; give a number for `eta_l`.")
    places = np.unique(np.linspace(0, len(thinking) - 1, min(options.n_pairs, len(thinking))).round().astype(int))
    chosen = [thinking[place] for place in places]
    loss = PairLoss(policy, subset, chosen, objective, options.max_tokens)
    found = lanczos(loss.product, subset.size, steps=options.steps, tolerance=options.tolerance, seed=options.seed)
    if not found.largest > 0:
        raise UserError(
            f"The largest Hessian eigenvalue is {found.largest:.3g}, so the loss has no curvature to measure eta L by; "
            "give a number for `eta_l`."
        )
    return Curvature(
        eta_l=options.learning_rate * found.largest,
        learning_rate=options.learning_rate,
        largest_eigenvalue=found.largest,
        smallest_eigenvalue=found.smallest,
        residual=found.residual / found.largest,
        steps=found.steps,
        n_pairs=len(chosen),
    )


class PairLoss:
    """The mean pair loss as a function of theta, with products of its Hessian."""

    def __init__(
        self, policy: Policy, subset: Subset, pairs: Sequence[PreferencePair], objective: Objective, max_tokens: int
    ) -> None:
        """Plans microbatches of whole pairs and takes the reference's log-probabilities.

        Args:
            policy: The policy.
            subset: The parameters.
            pairs: The pairs of the mean.
            objective: The loss.
            max_tokens: Budget of padded tokens per microbatch.
        """
        self._model: Any = policy.model
        self._theta = {name: weight.detach().clone().requires_grad_() for name, weight in subset.parameters.items()}
        self._objective, self._n_pairs = objective, len(pairs)
        reference = Reference(policy, stored=False) if objective.needs_reference else None
        self._parts = pair_batches(policy, pairs, reference, max_tokens=max_tokens, max_padding=0.05)

    def product(self, vector: Vector) -> Vector:
        """H v, summed over microbatches in float64."""
        total = np.zeros(len(vector))
        weights = list(self._theta.values())
        pieces = np.split(vector, np.cumsum([w.numel() for w in weights])[:-1])
        along = [
            torch.as_tensor(piece).to(weight).reshape(weight.shape)
            for piece, weight in zip(pieces, weights, strict=True)
        ]
        with plain_attention(self._model), torch.enable_grad():  # fused attention has no second derivative
            for part in self._parts:
                gradients = torch.autograd.grad(self._loss(part), weights, create_graph=True)
                slope = torch.stack([(g * v).sum() for g, v in zip(gradients, along, strict=True)]).sum()
                second = torch.autograd.grad(slope, weights, allow_unused=True)
                flat = [
                    (torch.zeros_like(w) if h is None else h).reshape(-1) for h, w in zip(second, weights, strict=True)
                ]
                total += torch.cat(flat).double().cpu().numpy()
        return total

    def value(self, theta: dict[str, Tensor] | None = None) -> Tensor:
        """The mean loss at other parameters, differentiable."""
        kept = self._theta
        self._theta = kept if theta is None else theta
        try:
            with plain_attention(self._model), torch.enable_grad():
                return torch.stack([self._loss(part) for part in self._parts]).sum()
        finally:
            self._theta = kept

    def _loss(self, part: PairBatch) -> Tensor:
        terms = self._objective(part.logps(self._logps(part.batch, self._theta)))
        return terms.loss.sum() / self._n_pairs

    def _logps(self, batch: Batch, theta: dict[str, Tensor]) -> Float[Tensor, " sequences"]:
        """Sequence log-probabilities through full logits, which can be differentiated twice."""
        inputs = {"input_ids": batch.input_ids[:, :-1], "use_cache": False}
        output: Any = functional_call(self._model, theta, kwargs=inputs)
        wide = torch.promote_types(output.logits.dtype, torch.float32)
        found = nn.functional.log_softmax(output.logits.to(wide), dim=-1)
        picked = found.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
        return (picked * batch.completion_mask).sum(dim=1, dtype=torch.float64)


def noise_curvature(
    slopes: Float[np.ndarray, "pairs groups"], own: Int[np.ndarray, " pairs"], sizes: Float[np.ndarray, " groups"]
) -> Float[np.ndarray, " rows"]:
    r"""``tr(P H P Sigma)`` with Gauss-Newton's H, Sigma = Cov(h_i), h_i = g_t - g_e: the curvature along the noise.

    With slopes ``x_ig = sqrt(l''(z_i)) grad z_i . P h_g`` along the means h_g of groups of prompts, ``H = E l'' grad z
    grad z'``, so the mean over i of the variance of ``x_ig`` over g is what is wanted. A pair is not measured along the
    group that it is in, which would put ``(grad z_i . P h_i)^2`` into it: on 396 embedded prompts that is two thirds
    of the result, on 64 nine tenths. Without, it is unbiased whatever the number of prompts.

    Args:
        slopes: `bvpo_stats.gradients.stream.TraceSides.slopes`.
        own: Group that each pair is in.
        sizes: Examples of each group.

    Returns:
        ``[1 + G]``: of all, and with each group left out, both as pairs and as a direction.

    Raises:
        UserError: Fewer than four groups.
    """
    n_groups = len(sizes)
    if n_groups < 4:
        raise UserError(
            f"eta L along the noise needs four groups of prompts or more, got {n_groups}; give more prompts."
        )
    weights = np.where(np.arange(n_groups) == own[:, None], 0.0, sizes)  # [pairs, groups]
    parts = np.stack([weights, weights * slopes, weights * slopes**2])
    whole, counts = parts.sum(axis=2), (weights > 0).sum(axis=1)
    rows = []
    for left in (None, *range(n_groups)):
        kept = np.ones(len(own), dtype=bool) if left is None else own != left
        total = whole[:, kept] - (0.0 if left is None else parts[:, kept, left])
        count = counts[kept] - (0 if left is None else 1)
        rows.append(((total[2] - total[1] ** 2 / total[0]) / (count - 1)).mean() if kept.any() else np.nan)
    return np.array(rows)
