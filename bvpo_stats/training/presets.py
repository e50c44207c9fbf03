"""Settings by name: the paper's (Appendix C.1, Tables 6 to 8) for its three models, and one for the embedded model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from bvpo_stats.embedded.assets import EMBEDDED
from bvpo_stats.errors import UserError

Method = Literal["dpo", "simpo", "bvpo"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Preset:
    """Settings of one model and method. AdamW throughout.

    Attributes:
        model: Folder or hub id; None where any model will do.
        loss: ``sigmoid``, ``simpo`` or ``ipo``.
        beta: Inverse temperature of the implicit reward.
        gamma: Target margin, SimPO only.
        learning_rate: Peak learning rate.
        lora_r: Rank of the adapter; 0 trains all weights.
        batch_size: Prompts per optimizer step.
        epochs: Passes over the prompts.
        scheduler: Learning-rate schedule.
        warmup: Share of the steps in which the learning rate rises.
        max_length: Longest sequence.
        alpha: Weight of the trace loss; 1 for methods that train on D_t alone.
        bf16: Products in bfloat16, weights in float32.
    """

    model: str | None
    loss: str
    beta: float
    gamma: float
    learning_rate: float
    lora_r: int = 0
    batch_size: int = 128
    epochs: float = 1.0
    scheduler: str = "cosine"
    warmup: float = 0.1
    max_length: int = 4096
    alpha: float = 0.5
    bf16: bool = False

    def settings(self, **given: Any) -> dict[str, Any]:
        """Fields of `bvpo_stats.training.config.BVPOConfig`: what was given, the preset's where that is None."""
        own = {
            "alpha": self.alpha,
            "loss_type": self.loss,
            "beta": self.beta,
            "simpo_gamma": self.gamma,
            "learning_rate": self.learning_rate,
            "num_train_epochs": self.epochs,
            "lr_scheduler_type": self.scheduler,
            "warmup_steps": self.warmup,
            "max_length": self.max_length,
            "bf16": self.bf16,
        }
        return own | {name: value for name, value in given.items() if value is not None}


PAPER_MODELS = {
    "r1-qwen-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "r1-qwen-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "r1-0528-qwen3-8b": "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
}
"""The paper's models by preset name."""

PRESETS = (*PAPER_MODELS, EMBEDDED, "lora")
"""All names; ``lora`` is the paper's setting for an adapter on any model."""

_SIMPO_BETA, _SIMPO_GAMMA = 2.5, 1.0  # Table 7, all three models
_DPO_BETA = 0.01  # Table 6, all three models
_BVPO_BETA = {"r1-qwen-7b": 0.01, "r1-qwen-1.5b": 0.01, "r1-0528-qwen3-8b": 0.1}  # Table 8
_LEARNING_RATE = 7e-7  # Tables 6 to 8, all models and methods


def preset(name: str, method: Method) -> Preset:
    """The settings of a name and a method.

    Args:
        name: One of :data:`PRESETS`.
        method: ``dpo``, ``simpo`` or ``bvpo``.

    Raises:
        UserError: Unknown name or method.

    >>> found = preset("r1-0528-qwen3-8b", "bvpo")
    >>> found.beta, found.learning_rate, found.batch_size, found.alpha
    (0.1, 7e-07, 128, 0.5)
    """
    if method not in METHODS:
        raise UserError(f"`method={method!r}`: choose {', '.join(METHODS)}.")
    if name not in PRESETS:
        raise UserError(f"`preset={name!r}`: choose {', '.join(PRESETS)}.")
    alpha = 0.5 if method == "bvpo" else 1.0
    loss, beta, gamma = "sigmoid", _BVPO_BETA.get(name, 0.1), 0.0
    if method == "dpo":
        beta = _DPO_BETA if name in PAPER_MODELS else 0.1
    if method == "simpo":
        loss, beta, gamma = "simpo", _SIMPO_BETA, _SIMPO_GAMMA
    if name == EMBEDDED:
        # A model of a million weights takes small batches and large steps; its sequences have tens of tokens.
        return Preset(EMBEDDED, loss, beta, gamma, 1e-4, lora_r=16, batch_size=32, max_length=512, alpha=alpha)
    if name == "lora":
        # An adapter takes steps ten times as large as full fine-tuning, as TRL's documentation has it for DPO.
        return Preset(None, loss, beta, gamma, 10 * _LEARNING_RATE, lora_r=16, alpha=alpha)
    # Steps of 7e-7 are lost in bfloat16 weights: they are float32, and only the arithmetic is bfloat16.
    return Preset(PAPER_MODELS[name], loss, beta, gamma, _LEARNING_RATE, alpha=alpha, bf16=True)
