"""Sampling with vLLM in this process, for users without a server: continuous batching, one seed a draw.

Prompts go in as token ids and completions come out as token ids, so nothing can be lost between text and tokens. vLLM
is an extra (``pip install bvpo-stats[vllm]``), best in an environment of its own, since it pins torch and transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import PolicyOptions, ServedPolicy, content_identity, model_source
from bvpo_stats.records import FinishReason
from bvpo_stats.sampling.engines.base import (
    Outcome,
    Request,
    SamplingOptions,
    SetAside,
    VllmOptions,
    draw_seed,
    whole_draw,
)

_PROCESSED = {"logprobs_mode": "processed_logprobs"}  # of the draw: behind temperature and nucleus


class VllmEngine:
    """Draws completions with vLLM's own engine loop.

    Args:
        policy: Tokenizer, template and end-of-sequence tokens.
        model: Which model vLLM loads.
        options: How.
        longest: Most tokens of a prompt and its response; None for the model's own limit.

    Raises:
        UserError: vLLM is not installed, or cannot load the model.
    """

    name = "vllm"
    top_k = 0
    whole_batches = False  # vLLM batches as it likes, and rounding goes with it: there is no bit to keep

    def __init__(
        self, policy: ServedPolicy, model: PolicyOptions, options: VllmOptions, longest: int | None = None
    ) -> None:
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                "`engine='vllm'` needs vLLM: pip install 'bvpo-stats[vllm]', in an environment of its own; or start a "
                "server elsewhere and take `engine='openai'`."
            ) from error
        self._vllm: Any = vllm
        self._policy, self._options = policy, options
        source = model_source(model.model)
        self.model = content_identity(model.model, source, None)
        settings = {
            "model": source,
            "dtype": model.dtype,
            "seed": 0,
            "tensor_parallel_size": options.tensor_parallel,
            "gpu_memory_utilization": options.gpu_memory,
            "trust_remote_code": model.trust_remote_code,
            "generation_config": "vllm",  # not the model's: its top-k and penalties would change the distribution
            "enable_prefix_caching": True,  # the samples of a prompt share it
            "disable_log_stats": True,
        }
        # what a run needs, so that the cache need not hold the model's longest context; the model's own where that is
        # shorter, and the model's own words for log-probabilities where an older vLLM knows no other
        attempts = [
            (limit, extra)
            for extra in (_PROCESSED, {})
            for limit in ({"max_model_len": longest} if longest else {}, {})
        ]
        failure: Exception | None = None
        for limit, extra in attempts:
            try:
                self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**settings, **limit, **extra))
            except TypeError as error:  # no such argument
                failure = error
            except ValueError as error:  # no such length
                failure = error
                if not limit:
                    break
            except Exception as error:
                failure = error
                break
            else:
                self._says_q = bool(extra)
                return
        raise UserError(f"vLLM cannot load {model.model}: {_first_line(failure)}") from failure

    def draw(
        self, batches: Iterable[Sequence[Request]], options: SamplingOptions
    ) -> Iterator[list[tuple[Request, Outcome]]]:
        """Draws in the order in which vLLM finishes; batches do not matter."""
        requests = chain.from_iterable(batches)
        flying: dict[str, Request] = {}
        while True:
            ready: list[tuple[Request, Outcome]] = []
            while len(flying) < self._options.in_flight and (request := next(requests, None)) is not None:
                prompt = self._vllm.TokensPrompt(prompt_token_ids=list(request.prompt_ids))
                try:
                    self._engine.add_request(request.key, prompt, self._parameters(request, options))
                except ValueError as error:  # e.g. the prompt leaves no room for a response
                    ready.append((request, SetAside("refused", _first_line(error))))
                else:
                    flying[request.key] = request
            if not flying and not ready:
                return
            if flying:
                try:
                    finished = [output for output in self._engine.step() if output.finished]
                except Exception as error:
                    raise UserError(
                        f"vLLM has stopped ({_first_line(error)}). Run the same command again: it goes on where it "
                        "stopped."
                    ) from error
                for output in finished:
                    request = flying.pop(output.request_id)
                    ready.append((request, self._outcome(output, request, options)))
            if ready:
                yield ready

    def _parameters(self, request: Request, options: SamplingOptions) -> Any:
        return self._vllm.SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=-1,
            min_p=0.0,
            repetition_penalty=1.0,
            max_tokens=options.max_new_tokens,
            seed=draw_seed(request.key, options.seed),
            stop_token_ids=list(self._policy.eos_ids),
            logprobs=0,  # of the sampled tokens alone
            detokenize=False,
        )

    def _outcome(self, output: Any, request: Request, options: SamplingOptions) -> Outcome:
        (completion,) = output.outputs
        ids = tuple(int(token) for token in completion.token_ids)
        eos_ids = self._policy.eos_ids
        if output.prompt_token_ids is not None and tuple(output.prompt_token_ids) != request.prompt_ids:
            return SetAside("prompt-differs", "vLLM reads the prompt as other token ids")
        if completion.finish_reason not in ("stop", "length"):
            return SetAside("finish-reason", f"ended for the reason {completion.finish_reason!r}")
        ended = ids[-1:] != () and ids[-1] in eos_ids
        if completion.finish_reason == "stop" and not ended:
            if completion.stop_reason is not None and completion.stop_reason not in eos_ids:
                return SetAside("finish-reason", f"stopped at {completion.stop_reason!r}, which ends no response")
            ids, ended = (*ids, eos_ids[0]), True
        reason: FinishReason = "stop" if ended else "length"
        return whole_draw(ids, reason, self._policy.template.vocabulary, self._logps(completion, options))

    def _logps(self, completion: Any, options: SamplingOptions) -> list[float | None] | None:
        """Log-probability of each token under the draw; None where this vLLM gives those of another temperature."""
        if completion.logprobs is None or not (self._says_q or options.plain):
            return None
        tokens = zip(completion.token_ids, completion.logprobs, strict=False)
        found = [places.get(token) for token, places in tokens]
        return [None if each is None else float(each.logprob) for each in found]


def _first_line(error: BaseException | None) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
