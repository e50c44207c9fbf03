"""Log-probabilities of sequences under policy, reference and sampler: stored where known, else by a forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bvpo_stats.gradients.plans import LogProbs, Sequences
from bvpo_stats.model.batching import Batch, collate, length_batches
from bvpo_stats.model.completion_logprobs import completion_logprobs
from bvpo_stats.model.head import sequence_logprobs
from bvpo_stats.model.policy import Policy
from bvpo_stats.model.scores import log_probabilities


@dataclass(frozen=True)
class Forwards:
    """The model and how it is run forward.

    Attributes:
        policy: The policy at theta.
        at_reference: theta = theta_ref: log pi_ref = log pi_theta, and no reference pass is made.
        use_stored: Whether stored log pi_ref are used where there are any.
        max_tokens: Budget of padded tokens per forward.
        max_padding: Largest share of padding per forward.
    """

    policy: Policy
    at_reference: bool
    use_stored: bool
    max_tokens: int
    max_padding: float

    def stored_log_probs(self, sequences: Sequences) -> LogProbs:
        """Log-probabilities at theta_ref without a pass, for weights that only know log-ratios and stored values.

        A sequence whose log-probability is not stored gets 0: its log-ratio is 0 whatever it is.
        """
        known = np.nan_to_num(sequences.stored) if self.use_stored else np.zeros(len(sequences.stored))
        return LogProbs(known, known, self.tempered(sequences))

    def batch(self, sequences: Sequences, part: list[int]) -> Batch:
        """Some of the sequences as one padded batch."""
        return collate(
            [sequences.sequences[i] for i in part],
            pad_id=self.policy.pad_id,
            max_positions=self.policy.max_positions,
            names=[sequences.names[i] for i in part],
            device=self.policy.device,
        )

    def log_probs(self, sequences: Sequences) -> LogProbs:
        """Log-probabilities of all sequences by passes of their own, stored values of the reference where allowed."""
        policy = self._forward(sequences, list(range(len(sequences.sequences))), self.policy.model)
        reference = self.reference(sequences)
        return LogProbs(policy, policy if reference is None else reference, self.tempered(sequences))

    def reference(self, sequences: Sequences) -> Float[np.ndarray, " sequences"] | None:
        """Log pi_ref of all sequences; None at theta_ref."""
        if self.at_reference:
            return None
        values = sequences.stored.copy() if self.use_stored else np.full(len(sequences.stored), math.nan)
        missing = np.flatnonzero(np.isnan(values)).tolist()
        if missing:
            with self.policy.reference() as model:
                values[missing] = self._forward(sequences, missing, model)
        return values

    def tempered(self, sequences: Sequences) -> Float[np.ndarray, " sequences"]:
        """Log q_T of the sequences that need it: pi_ref sampled at another temperature, token by token."""
        values = np.full(len(sequences.sequences), math.nan)
        for temperature in np.unique(sequences.temperature[~np.isnan(sequences.temperature)]).tolist():
            rows = np.flatnonzero(sequences.temperature == temperature).tolist()
            with self.policy.reference():
                found = completion_logprobs(
                    self.policy,
                    [sequences.sequences[i] for i in rows],
                    [sequences.names[i] for i in rows],
                    temperatures=(temperature,),
                    max_tokens=self.max_tokens,
                )
            values[rows] = [float(tokens.sum()) for tokens in found]
        return values

    def _forward(
        self, sequences: Sequences, rows: list[int], model: torch.nn.Module
    ) -> Float[np.ndarray, " some_sequences"]:
        """Log-probabilities of some sequences, in batches of the budget."""
        lengths = [len(sequences.sequences[i]) for i in rows]
        found = np.zeros(len(rows))
        for part in length_batches(lengths, max_tokens=self.max_tokens, max_padding=self.max_padding):
            members = [rows[k] for k in part]
            names = [sequences.names[i] for i in members]
            found[part] = to_numpy(
                sequence_logprobs(log_probabilities(model, self.batch(sequences, members), names=names))
            )
        return found


def to_numpy(values: Tensor) -> Float[np.ndarray, " sequences"]:
    """Log-probabilities in float64 on the CPU."""
    return values.detach().double().cpu().numpy()
