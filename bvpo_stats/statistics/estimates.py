"""Bias, variance and mean squared error of the trace, empty-trace and mixed gradients (Theorems 1, 2 and 4).

Every attribute is an exactly unbiased linear combination of U and M (see `bvpo_stats.statistics.moments`), given over
the whole sample and with each jackknife group left out, so that any function of them gets its interval from one array.

**Step and batch.** With mini-batches of ``B`` examples the covariances shrink by B while the biases stay; Theorem 4
weighs the variance by ``eta L``. The error of one step is therefore ``norm(bias)^2 + tau Var`` with

    tau = eta L / B,

the mean squared error of the paper's Theorem 2 at ``tau = 1`` (one example, eta L = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from bvpo_stats.errors import UserError, check_number
from bvpo_stats.statistics.moments import Array, MomentSummary


def noise_scale(batch_size: float = 1.0, eta_l: float = 1.0) -> float:
    """``tau = eta L / B``: how much a step of mini-batches of B examples weighs the variance of one example.

    Raises:
        UserError: The batch size or ``eta L`` is not positive and finite.
    """
    check_number("batch_size", batch_size)
    check_number("eta_l", eta_l)
    if not 0 < batch_size < math.inf:
        raise UserError(f"the batch size must be positive and finite, got {batch_size}.")
    if not 0 < eta_l < math.inf:
        raise UserError(
            f"eta * L (learning rate times smoothness) must be positive and finite, got {eta_l}; 1 is the paper's."
        )
    return eta_l / batch_size


@dataclass(frozen=True)
class Estimates:
    """Unbiased estimates; each array is ``[..., 1 + G]`` (row 0: whole sample), or ``[..., 1 + G, L]`` per block.

    With ``mu = E m``, ``b_t = E t - mu``, ``b_e = E e - mu`` and ``Sigma`` the covariances of single examples:

    Attributes:
        bias_trace_sq: ``norm(b_t)^2 = U_tt - 2 U_tm + U_mm``.
        bias_empty_sq: ``norm(b_e)^2 = U_ee - 2 U_em + U_mm``.
        bias_cross: ``b_t . b_e = U_te - U_tm - U_em + U_mm``.
        var_trace: ``tr Sigma_t = C_tt``.
        var_empty: ``tr Sigma_e = C_ee``.
        var_cross: ``tr Sigma_te = C_te``.
        marginal_sq: ``norm(mu)^2 = U_mm``, the error of the zero vector.
        trace_dot_marginal: ``E t . mu = U_tm``.
        empty_dot_marginal: ``E e . mu = U_em``.
        trace_sq: ``norm(E t)^2 = U_tt``.
        empty_sq: ``norm(E e)^2 = U_ee``.
        trace_dot_empty: ``E t . E e = U_te``.
        var_trace_sampling: Part of ``tr Sigma_t`` that sampling the traces causes with answers held fixed (Theorem 1),
            ``E norm(t1 - t2)^2 / 2``; None where no second trace draws were given.
        within_trace: ``Var(t | x)``, pairs and traces resampled for the same prompt; None unless some prompts have
            two pairs.
        within_empty: ``Var(e | x)``, likewise.
    """

    bias_trace_sq: Array
    bias_empty_sq: Array
    bias_cross: Array
    var_trace: Array
    var_empty: Array
    var_cross: Array
    marginal_sq: Array
    trace_dot_marginal: Array
    empty_dot_marginal: Array
    trace_sq: Array
    empty_sq: Array
    trace_dot_empty: Array
    var_trace_sampling: Array | None = None
    within_trace: Array | None = None
    within_empty: Array | None = None

    @property
    def P0(self) -> Array:  # noqa: N802
        """``norm(b_e)^2 - b_t . b_e``, the bias part of the numerator of alpha."""
        return self.bias_empty_sq - self.bias_cross

    @property
    def P1(self) -> Array:  # noqa: N802
        """``tr(Sigma_e - Sigma_te)``, the variance part of the numerator."""
        return self.var_empty - self.var_cross

    @property
    def Q0(self) -> Array:  # noqa: N802
        """``norm(b_t - b_e)^2``, the bias part of the denominator."""
        return self.bias_trace_sq + self.bias_empty_sq - 2 * self.bias_cross

    @property
    def Q1(self) -> Array:  # noqa: N802
        """``tr(Sigma_t + Sigma_e - 2 Sigma_te)``, the variance part of the denominator."""
        return self.var_trace + self.var_empty - 2 * self.var_cross

    def numerator(self, tau: float = 1.0) -> Array:
        """``P0 + tau P1``; at ``tau = 1`` the B of Theorem 2, ``M_ee - M_te - (U_em - U_tm)``."""
        return self.P0 + tau * self.P1

    def denominator(self, tau: float = 1.0) -> Array:
        """``Q0 + tau Q1``; at ``tau = 1`` the A of Theorem 2, ``E norm(t - e)^2 = M_tt - 2 M_te + M_ee``."""
        return self.Q0 + tau * self.Q1

    def bias_sq(self, alpha: float | Array) -> Array:
        """Squared norm of the mix's bias, ``norm(alpha b_t + (1 - alpha) b_e)^2``."""
        rest = 1 - np.asarray(alpha)
        return alpha**2 * self.bias_trace_sq + 2 * alpha * rest * self.bias_cross + rest**2 * self.bias_empty_sq

    def variance(self, alpha: float | Array) -> Array:
        """Variance of the mix over single examples, ``tr Cov(alpha t + (1 - alpha) e)`` (equation 7 of the paper)."""
        rest = 1 - np.asarray(alpha)
        return alpha**2 * self.var_trace + 2 * alpha * rest * self.var_cross + rest**2 * self.var_empty

    def error(self, alpha: float | Array, tau: float = 1.0) -> Array:
        """Error of one step with a fixed alpha, ``norm(bias)^2 + tau Var``.

        Exactly unbiased for an alpha that was not estimated from the same data, too low for one that was.
        """
        return self.bias_sq(alpha) + tau * self.variance(alpha)

    def shrink_factor(self, tau: float = 1.0) -> Array:
        """``alpha_0 = E t . mu / (norm(E t)^2 + tau tr Sigma_t)``, the scalar c with the least error of ``c g_t``.

        At ``tau = 1`` the denominator is ``E norm(t)^2``.
        """
        return self.trace_dot_marginal / (self.trace_sq + tau * self.var_trace)

    def shrunk_error(self, factor: float | Array, tau: float = 1.0) -> Array:
        """Error of ``factor g_t``: ``c^2 (norm(E t)^2 + tau tr Sigma_t) - 2 c E t . mu + norm(mu)^2``."""
        second_moment = self.trace_sq + tau * self.var_trace
        return factor**2 * second_moment - 2 * factor * self.trace_dot_marginal + self.marginal_sq

    def alpha_j_parts(self, rho: float, batch_size: float = 1.0) -> tuple[Array, Array]:
        """Numerator and denominator of alpha_J, which keeps the term that the proof of Theorem 3 drops.

        The descent lemma with ``rho = eta L < 1`` bounds one step by ``norm(b - mu)^2 - (1 - rho) norm(b)^2 +
        rho Var / B`` with ``b = E g_c``; appendix A.3 drops ``-(1 - rho) norm(b)^2``, which depends on alpha. Keeping
        it, with ``h = E t - E e``,

            alpha_J = [mu.h / rho - E e . h + P1 / B] / [norm(h)^2 + Q1 / B],

        the ordinary alpha at ``rho = 1``.
        """
        if not 0 < rho <= 1:
            raise UserError(
                f"alpha_J needs eta * L in (0, 1], got {rho}: Theorem 3 allows steps of at most 1 / L; lower the "
                "learning rate or leave alpha_J out."
            )
        marginal_dot_h = self.trace_dot_marginal - self.empty_dot_marginal
        empty_dot_h = self.trace_dot_empty - self.empty_sq
        return marginal_dot_h / rho - empty_dot_h + self.P1 / batch_size, self.Q0 + self.Q1 / batch_size

    def select(self, row: int) -> Estimates:
        """One entry of the last axis of every array, such as row 0, the whole sample."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value[..., row] for name, value in values.items() if value is not None})


Pick = Callable[[Estimates], tuple[Array, Array]]


@dataclass(frozen=True)
class LinearRatio:
    """Two statistics with what their ratio's confidence set needs.

    Attributes:
        numerator: ``[..., 1 + G]``.
        denominator: ``[..., 1 + G]``.
        group_sizes: ``[..., G]``, examples in each jackknife group.
        interactions: Of both, ``[..., I]`` each; None where the summary has none, or they are not linear in U and M.
        alone: The same with single prompts left out, to first order, where groups hold several; else None.
        projection: The same with each row of a random projection left out, where there was one; else None.
        norms: ``[..., P]``, size of the gradients of each prompt (`prompt_norms`); None where not known.
    """

    numerator: Array
    denominator: Array
    group_sizes: Array
    interactions: tuple[Array, Array] | None = None
    alone: LinearRatio | None = None
    norms: Array | None = None
    projection: LinearRatio | None = None

    @property
    def projected(self) -> Array | None:
        """Variance that the draw of the projection adds to the ratio: the jackknife's over its rows."""
        if self.projection is None:
            return None
        left = self.projection.numerator[..., 1:] / self.projection.denominator[..., 1:]
        rows = left.shape[-1]
        return np.asarray((rows - 1) / rows * ((left - left.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1))

    @classmethod
    def of(
        cls,
        summary: MomentSummary,
        pick: Pick,
        *,
        per_block: bool = False,
        marginal: str = "m",
        linear: bool = True,
    ) -> LinearRatio:
        """``pick`` of the estimates, over groups and prompts; if ``linear`` in them, of the interactions too.

        >>> rng = np.random.default_rng(0)
        >>> from bvpo_stats.statistics.moments import summary_of_arrays
        >>> summary = summary_of_arrays({"t": rng.normal(size=(12, 3)), "e": rng.normal(size=(12, 3))})
        >>> found = LinearRatio.of(summary, lambda p: (p.numerator(0.5), p.denominator(0.5)))
        >>> found.numerator.shape, found.interactions[0].shape
        ((13,), (66,))
        """
        rows = estimates(summary, per_block=per_block, marginal=marginal)
        alone, pairs = None, None
        if summary.prompts is not None:
            alone = cls.of(summary.prompts, pick, per_block=per_block, marginal=marginal, linear=False)
        if linear and summary.interactions is not None:
            nothing = np.zeros_like(summary.interactions)
            only = replace(
                summary,
                U=summary.interactions,
                M=nothing,
                shift=nothing,
                trace_sampling=None,
                within_prompt=None,
                interactions=None,
                prompts=None,
                projection=None,
            )
            pairs = pick(estimates(only, per_block=per_block, marginal=marginal))
        seen = None
        if summary.projection is not None:
            seen = cls.of(summary.projection, pick, per_block=per_block, marginal=marginal, linear=False)
        return cls(*pick(rows), summary.group_sizes, pairs, alone, prompt_norms(summary, per_block=per_block), seen)

    @classmethod
    def of_rows(
        cls,
        numerator: Array,
        denominator: Array,
        summary: MomentSummary,
        interactions: tuple[Array, Array] | None = None,
    ) -> LinearRatio:
        """Of statistics that are known with each group left out only; with sizes where a group is a prompt."""
        norms = prompt_norms(summary) if summary.prompts is None else None
        return cls(numerator, denominator, summary.group_sizes, interactions, norms=norms)

    @classmethod
    def alpha(cls, summary: MomentSummary, tau: float, *, per_block: bool = False, marginal: str = "m") -> LinearRatio:
        """alpha_unc at ``tau = eta L / B``: ``(P0 + tau P1) / (Q0 + tau Q1)`` (Theorem 2)."""
        return cls.of(
            summary,
            lambda parts: (parts.numerator(tau), parts.denominator(tau)),
            per_block=per_block,
            marginal=marginal,
        )

    def block(self, k: int) -> LinearRatio:
        """The same of one parameter block, where the block axis was kept."""
        return replace(
            self,
            numerator=self.numerator[..., k],
            denominator=self.denominator[..., k],
            interactions=None
            if self.interactions is None
            else (self.interactions[0][..., k], self.interactions[1][..., k]),
            alone=None if self.alone is None else self.alone.block(k),
            norms=None if self.norms is None else self.norms[..., k],
            projection=None if self.projection is None else self.projection.block(k),
        )

    def scaled(self, spread: Array, raised: float) -> LinearRatio:
        """With ``1 / spread`` of the deviations and the denominator raised, for what more prompts would give.

        ``[1 + G]`` becomes ``[..., 1 + G]`` for ``spread`` of shape ``[..., 1]``.
        """

        def move(x: Array) -> Array:
            return x[..., :1] + (x - x[..., :1]) / np.sqrt(spread)

        pairs = None if self.interactions is None else (self.interactions[0] / spread, self.interactions[1] / spread)
        return replace(
            self,
            numerator=move(self.numerator),
            denominator=move(self.denominator) + raised,
            group_sizes=self.group_sizes * spread,
            interactions=pairs,
            alone=None if self.alone is None else self.alone.scaled(spread, raised),
        )


def prompt_norms(
    summary: MomentSummary, members: Sequence[str] = ("t", "e"), *, per_block: bool = False
) -> Array | None:
    """Twice the squared distances of a prompt's estimators to their mean: of two, ``norm(t - e)^2``.

    Args:
        summary: Moments.
        members: The estimators.
        per_block: Keep the block axis.

    Returns:
        Mean over the examples of each prompt, ``[..., P]``; None where single prompts or a member are not known.
    """
    alone = summary if summary.prompts is None else summary.prompts
    if alone.n_groups != summary.n_prompts or not set(members) <= set(summary.members):
        return None
    at = [summary.index(name) for name in members]
    own = (alone.M if per_block else alone.M.sum(axis=-3))[..., at, :][..., at]
    squares = 2 * (np.trace(own, axis1=-2, axis2=-1) - own.mean(axis=(-2, -1)) * len(at))
    sizes = alone.group_sizes[..., None] if per_block else alone.group_sizes
    axis = -2 if per_block else -1
    total = sizes.sum(axis=axis, keepdims=True)
    whole, left = np.split(squares, [1], axis=axis)
    # differences of sums leave rounding below zero
    return np.maximum((total * whole - (total - sizes) * left) / sizes, 0.0)


def _pick(per_block: bool, products: Array, a: int, b: int) -> Array:
    chosen = products[..., a, b]
    return chosen if per_block else chosen.sum(axis=-1)


def estimates(summary: MomentSummary, *, per_block: bool = False, marginal: str = "m") -> Estimates:
    """Unbiased estimates from a summary of moments.

    Args:
        summary: Moments of the members ``t``, ``e`` and ``m``; without ``m``, mu is ``E t`` (reference-point mode: then
            ``norm(b_t)^2`` and ``b_t . b_e`` are exactly zero by construction).
        per_block: Keep the block axis (per-layer estimates) instead of summing over it.
        marginal: Name of the member whose mean is mu, where there are several estimates of it.

    Example:
        Two examples each, in one dimension, where the truth is easy to see.

        >>> from bvpo_stats.statistics.moments import summary_of_arrays
        >>> t, e, m = (np.array(x)[:, None] for x in ([1.0, 3.0, 2.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]))
        >>> out = estimates(summary_of_arrays({"t": t, "e": e, "m": m})).select(0)
        >>> round(float(out.bias_empty_sq), 12), round(float(out.var_trace), 12)
        (1.0, 1.0)
    """
    t, e, m = (summary.index(name) for name in ("t", "e", marginal))

    U, C, absolute = summary.U, summary.covariance, summary.U + summary.shift
    tt, ee, mm, te, tm, em = (_pick(per_block, U, a, b) for a, b in ((t, t), (e, e), (m, m), (t, e), (t, m), (e, m)))
    sampling, within = summary.trace_sampling, summary.within_prompt
    return Estimates(
        bias_trace_sq=tt - 2 * tm + mm,
        bias_empty_sq=ee - 2 * em + mm,
        bias_cross=te - tm - em + mm,
        var_trace=_pick(per_block, C, t, t),
        var_empty=_pick(per_block, C, e, e),
        var_cross=_pick(per_block, C, t, e),
        marginal_sq=_pick(per_block, absolute, m, m),
        trace_dot_marginal=_pick(per_block, absolute, t, m),
        empty_dot_marginal=_pick(per_block, absolute, e, m),
        trace_sq=_pick(per_block, absolute, t, t),
        empty_sq=_pick(per_block, absolute, e, e),
        trace_dot_empty=_pick(per_block, absolute, t, e),
        var_trace_sampling=None if sampling is None else (sampling if per_block else sampling.sum(axis=-1)),
        within_trace=None if within is None else _pick(per_block, within, t, t),
        within_empty=None if within is None else _pick(per_block, within, e, e),
    )
