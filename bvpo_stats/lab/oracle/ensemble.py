"""Many copies of an oracle's policy at once, each at its own theta: what training it many times over needs.

All traces of all copies go through the real model in one pass. Every sequence carries its own copy of the LoRA
parameters, so that a backward pass over the summed log-probabilities leaves each sequence's gradient: its score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import logsumexp
from torch import Tensor
from torch.func import functional_call, vmap

from bvpo_stats.lab.oracle.build import Oracle
from bvpo_stats.model.batching import Batch, TokenSequence, collate
from bvpo_stats.model.exact import plain_attention
from bvpo_stats.model.subset import lora_subset

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
