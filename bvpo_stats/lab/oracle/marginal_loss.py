"""The marginal preference loss L_m as a function of theta: values, and products of its Hessian by double backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, vmap

from bvpo_stats.gradients.curvature import Spectrum, lanczos
from bvpo_stats.gradients.objectives import Objective, PairLogps
from bvpo_stats.lab.oracle.build import Oracle
from bvpo_stats.lab.oracle.exact import DPO
from bvpo_stats.lab.oracle.language import ANSWER_TOKENS
from bvpo_stats.model.batching import TokenSequence, collate
from bvpo_stats.model.exact import plain_attention
from bvpo_stats.model.subset import lora_subset

Vector = Float[np.ndarray, " parameters"]


class MarginalLoss:
    """L_m(theta) = E[-log sigmoid(beta (log pi_theta(y+|x) / pi_ref(y+|x) - the same of y-))], traces summed out.

    The data law (prompts, pairs) and the reference are those of the oracle, whatever theta is.
    """

    def __init__(self, oracle: Oracle, objective: Objective = DPO):
        """Lays out every sequence of the language in one padded batch.

        Args:
            oracle: The language, the data laws and the reference.
            objective: The preference loss.
        """
        grammar = oracle.grammar
        self._model: Any = oracle.policy.model
        self._weights = lora_subset(self._model).parameters
        self._objective = objective
        self._shape = (grammar.n_prompts, grammar.n_traces, grammar.n_answers)
        self._batch = collate(
            [
                TokenSequence(grammar.prompt_ids(prompt), grammar.completion_ids(trace, answer))
                for prompt in range(grammar.n_prompts)
                for trace in grammar.traces()
                for answer in range(grammar.n_answers)
            ],
            pad_id=grammar.pad_id,
        )
        self._pairs = tuple(torch.as_tensor(index) for index in np.nonzero(oracle.pair_law > 0))
        self._law = torch.as_tensor(oracle.pair_law[oracle.pair_law > 0] / grammar.n_prompts)
        self._reference = torch.as_tensor(oracle.table.reference.marginal)

    def value(self, theta: Vector) -> float:
        """L_m at theta."""
        return float(self.values(theta[None])[0])

    def values(self, thetas: Float[np.ndarray, "points parameters"]) -> Float[np.ndarray, " points"]:
        """L_m at many thetas, in one pass over the language."""
        with torch.no_grad(), plain_attention(self._model):
            return vmap(self._loss)(self._named(thetas)).numpy()

    def product(self, theta: Vector, vector: Vector) -> Vector:
        """H(theta) v."""
        return self.hessian(theta)(vector)

    def hessian(self, theta: Vector) -> Callable[[Vector], Vector]:
        """The map v to H(theta) v; the gradient is computed once, for all v."""
        named = {name: weight.requires_grad_() for name, weight in self._named(theta).items()}
        weights = list(named.values())
        with torch.enable_grad(), plain_attention(self._model):  # fused attention has no second derivative
            gradients = torch.autograd.grad(self._loss(named), weights, create_graph=True)

        def product(vector: Vector) -> Vector:
            along = list(self._named(vector).values())
            second = torch.autograd.grad(gradients, weights, along, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(w) if h is None else h for h, w in zip(second, weights, strict=True)]
            return torch.cat([part.reshape(-1) for part in parts]).numpy()

        return product

    def hessian_ends(self, theta: Vector, *, steps: int = 20, tolerance: float = 1e-3, seed: int = 0) -> Spectrum:
        """Both ends of the Hessian's spectrum at theta, by Lanczos; its ``smoothness`` is the local L.

        Args:
            theta: Where.
            steps: Most Hessian-vector products.
            tolerance: Relative residual at which to stop.
            seed: Decides the first vector.
        """
        return lanczos(self.hessian(theta), len(theta), steps=steps, tolerance=tolerance, seed=seed)

    def _named(self, flat: Float[np.ndarray, "*points parameters"]) -> dict[str, Tensor]:
        ends = np.cumsum([weight.numel() for weight in self._weights.values()])[:-1]
        return {
            name: torch.tensor(piece, dtype=torch.float64).reshape(*flat.shape[:-1], *weight.shape)
            for piece, (name, weight) in zip(np.split(flat, ends, axis=-1), self._weights.items(), strict=True)
        }

    def _loss(self, theta: dict[str, Tensor]) -> Tensor:
        batch = self._batch
        inputs = {"input_ids": batch.input_ids, "use_cache": False}
        output: Any = functional_call(self._model, theta, kwargs=inputs, tie_weights=False)  # no LoRA weight is tied
        laws = torch.log_softmax(output.logits[:, :-1], dim=-1)
        picked = laws.gather(2, batch.input_ids[:, 1:, None]).squeeze(2)
        joint = torch.where(batch.completion_mask, picked, 0.0).sum(dim=1).reshape(self._shape)
        marginal = torch.logsumexp(joint, dim=1)
        prompt, plus, minus = self._pairs
        tokens = torch.full_like(self._law, float(ANSWER_TOKENS))
        logps = PairLogps(
            marginal[prompt, plus],
            marginal[prompt, minus],
            tokens,
            tokens,
            self._reference[prompt, plus],
            self._reference[prompt, minus],
        )
        return (self._law * self._objective(logps).loss).sum()
