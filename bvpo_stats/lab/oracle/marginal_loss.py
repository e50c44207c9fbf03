"""The marginal preference loss L_m as a function of theta: values, and products of its Hessian by double backward."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from bvpo_stats.gradients.curvature import Spectrum, lanczos
from bvpo_stats.gradients.objectives import Objective, PairLogps
from bvpo_stats.lab.oracle.build import Oracle
from bvpo_stats.lab.oracle.exact import ANSWER_TOKENS, DPO
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
        with torch.no_grad(), plain_attention(self._model):
            return self._loss(self._named(theta)).item()

    def product(self, theta: Vector, vector: Vector) -> Vector:
        """H(theta) v."""
        named = {name: weight.requires_grad_() for name, weight in self._named(theta).items()}
        weights, along = list(named.values()), list(self._named(vector).values())
        with torch.enable_grad(), plain_attention(self._model):  # fused attention has no second derivative
            gradients = torch.autograd.grad(self._loss(named), weights, create_graph=True)
            slope = torch.stack([(g * v).sum() for g, v in zip(gradients, along, strict=True)]).sum()
            second = torch.autograd.grad(slope, weights, allow_unused=True)
        parts = [torch.zeros_like(w) if h is None else h for h, w in zip(second, weights, strict=True)]
        return torch.cat([part.reshape(-1) for part in parts]).numpy()

    def hessian_ends(self, theta: Vector, *, steps: int = 20, tolerance: float = 1e-3, seed: int = 0) -> Spectrum:
        """Both ends of the Hessian's spectrum at theta, by Lanczos; its ``smoothness`` is the local L.

        Args:
            theta: Where.
            steps: Most Hessian-vector products.
            tolerance: Relative residual at which to stop.
            seed: Decides the first vector.
        """
        return lanczos(lambda v: self.product(theta, v), len(theta), steps=steps, tolerance=tolerance, seed=seed)

    def _named(self, flat: Vector) -> dict[str, Tensor]:
        pieces = np.split(np.asarray(flat), np.cumsum([weight.numel() for weight in self._weights.values()])[:-1])
        return {
            name: torch.tensor(piece, dtype=torch.float64).reshape(weight.shape)
            for piece, (name, weight) in zip(pieces, self._weights.items(), strict=True)
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
