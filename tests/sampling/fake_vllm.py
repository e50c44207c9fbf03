"""A stand-in for vLLM's public interface, as vLLM 0.10 to 0.32 document it: the same classes, arguments and returns.

vLLM itself needs a GPU and pins torch, so it is not among the tests' requirements.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass
class Logprob:
    """As vllm.logprobs.Logprob."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """As vllm.CompletionOutput."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """As vllm.RequestOutput."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class SamplingParams:
    """As vllm.SamplingParams, of what is used here."""

    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class EngineArgs:
    """As vllm.EngineArgs, of what is used here."""

    model: str
    dtype: str = "auto"
    seed: int | None = None
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    trust_remote_code: bool = False
    generation_config: str = "auto"
    enable_prefix_caching: bool | None = None
    disable_log_stats: bool = False
    logprobs_mode: str = "raw_logprobs"


Writer = Callable[[list[int], SamplingParams], CompletionOutput]
"""From the prompt and the parameters to the completion."""


@dataclass
class Engine:
    """As vllm.LLMEngine: requests go in, every step finishes the oldest two."""

    arguments: EngineArgs
    write: Writer
    waiting: list[tuple[str, list[int], SamplingParams]] = field(default_factory=list)
    most_waiting: int = 0
    fails_at: int | None = None
    steps: int = 0

    def add_request(self, request_id: str, prompt: Any, params: SamplingParams) -> None:
        ids = prompt["prompt_token_ids"]
        if len(ids) >= (self.arguments.max_model_len or 10**9):
            raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length")
        assert request_id not in [name for name, *_ in self.waiting]
        self.waiting.append((request_id, ids, params))
        self.most_waiting = max(self.most_waiting, len(self.waiting))

    def step(self) -> list[RequestOutput]:
        self.steps += 1
        if self.steps == self.fails_at:
            raise RuntimeError("EngineCore encountered an issue.\nSee stack trace")
        done, self.waiting = self.waiting[:2], self.waiting[2:]
        outputs = [RequestOutput(name, None, ids, [self.write(ids, params)], True) for name, ids, params in done]
        return outputs + [RequestOutput(name, None, ids, [], False) for name, ids, _ in self.waiting]


def fake_vllm(
    write: Writer, *, newest: bool = True, refuses: str = "", positions: int = 10**6, fails_at: int | None = None
) -> Any:
    """A module to put in vLLM's place; ``module.engines`` holds the engines that were started.

    Args:
        write: Who writes the completions.
        newest: Whether log-probabilities of the draw itself can be asked for.
        refuses: Why no model can be loaded.
        positions: Longest context of the model.
        fails_at: Step at which an engine dies.
    """
    module: Any = ModuleType("vllm")
    module.engines = []

    def arguments(**given: Any) -> EngineArgs:
        if not newest and "logprobs_mode" in given:
            raise TypeError("EngineArgs.__init__() got an unexpected keyword argument 'logprobs_mode'")
        inspect.signature(EngineArgs).bind(**given)
        return EngineArgs(**given)

    class LLMEngine:
        @staticmethod
        def from_engine_args(engine_args: EngineArgs) -> Engine:
            if refuses:
                raise RuntimeError(refuses)
            if (engine_args.max_model_len or 0) > positions:
                raise ValueError(
                    f"User-specified max_model_len ({engine_args.max_model_len}) is greater than {positions}"
                )
            module.engines.append(Engine(engine_args, write, fails_at=fails_at))
            return module.engines[-1]

    module.EngineArgs, module.LLMEngine, module.SamplingParams = arguments, LLMEngine, SamplingParams
    module.TokensPrompt = dict  # a TypedDict there
    return module
