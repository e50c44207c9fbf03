"""The optimizer's metric: a step is -eta P g with P diagonal, read from the optimizer's own state.

| state of a weight | optimizers | P |
|---|---|---|
| ``exp_avg_sq`` | Adam, AdamW, NAdam, RAdam, AdamW of transformers and bitsandbytes in 32 bits | 1 / (sqrt(v / (1 -
beta_2^k)) + eps) |
| ``square_avg`` | RMSprop | 1 / (sqrt(v) + eps) |
| ``sum`` | Adagrad | 1 / (sqrt(v) + eps) |
| ``momentum_buffer``, or nothing | SGD | 1 |

Anything else (quantised or factored moments, sharded state) has no such diagonal to read; SGD's metric stands in, and
the report says so. A state on disk, of a checkpoint, is read the same way.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bvpo_stats.distributed import own_part
from bvpo_stats.errors import UserError
from bvpo_stats.model.subset import Subset

_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
_PLAIN = {"momentum_buffer"}


def optimizer_metric(optimizer: Any, weights: Sequence[Tensor]) -> tuple[Float[Tensor, " parameters"] | None, str]:
    """P at the present state, for weights strung together, and its name in a sentence.

    Args:
        optimizer: A torch optimizer, wrapped by accelerate or not.
        weights: The trained weights.

    Returns:
        None for the identity. Of sharded weights, this process's part.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    name, state = type(inner).__name__, getattr(inner, "state", {})
    groups = {weight: group for group in getattr(inner, "param_groups", []) for weight in group["params"]}
    pieces: list[Tensor | None] = []
    for weight in weights:
        own, group = state.get(weight, {}), groups.get(weight, {})
        moments = _second_moments(own)
        if set(own) <= _PLAIN and "momentum" in group:
            pieces.append(None)
        elif moments is None or moments.shape != weight.shape:
            return None, f"that of SGD, for {name} has no second moments of single weights to read"
        else:
            pieces.append(_diagonal(own, group, moments))
    if all(piece is None for piece in pieces):
        return None, f"that of {name}: the identity"
    if any(piece is None for piece in pieces):
        return None, f"that of SGD, for {name} has second moments of some weights only"
    return torch.cat([piece for piece in pieces if piece is not None]), f"that of {name}: 1 / (sqrt(v) + eps)"


def _second_moments(own: dict[str, Any]) -> Tensor | None:
    """V in the state of one weight; None where it has none in whole numbers a weight."""
    moments = next((own[key] for key in _MOMENTS if key in own), None)
    return moments if isinstance(moments, Tensor) and moments.is_floating_point() else None


def _diagonal(own: dict[str, Any], group: dict[str, Any], moments: Tensor) -> Tensor:
    return 1 / (own_part(_corrected(own, group, moments)).flatten().sqrt() + float(group.get("eps", 1e-8)))


def _corrected(own: dict[str, Any], group: dict[str, Any], moments: Tensor) -> Tensor:
    """V as a step divides by it: the largest so far with amsgrad, freed of its start at 0 where the state says how."""
    second: Tensor = own.get("max_exp_avg_sq", moments).to(torch.promote_types(moments.dtype, torch.float32))
    if "exp_avg_sq" in own and "step" in own and "betas" in group:
        beta = float(group["betas"][1])
        second = second / (1 - beta ** max(float(own["step"]), 1.0))
    return second


class UnreadableMetricError(UserError):
    """A whole and harmless optimizer state that has no second moments of single weights."""


_FILES = ("optimizer.safetensors", "optimizer.pt", "optimizer.bin")


def read_second_moments(path: Path, subset: Subset) -> tuple[dict[str, Float[np.ndarray, " parameters"]], float]:
    """The second moments v of every weight of a subset, flat, as the optimizer's next step divides by them, and eps.

    Two forms are read: safetensors whose keys are parameter names, alone or followed by ``.exp_avg_sq``, taken as they
    are; and ``optimizer.pt`` as torch optimizers save it, loaded with ``weights_only`` so that no code in it can run.
    The latter knows weights by number only: its trainable weights must be those of the subset, in the model's order. It
    knows how many steps it has seen, so Adam's v is freed of its start at 0 (a factor of 50 after 20 steps).

    Args:
        path: The file, or the checkpoint folder that holds it.
        subset: The parameters.

    Raises:
        UserError: No such file, a file that wants to run code, or weights that do not match.
        UnreadableMetricError: A state without such moments (SGD's, quantised or factored ones).
    """
    if path.is_dir():
        found = next((path / name for name in _FILES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"`optimizer_state={str(path)!r}`: the folder holds none of {', '.join(_FILES)}.")
        path = found
    if not path.is_file():
        raise UserError(f"`optimizer_state={str(path)!r}`: no such file.")
    moments, epsilon = (_from_safetensors(path), 1e-8) if path.suffix == ".safetensors" else _from_torch(path, subset)
    result = {}
    for name, weight in subset.parameters.items():
        value = moments.get(name)
        if value is None:
            raise UserError(f"`optimizer_state={str(path)!r}`: no second moments of {name}; another model's state?")
        if value.shape != weight.shape:
            raise UserError(
                f"`optimizer_state={str(path)!r}`: {name} has shape {tuple(value.shape)} there and "
                f"{tuple(weight.shape)} in the model; is it another model's state?"
            )
        result[name] = value.double().cpu().numpy().reshape(-1)
    return result, epsilon


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"`optimizer_state={str(path)!r}`: cannot be read ({str(error).splitlines()[0]}).") from error
    wanted = {key: value for key, value in tensors.items() if key.endswith(f".{_MOMENTS[0]}")}
    return {key.removesuffix(f".{_MOMENTS[0]}"): value for key, value in (wanted or tensors).items()}


def _from_torch(path: Path, subset: Subset) -> tuple[dict[str, Tensor], float]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"`optimizer_state={str(path)!r}`: the file asks to run code when it is read, or is damaged; it was "
            "refused. Save the state as safetensors (parameter name to exp_avg_sq)."
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, ... for files that are none of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"`optimizer_state={str(path)!r}`: cannot be read ({reason}).") from error
    state = loaded.get("state") if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(entry, dict) for entry in state.values()):
        raise UserError(f"`optimizer_state={str(path)!r}`: this is no state of a torch optimizer.")
    listed = loaded.get("param_groups") or []
    groups = {number: group for group in listed for number in group.get("params", [])}
    found = {}
    for number in sorted(state):
        own = state[number]
        moments = _second_moments(own)
        if moments is None:
            raise UnreadableMetricError(
                f"`optimizer_state={str(path)!r}`: no Adam state (exp_avg_sq) in it, but {', '.join(own) or 'nothing'}."
            )
        found[number] = _corrected(own, groups.get(number, {}), moments)
    if not found:
        raise UnreadableMetricError(f"`optimizer_state={str(path)!r}`: the state is empty; no step was taken with it.")
    if len(found) != len(subset.parameters):
        raise UserError(
            f"`optimizer_state={str(path)!r}`: the state of {len(found)} weights, but {len(subset.parameters)} are "
            "selected; select what was trained, or save the state as safetensors by parameter name."
        )
    epsilon = max((float(group.get("eps", 1e-8)) for group in listed), default=1e-8)
    return dict(zip(subset.parameters, found.values(), strict=True)), epsilon
