"""Theorem 1: what mixing does to the variance of the gradient, trace sampling alone and all sampling counted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bvpo_stats.lab.oracle import Atoms, CellMoments, cell_moments, population_atoms
from bvpo_stats.lab.theorems.ground import Ground, Sample, standard_error
from bvpo_stats.lab.theorems.report import STANDARD_ERRORS, Check, Numbers, TopicReport, judge
from bvpo_stats.statistics import summary_of_arrays
from bvpo_stats.statistics.estimates import Estimates, estimates

Array = NDArray[np.float64]
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
PAPER = 0.5
"""The paper's alpha."""
_SOURCE = "Theorem 1, Appendix A.1"


def theorem1(ground: Ground) -> TopicReport:
    """Conditional variance reduction, its expectation, and its limits.

    Args:
        ground: Oracles and samples.
    """
    exact = ground.exact
    measured = {alpha: _trace_part(ground.sample, alpha) for alpha in ALPHAS}
    prompts = [pair for oracle in ground.sharp for pair in prompt_variances(cell_moments(oracle, ground.objective))]
    return TopicReport(
        name="theorem1",
        title="Theorem 1: variance from sampling traces",
        checks=(
            _in_every_cell(ground.atoms),
            _on_average(measured[PAPER], exact.trace_part),
            _all_sampling(ground, prompts),
            _within_prompt(ground),
            _shrinkage(ground),
        ),
        data={
            "trace_part": exact.trace_part,
            "points": [{"alpha": a, "value": v, "standard_error": se} for a, (v, se) in measured.items()],
            "ratios": sorted(empty / trace for trace, empty in prompts),
            "main_ratio": exact.within_prompt_e / exact.within_prompt_t,
            "paper_alpha": PAPER,
        },
    )


def prompt_variances(cells: CellMoments) -> list[tuple[float, float]]:
    """(Var(g_t | x), Var(g_e | x)) of every prompt, exact: traces and answers resampled.

    Args:
        cells: Conditional moments.
    """
    found = []
    squares = np.sum(cells.empty**2, axis=-1)
    for x in range(len(cells.pair_law)):
        pair, empty_pair = cells.pair_law[x], cells.empty_pair_law[x]
        mean_t, mean_e = (
            np.tensordot(law, vectors[x], axes=2) for law, vectors in ((pair, cells.mean_t), (empty_pair, cells.empty))
        )
        trace = np.sum(pair * cells.square_t[x]) - mean_t @ mean_t
        found.append((float(trace), float(np.sum(empty_pair * squares[x]) - mean_e @ mean_e)))
    return found


def _cells(atoms: Atoms) -> Iterator[tuple[Array, Array]]:
    """(law, g_t) over the traces of every (x, y+, y-), by brute force: atoms of one cell share their m."""
    starts = np.flatnonzero(np.any(atoms.m[1:] != atoms.m[:-1], axis=1) | (np.diff(atoms.t_prompt) != 0)) + 1
    for t, law in zip(np.split(atoms.t, starts), np.split(atoms.t_probability, starts), strict=True):
        yield law / law.sum(), t


def _in_every_cell(atoms: Atoms) -> Check:
    ratios = []
    for law, t in _cells(atoms):
        mixed = PAPER * t + (1 - PAPER) * atoms.e[0]
        spread = [law @ np.sum((vectors - law @ vectors) ** 2, axis=1) for vectors in (mixed, t)]
        ratios.append(spread[0] / spread[1])
    worst = max(ratios, key=lambda ratio: abs(ratio - PAPER**2))
    return judge(
        "For given answers, mixing leaves alpha^2 of the variance that trace sampling causes.",
        Numbers("Var(g_c | x, y, y') / Var(g_t | x, y), alpha = 0.5, worst case", worst, PAPER**2),
        _SOURCE,
        note=f"All traces of {len(ratios)} (prompt, pair) cases written out.",
    )


def _trace_part(sample: Sample, alpha: float) -> tuple[float, float]:
    """The package's estimate of E Var(g_c | x, y, y') from two draws of the traces, with its standard error."""
    rest = (1 - alpha) * sample.e
    members = sample.members | {"t": alpha * sample.t + rest}
    summary = summary_of_arrays(members, trace2=alpha * sample.t2 + rest)
    found = estimates(summary).var_trace_sampling
    assert found is not None  # trace2 was given
    return float(found[0]), standard_error(found, summary)


def _on_average(measured: tuple[float, float], trace_part: float) -> Check:
    value, error = measured
    return judge(
        "Averaged over the data, the trace-sampling variance of g_c is alpha^2 times that of g_t.",
        Numbers("E Var(g_c | x, y, y'), alpha = 0.5", value, PAPER**2 * trace_part, STANDARD_ERRORS * error),
        _SOURCE,
        note="Estimated as E norm(c1 - c2)^2 / 2 from two trace draws per example.",
    )


