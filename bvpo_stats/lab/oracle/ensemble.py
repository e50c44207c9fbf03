"""Many copies of an oracle's policy at once, each at its own theta: what training it many times over needs.

All traces of all copies go through the real model in one pass. Every sequence carries its own copy of the LoRA
parameters, so that a backward pass over the summed log-probabilities leaves each sequence's gradient: its score.
On the scores stand, for every copy, the exact moments (those of `bvpo_stats.lab.oracle.exact`, without a loop over
cells: a mean is one vector of coefficients, an inner product needs only the Gram matrix of the scores), what a training
step and a probe would see of sampled data, and the smoothness of its loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import expit, logsumexp
from torch import Tensor
from torch.func import functional_call, vmap

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.objectives import Objective
from bvpo_stats.lab.oracle.build import Oracle
from bvpo_stats.lab.oracle.draws import Draws
from bvpo_stats.lab.oracle.exact import PairWeights, Scored, pair_weights, without_scores
from bvpo_stats.lab.oracle.language import ANSWER_TOKENS
from bvpo_stats.model.batching import Batch, TokenSequence, collate
from bvpo_stats.model.exact import plain_attention
from bvpo_stats.model.subset import lora_subset
from bvpo_stats.statistics.estimates import Estimates
from bvpo_stats.statistics.moments import Array

Side = tuple[Int[np.ndarray, "copies examples"], Int[np.ndarray, "copies examples"]]
"""(trace, answer) of one side of every pair."""
_SEQUENCES_AT_ONCE = 2048


@dataclass(frozen=True)
class Copies:
    """Log-probabilities and scores of every sequence (x, r, y) of every copy.

    Attributes:
        joint: log pi_theta(r, y | x), ``[copies, prompts, traces, answers]``.
        scores: Its gradient, ``[copies, prompts, traces, answers, parameters]``.
    """

    joint: Float[np.ndarray, "copies prompts traces answers"]
    scores: Float[np.ndarray, "copies prompts traces answers parameters"]

    @property
    def marginal(self) -> Float[np.ndarray, "copies prompts answers"]:
        """Log pi_theta(y | x)."""
        return np.asarray(logsumexp(self.joint, axis=2))


@dataclass(frozen=True)
class Ensemble:
    """An oracle with all of its traces in one batch.

    Answers are single tokens and the end of the sequence is certain after them, so one sequence ending in the closing
    tag yields the log-probabilities of all of its answers.

    Attributes:
        oracle: Language, base model, reference and data laws.
        batch: Every prompt and trace, closing tag included: by prompt, trace.
        last: Position of the closing tag in each.
    """

    oracle: Oracle
    batch: Batch
    last: Int[Tensor, " sequences"]

    @classmethod
    def of(cls, oracle: Oracle) -> Ensemble:
        """Lists the sequences."""
        grammar = oracle.grammar
        sequences = [
            TokenSequence(grammar.prompt_ids(prompt), (*trace, grammar.close_id))
            for prompt in range(grammar.n_prompts)
            for trace in grammar.traces()
        ]
        last = torch.tensor([len(sequence) - 1 for sequence in sequences])
        return cls(oracle, collate(sequences, pad_id=grammar.pad_id), last)

    def at(self, thetas: Float[np.ndarray, "copies parameters"]) -> Copies:
        """Scores every sequence at each theta; the same numbers as `bvpo_stats.lab.oracle.at`, copy by copy."""
        chunk = max(1, _SEQUENCES_AT_ONCE // len(self.batch))
        parts = [self._score(torch.tensor(thetas[start : start + chunk])) for start in range(0, len(thetas), chunk)]
        grammar = self.oracle.grammar
        shape = (len(thetas), grammar.n_prompts, grammar.n_traces, grammar.n_answers)
        joint, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Copies(joint.reshape(shape), scores.reshape(*shape, -1))

    def _score(
        self, thetas: Float[Tensor, "copies parameters"]
    ) -> tuple[Float[np.ndarray, "sequences answers"], Float[np.ndarray, "sequences answers parameters"]]:
        model: Any = self.oracle.policy.model
        answers = torch.tensor(list(self.oracle.grammar.answer_ids))
        weights = lora_subset(model).parameters
        own = thetas.repeat_interleave(len(self.batch), dim=0).requires_grad_()
        pieces = own.split([weight.numel() for weight in weights.values()], dim=1)
        named = {
            name: piece.reshape(-1, *weight.shape)
            for (name, weight), piece in zip(weights.items(), pieces, strict=True)
        }

        def joint(theta: dict[str, Tensor], ids: Tensor, in_trace: Tensor, last: Tensor) -> Tensor:
            output: Any = functional_call(model, theta, kwargs={"input_ids": ids[None], "use_cache": False})
            found = torch.log_softmax(output.logits[0], dim=-1)
            trace = (found[:-1].gather(1, ids[1:, None]).squeeze(1) * in_trace).sum()
            return trace + found.index_select(0, last[None])[0].index_select(0, answers)

        parts = (self.batch.input_ids, self.batch.completion_mask.to(own.dtype), self.last)
        repeated = (part.repeat(len(thetas), *([1] * (part.ndim - 1))) for part in parts)
        with plain_attention(model), torch.enable_grad():
            values = vmap(joint)(named, *repeated)
            columns = values.sum(dim=0)
            scores = [torch.autograd.grad(column, own, retain_graph=True)[0] for column in columns]
        return values.detach().numpy(), torch.stack(scores, dim=1).numpy()


@dataclass(frozen=True)
class CopyMoments:
    """Exact means, losses and parts of alpha, one entry a copy.

    Attributes:
        mean_t: E g_t, ``[copies, parameters]``.
        mean_e: E g_e.
        mu: E m = grad L_m.
        loss_m: L_m, ``[copies]``.
        parts: Biases, variances and products, arrays ``[copies]``.
    """

    mean_t: Float[np.ndarray, "copies parameters"]
    mean_e: Float[np.ndarray, "copies parameters"]
    mu: Float[np.ndarray, "copies parameters"]
    loss_m: Float[np.ndarray, " copies"]
    parts: Estimates


def copy_moments(oracle: Oracle, copies: Copies, objective: Objective) -> CopyMoments:
    """Exact moments of every copy.

    Args:
        oracle: Reference and data laws.
        copies: Log-probabilities and scores.
        objective: The preference loss.
    """
    table = oracle.table
    posterior, n_prompts = table.sampling.posterior, len(oracle.pair_law)
    law_t = np.einsum("xab,xra,xsb->xrasb", oracle.pair_law, posterior, posterior) / n_prompts
    law_e = oracle.empty_pair_law / n_prompts
    lengths = (table.trace_tokens + float(ANSWER_TOKENS))[:, None]
    with_trace = _weights(objective, copies.joint, table.reference.joint, lengths)
    empty = _weights(objective, copies.joint[:, :, :1], table.reference.joint[:, :1], lengths[:1])
    marginal = _weights(objective, copies.marginal[:, :, None], table.reference.marginal[:, None], ANSWER_TOKENS)
    scores = copies.scores
    # Coefficients of every score, by prompt: a response is chosen in some pairs and rejected in others.
    c_t = _coefficients(law_t, with_trace)
    c_e = np.zeros_like(c_t)
    c_e[:, :, :1] = _coefficients(law_e[:, None, :, None], empty)
    law_m = oracle.pair_law[:, None, :, None] / n_prompts
    c_m = _coefficients(law_m, marginal) * np.exp(copies.joint - copies.marginal[:, :, None])
    t, e, m = (np.einsum("nxra,nxrad->nxd", c, scores) for c in (c_t, c_e, c_m))
    mean_t, mean_e, mu = (v.sum(axis=1) for v in (t, e, m))
    gram = _gram(scores)
    second_t = _second_moment(law_t, with_trace, gram)
    second_e = _second_moment(law_e[:, None, :, None], empty, gram[:, :, :1, :, :1])
    # Given the prompt, t and e are independent; t and e above carry the prompt's probability once each.
    product_te = n_prompts * np.sum(t * e, axis=(1, 2))
    loss_m = np.sum(law_m * marginal.loss, axis=(1, 2, 3, 4, 5))
    return CopyMoments(mean_t, mean_e, mu, loss_m, _parts(mean_t, mean_e, mu, (second_t, second_e, product_te)))


def curvature_root(
    oracle: Oracle, copies: Copies, objective: Objective
) -> Float[np.ndarray, "copies cells parameters"]:
    """W with ``W'W`` the Gauss-Newton Hessian of L_m, ``sum_c P(c) l_c'' D_c D_c'``, ``D = S(y+) - S(y-)``.

    Scores mapped by W (`in_metric`) have inner products ``x' H y``.

    Raises:
        UserError: A loss other than DPO.
    """
    if objective.name != "dpo":
        raise UserError("the Gauss-Newton curvature is written out for DPO only; choose the sigmoid loss.")
    x, a, b = np.nonzero(oracle.pair_law > 0)
    posterior = np.exp(copies.joint - copies.marginal[:, :, None])
    S = np.einsum("nxra,nxrad->nxad", posterior, copies.scores)
    ratio = copies.marginal - oracle.table.reference.marginal
    z = objective.beta * (ratio[:, x, a] - ratio[:, x, b])
    second = objective.beta**2 * expit(z) * expit(-z) * oracle.pair_law[x, a, b] / len(oracle.pair_law)
    return np.sqrt(second)[..., None] * (S[:, x, a] - S[:, x, b])


def in_metric(copies: Copies, root: Float[np.ndarray, "copies cells parameters"]) -> Copies:
    """The same copies with scores mapped by a root of a metric: `copy_moments` of them are moments in that metric."""
    return Copies(copies.joint, np.einsum("nxrad,ncd->nxrac", copies.scores, root))


def _weights(objective: Objective, log_prob: Array, log_ref: Array, tokens: Array | float) -> PairWeights:
    """All pairs of responses of a prompt: ``[copies, prompts, r, a, s, b]``, (r, a) chosen and (s, b) rejected."""
    shape = log_prob.shape
    ref, length = (np.broadcast_to(np.asarray(x, dtype=np.float64), shape) for x in (log_ref, tokens))
    later, earlier = (Ellipsis, None, None), (slice(None), slice(None), None, None)
    chosen, rejected = (without_scores(log_prob[k], ref[k], length[k]) for k in (later, earlier))
    return pair_weights(objective, chosen, rejected)


def _coefficients(law: Array, weights: PairWeights) -> Array:
    return (law * weights.chosen).sum(axis=(4, 5)) + (law * weights.rejected).sum(axis=(2, 3))


def _gram(scores: Array) -> Array:
    """Inner products of the scores of one prompt, ``[copies, prompts, r, a, s, b]``."""
    flat = scores.reshape(*scores.shape[:2], -1, scores.shape[-1])
    sizes = scores.shape[2:4]
    return np.matmul(flat, np.swapaxes(flat, -1, -2)).reshape(*scores.shape[:2], *sizes, *sizes)


def _second_moment(law: Array, weights: PairWeights, gram: Array) -> Array:
    """E norm(u s_i + v s_j)^2 over pairs, ``[copies]``."""
    square = np.einsum("nxrara->nxra", gram)
    u, v = weights.chosen, weights.rejected
    terms = u**2 * square[..., None, None] + v**2 * square[:, :, None, None] + 2 * u * v * gram
    return np.asarray((law * terms).sum(axis=(1, 2, 3, 4, 5)))


def _parts(mean_t: Array, mean_e: Array, mu: Array, second: tuple[Array, Array, Array]) -> Estimates:
    def dot(x: Array, y: Array) -> Array:
        return np.asarray(np.einsum("nd,nd->n", x, y))

    b_t, b_e = mean_t - mu, mean_e - mu
    second_t, second_e, product_te = second
    return Estimates(
        bias_trace_sq=dot(b_t, b_t),
        bias_empty_sq=dot(b_e, b_e),
        bias_cross=dot(b_t, b_e),
        var_trace=second_t - dot(mean_t, mean_t),
        var_empty=second_e - dot(mean_e, mean_e),
        var_cross=product_te - dot(mean_t, mean_e),
        marginal_sq=dot(mu, mu),
        trace_dot_marginal=dot(mean_t, mu),
        empty_dot_marginal=dot(mean_e, mu),
        trace_sq=dot(mean_t, mean_t),
        empty_sq=dot(mean_e, mean_e),
        trace_dot_empty=dot(mean_t, mean_e),
    )


@dataclass(frozen=True)
class Pairs:
    """Examples of every copy, ``[copies, examples]`` each: a prompt, a D_t pair and a D_e pair."""

    prompt: Int[np.ndarray, "copies examples"]
    thinking: tuple[Side, Side]
    nothinking: tuple[Side, Side]

    @classmethod
    def of(cls, draws: Sequence[Draws]) -> Pairs:
        """Stacks draws of one size."""

        def side(mode: str, which: str) -> Side:
            found = [getattr(getattr(one, mode), which) for one in draws]
            return np.stack([trace for trace, _ in found]), np.stack([answer for _, answer in found])

        modes = [(side(mode, "chosen_pair"), side(mode, "rejected_pair")) for mode in ("thinking", "nothinking")]
        return cls(np.stack([one.prompt for one in draws]), modes[0], modes[1])

    def part(self, start: int, stop: int) -> Pairs:
        """A range of each copy's examples."""
        thinking, nothinking = (
            tuple((trace[:, start:stop], answer[:, start:stop]) for trace, answer in mode)
            for mode in (self.thinking, self.nothinking)
        )
        return Pairs(self.prompt[:, start:stop], thinking, nothinking)  # type: ignore[arg-type]


def pair_vectors(
    oracle: Oracle, copies: Copies, pairs: Pairs, objective: Objective
) -> tuple[Float[np.ndarray, "copies examples parameters"], Float[np.ndarray, "copies examples parameters"]]:
    """g_t and g_e of each example."""
    table = oracle.table
    rows, x = np.arange(len(pairs.prompt))[:, None], pairs.prompt

    def scored(side: Side) -> Scored:
        trace, answer = side
        at = (rows, x, trace, answer)
        tokens = table.trace_tokens[trace] + float(ANSWER_TOKENS)
        return Scored(copies.joint[at], table.reference.joint[x, trace, answer], tokens, copies.scores[at])

    found = []
    for chosen, rejected in (pairs.thinking, pairs.nothinking):
        plus, minus = scored(chosen), scored(rejected)
        weights = pair_weights(objective, plus, minus)
        found.append(weights.chosen[..., None] * plus.scores + weights.rejected[..., None] * minus.scores)
    return found[0], found[1]
