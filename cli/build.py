"""How the command line speaks: fields of a configuration become options, in errors as in ``--help``."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption

from bvpo_stats.errors import UserError

# Fields whose options have names of their own.
_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "adapters": "adapter",
    "loss_type": "loss",
    "lr_scheduler_type": "scheduler",
    "method": "marginal",
    "modes": "mode",
    "n_prompts": "oracle_prompts",
    "n_samples": "samples",
    "n_symbols": "symbols",
    "num_train_epochs": "epochs",
    "precompute_ref_log_probs": "precompute_ref_logps",
    "r": "lora_r",
    "simpo_gamma": "gamma",
    "targets": "target_modules",
    "unmatched_prompts": "unmatched",
    "warmup_steps": "warmup",
}
_FIELD = re.compile(r"`([a-z]\w*)(?:=([^`]*))?`")


class Command(TyperCommand):
    """A command whose errors name its options, where those of the package name fields."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise UserError(in_options(str(error), self.fields)) from error

    @property
    def fields(self) -> dict[str, str]:
        """Option of each field."""
        options = {str(p.name): p.opts[0] for p in self.params if isinstance(p, TyperOption)}
        return {field: options[name] for field, name in _NAMES.items() if name in options} | options


def in_options(message: str, options: Mapping[str, str]) -> str:
    """Says a message about fields in options: ``limit=0`` between backticks becomes ``--limit 0``.

    What is no field of the command stays as it is.

    Args:
        message: Of a `UserError`.
        options: The option of each field.

    >>> in_options('`limit=0`: too few. Use `unmatched_prompts="drop"` or `verbose`.', {"limit": "--limit",
    ...     "unmatched_prompts": "--unmatched"})
    '--limit 0: too few. Use --unmatched drop or `verbose`.'
    """

    def spoken(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        if name not in options:
            return match[0]
        words = "" if value is None else _words(value)
        return options[name] + (f" {words}" if words else "")

    return _FIELD.sub(spoken, message)


def _words(value: str) -> str:
    try:
        read = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value  # inf, FILE, ...
    if read is True:
        return ""  # a flag
    if isinstance(read, list | tuple):
        return shlex.quote(",".join(map(str, read)))
    return shlex.quote(str(read))
