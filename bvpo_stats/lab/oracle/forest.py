"""All traces of all prompts in one short pass, for many copies of the weights at once, differentiable.

Traces share their beginnings, so a prompt's language is a tree: each node is a token that attends to its ancestors
only. A prompt with R traces takes 5 + (R - 1) + R tokens instead of R whole sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap
from transformers import Qwen2Model

from bvpo_stats.lab.oracle.build import Oracle
from bvpo_stats.lab.oracle.language import N_STATES, PROMPT_LENGTH
from bvpo_stats.model.exact import plain_attention
from bvpo_stats.model.head import causal_lm_of
from bvpo_stats.model.subset import lora_subset


class Forest(nn.Module):
    """log pi_theta(r, y | x) of every sequence of an oracle's language."""

    def __init__(self, oracle: Oracle, dtype: torch.dtype = torch.float64) -> None:
        """Lays out the trees.

        Args:
            oracle: The language and the model, which is brought to the dtype.
            dtype: Of the model from now on.
        """
        super().__init__()
        model: Any = oracle.policy.model
        self.policy_model = model.to(dtype)
        grammar, n = oracle.grammar, PROMPT_LENGTH
        traces = grammar.traces()
        number, R = {trace: k for k, trace in enumerate(traces)}, len(traces)
        tail = [*(trace[-1] for trace in traces[1:]), *[grammar.close_id] * R]
        self._ids = torch.tensor([[*grammar.prompt_ids(x), *tail] for x in range(grammar.n_prompts)])
        depths = [len(trace) for trace in traces]
        self._positions = torch.tensor(
            [[*range(n), *(n - 1 + depth for depth in depths[1:]), *(n + d for d in depths)]]
        )
        # Place n - 1 + k is the end of trace k (for the empty one the prompt's end), n + R - 1 + k its closing tag.
        sees = torch.zeros(n + 2 * R - 1, n + 2 * R - 1, dtype=torch.bool)
        sees[:n, :n] = torch.ones(n, n).tril().bool()
        path = torch.zeros(R, R, grammar.n_symbols + 1, dtype=dtype)
        for k, trace in enumerate(traces):
            if k:
                parent = number[trace[:-1]]
                sees[n - 1 + k] = sees[n - 1 + parent]
                sees[n - 1 + k, n - 1 + k] = True
                path[k] = path[parent]
                path[k, :, -1] = 0.0
                path[k, parent, grammar.symbol_ids.index(trace[-1])] = 1.0
            sees[n + R - 1 + k] = sees[n - 1 + k]
            sees[n + R - 1 + k, n + R - 1 + k] = True
            if len(trace) < grammar.max_trace:  # else the closing tag is certain
                path[k, k, -1] = 1.0
        self._mask = torch.where(sees, 0.0, float("-inf")).to(dtype)[None, None]
        self._path = path.flatten(1)
        self._steps = torch.tensor([*grammar.symbol_ids, grammar.close_id])
        self._answers = torch.tensor(list(grammar.answer_ids))
        self._ends, self._closes = slice(n - 1, n - 1 + R), slice(n + R - 1, n + 2 * R - 1)
        self._weights = {f"policy_model.{name}": w.shape for name, w in lora_subset(model).parameters.items()}

    def forward(self) -> Float[Tensor, "prompts traces answers"]:
        """With the model's own weights."""
        causal_lm: Any = causal_lm_of(self.policy_model)
        hidden: Tensor = Qwen2Model.forward(
            causal_lm.model,
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=self._positions,
            use_cache=False,
        ).last_hidden_state  # type: ignore[assignment]
        head = causal_lm.lm_head.weight[:, :-N_STATES]
        steps = torch.log_softmax(hidden[:, self._ends] @ head[self._steps].T, dim=-1)
        answers = torch.log_softmax(hidden[:, self._closes] @ head[self._answers].T, dim=-1)
        return (steps.flatten(1) @ self._path.T)[..., None] + answers

    def joint(self, thetas: Float[Tensor, "copies parameters"]) -> Float[Tensor, "copies prompts traces answers"]:
        """With each copy's own."""
        pieces = thetas.split([shape.numel() for shape in self._weights.values()], dim=1)
        named = {
            name: piece.reshape(-1, *shape) for (name, shape), piece in zip(self._weights.items(), pieces, strict=True)
        }
        with plain_attention(self.policy_model):
            return vmap(lambda weights: functional_call(self, weights, ()))(named)  # type: ignore[no-any-return]
