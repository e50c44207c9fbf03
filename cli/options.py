"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bvpo_stats.errors import UserError

if TYPE_CHECKING:
    from bvpo_stats.model.policy import PolicyOptions
    from bvpo_stats.records import Mode
    from bvpo_stats.sampling.engines.server import ServerOptions

_POLICY = ("adapter", "device", "dtype", "template", "empty_trace", "trust_remote_code")
_SERVER = ("base_url", "api_key_env", "served_model", "endpoint", "concurrency", "timeout", "retries")


def _read_config(context: typer.Context, value: Path | None) -> Path | None:
    """Makes a YAML file's values the defaults of the command; options on the command line win."""
    if value is None:
        return None
    import yaml

    try:
        loaded: Any = yaml.safe_load(value.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {value}: cannot be read as YAML ({str(error).splitlines()[0]}).") from error
    if not isinstance(loaded, dict):
        raise UserError(f"--config {value}: must map option names to values, e.g. `samples: 5`.")
    options = {str(key).replace("-", "_").lstrip("_"): entry for key, entry in loaded.items()}
    known = {parameter.name for parameter in context.command.params} - {"config"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(f"--config {value}: unknown options {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")
    context.default_map = options
    return value


Model = Annotated[
    str, typer.Option(help="Model folder or hub id; `embedded` is the small model shipped with the package.")
]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter, folder or hub id, put on top of the model.")]
Prompts = Annotated[
    str, typer.Option(help="JSONL file with a field `prompt`, a dataset's folder or hub id, or `embedded`.")
]
PromptSplit = Annotated[str, typer.Option(help="Split of a dataset given as --prompts.")]
Samples = Annotated[int, typer.Option(help="Responses per prompt and mode.")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature.")]
TopP = Annotated[
    float, typer.Option(help="Nucleus mass; 1 is off (anything less makes g_t biased even at the reference).")
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Cut responses at this many tokens.", show_default="256 embedded, else 4096"),
]
BatchSize = Annotated[
    str, typer.Option(help="Responses drawn at once: a number or `auto`. Does not change the results.")
]
Seed = Annotated[int, typer.Option(help="Decides every random draw.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float64, float32, bfloat16 or float16.")]
Template = Annotated[
    str | None,
    typer.Option(help="Prompt protocol: r1-distill, r1-0528, qwen3 or embedded.", show_default="by the chat template"),
]
EmptyTrace = Annotated[
    str | None,
    typer.Option(help="Spelling of an empty trace, e.g. '<think></think>'.", show_default="by the protocol"),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code shipped with the model.")]
Limit = Annotated[int | None, typer.Option(help="Use only the first so many prompts.")]
BaseUrl = Annotated[
    str | None, typer.Option(help="Address of the server, e.g. http://localhost:8000/v1 (openai engine).")
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(help="Environment variable that holds the server's API key.", show_default="no key is sent"),
]
ServedModel = Annotated[
    str | None, typer.Option(help="The server's name for the model.", show_default="the one model that it lists")
]
Endpoint = Annotated[str, typer.Option(help="auto, completions or chat (chat only where it gives exact prompts).")]
Concurrency = Annotated[int, typer.Option(help="Requests to the server in flight at once.")]
Timeout = Annotated[float, typer.Option(help="Seconds for one answer of the server.")]
Retries = Annotated[int, typer.Option(help="Repetitions of a failed request before the run gives up.")]
ShardOption = Annotated[
    str, typer.Option("--shard", help="Draw part i of n only, e.g. 1/4; the same --output holds all of them.")
]
Output = Annotated[Path, typer.Option(help="Folder for the results; the same folder again resumes the run.")]
Config = Annotated[
    Path | None,
    typer.Option(
        help="YAML file with any of these options; the command line wins.", callback=_read_config, is_eager=True
    ),
]


def policy_options(context: typer.Context) -> PolicyOptions:
    """The policy that a command's --model and its companions name.

    Args:
        context: Of a command that has all the options ``Model`` to ``TrustRemoteCode`` of this module.
    """
    from bvpo_stats.model.policy import EMBEDDED, PolicyOptions

    values = context.params
    return PolicyOptions(model=values["model"] or EMBEDDED, **{name: values[name] for name in _POLICY})


def max_new_tokens(value: int | None, model: str) -> int:
    """Reads ``--max-new-tokens``: left out, 256 for the embedded model with its short responses, else 4096."""
    if value is not None:
        return value
    return 256 if model == "embedded" else 4096


def modes(value: str) -> tuple[Mode, ...]:
    """Reads ``--mode``: thinking, nothinking or both."""
    from bvpo_stats.records import MODES

    if value == "both":
        return MODES
    if value not in MODES:
        raise UserError(f"--mode {value}: choose thinking, nothinking or both.")
    return tuple(known for known in MODES if known == value)


def server_options(context: typer.Context) -> ServerOptions | None:
    """The server behind ``--base-url`` and its companions; None without an address.

    Args:
        context: Of a command that has all the options ``BaseUrl`` to ``Retries`` of this module.
    """
    from bvpo_stats.sampling.engines.server import ServerOptions

    values = context.params
    return None if values["base_url"] is None else ServerOptions(**{name: values[name] for name in _SERVER})


def batch_size(value: str) -> int | None:
    """Reads ``--batch-size``: None for ``auto``."""
    if value == "auto":
        return None
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"--batch-size {value}: give a whole number of at least 1, or auto.")
    return int(value)