def _all_sampling(ground: Ground, prompts: list[tuple[float, float]]) -> Check:
    """The variance of the mix over the written-out population of each prompt, against the rule for the ratio."""
    populations = [population_atoms(oracle, ground.objective) for oracle in ground.sharp]
    written_out = [(atoms, x) for atoms in populations for x in range(atoms.n_prompts)]
    wrong = raised = 0
    for (trace, empty), (atoms, x) in zip(prompts, written_out, strict=True):
        for alpha in np.linspace(0, 0.95, 20):
            reduced = _mixed_variance(atoms, x, alpha) <= trace
            wrong += int(reduced != (empty / trace <= (1 + alpha) / (1 - alpha)))
        raised += int(_mixed_variance(atoms, x, PAPER) > trace)
    largest = max(empty / trace for trace, empty in prompts)
    return judge(
        "Counting the sampling of y' too, Var(g_c | x) <= Var(g_t | x) iff Var(g_e | x) / Var(g_t | x) <= "
        "(1 + alpha) / (1 - alpha).",
        Numbers(f"prompts x alphas that break the rule, of {20 * len(prompts)}", wrong, 0),
        _SOURCE + ", with y' resampled",
        verdict="holds with limits",
        note=f"Theorem 1 holds y' fixed. In {raised} of {len(prompts)} prompts of peaked oracles mixing at 0.5 raises "
        f"the variance given the prompt; largest ratio {largest:.1f}, where 0.5 allows 3.",
    )


def _mixed_variance(atoms: Atoms, prompt: int, alpha: float) -> float:
    """Var(g_c | x) over every pair of a D_t and a D_e atom of the prompt."""
    trace, empty = atoms.t_prompt == prompt, atoms.e_prompt == prompt
    mixed = alpha * atoms.t[trace][:, None] + (1 - alpha) * atoms.e[empty][None]
    law = atoms.t_probability[trace][:, None] * atoms.e_probability[empty]
    centred = mixed - np.tensordot(law, mixed, axes=2)
    return float(np.sum(law * np.sum(centred**2, axis=-1)))


def _within_prompt(ground: Ground) -> Check:
    """The ratio measured on the sample, prompt by prompt, against the exact one."""
    sample, exact = ground.sample, ground.exact
    spread: dict[str, list[Array]] = {"t": [], "e": []}
    for x in np.unique(sample.prompt):
        rows = sample.prompt == x
        factor = rows.sum() / (rows.sum() - 1) * len(sample.prompt) / rows.sum() / exact.cells.pair_law.shape[0]
        for name, vectors in (("t", sample.t[rows]), ("e", sample.e[rows])):
            spread[name].append(factor * np.sum((vectors - vectors.mean(axis=0)) ** 2, axis=1))
    t, e = (np.concatenate(parts) for parts in spread.values())
    ratio = e.mean() / t.mean()
    error = np.std(e - ratio * t, ddof=1) / t.mean() / np.sqrt(len(t))
    return judge(
        "The ratio that decides can be measured from repeated pairs of a prompt.",
        Numbers(
            "E Var(g_e | x) / E Var(g_t | x)",
            float(ratio),
            exact.within_prompt_e / exact.within_prompt_t,
            STANDARD_ERRORS * float(error),
        ),
        "statistics of Theorem 1",
        note="Below 3, mixing at 0.5 reduces the variance given the prompt.",
    )


def _shrinkage(ground: Ground) -> Check:
    """alpha_0 = E g_t.mu / E norm(g_t)^2 from the sample against the exact one, and what it achieves."""
    exact = ground.exact
    summary = summary_of_arrays(ground.sample.members)
    factor = estimates(summary).shrink_factor()
    truth: Estimates = exact.estimates
    best = float(truth.shrink_factor())
    errors = {
        "g_t": exact.error(1.0),
        "alpha* mix": exact.error(exact.alpha_star),
        "best multiple of g_t": float(truth.shrunk_error(best)),
        "zero vector": float(truth.marginal_sq),
    }
    listed = ", ".join(f"{name} {value:.2g}" for name, value in errors.items())
    return judge(
        "Shrinking g_t to alpha g_t gives the same alpha^2; the best such multiple is E g_t.mu / E norm(g_t)^2.",
        Numbers("best multiple of g_t", float(factor[0]), best, STANDARD_ERRORS * standard_error(factor, summary)),
        "shrinkage baseline",
        verdict="holds with limits",
        note=f"So less variance alone proves little. MSE of single examples: {listed}.",
    )
