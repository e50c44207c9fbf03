"""Which model to load, and how: what a configuration says of it, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from bvpo_stats.embedded.assets import EMBEDDED as EMBEDDED
from bvpo_stats.errors import check_kind
from bvpo_stats.options import Option, check_options


@dataclass(frozen=True)
class PolicyOptions:
    """What to load and how.

    Attributes:
        model: ``embedded``, a folder, or a hub id.
        adapter: Folder or hub id of a PEFT adapter.
        device: ``auto`` (CUDA where present), ``cpu``, ``cuda``, ``cuda:1``, ...
        dtype: ``auto`` (float32 on CPU, the checkpoint's on an accelerator) or a type's name.
        template: Overrides the template protocol.
        empty_trace: Overrides the spelling of the empty trace.
        trust_remote_code: Runs code shipped with the model. Off unless the user says so.
        attention: Attention implementation of transformers, None for its default.
    """

    model: Annotated[str, Option("Model folder or hub id; `embedded` is the small model shipped with the package.")] = (
        EMBEDDED
    )
    adapter: Annotated[str | None, Option("PEFT adapter, folder or hub id, put on top of the model.")] = None
    device: Annotated[str, Option("auto, cpu, cuda, cuda:1, ...")] = "auto"
    dtype: Annotated[str, Option("auto, float64, float32, bfloat16 or float16.")] = "auto"
    template: Annotated[
        str | None,
        Option(
            "Prompt protocol: r1-distill, r1-0528, deepseek-v3.1, qwen3, qwen3-thinking or embedded.",
            shown="by the chat template",
        ),
    ] = None
    empty_trace: Annotated[
        str | None,
        Option("Spelling of an empty trace, e.g. '<think></think>'; \\n is a newline.", shown="by the protocol"),
    ] = None
    trust_remote_code: Annotated[bool, Option("Run code shipped with the model.")] = False
    attention: str | None = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.attention is not None:
            check_kind("attention", self.attention, str, "a text")
