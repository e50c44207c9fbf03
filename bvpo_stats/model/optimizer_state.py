"""Adam's second moments from a training checkpoint, without running anything that the file may contain."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from bvpo_stats.errors import UserError
from bvpo_stats.model.subset import Subset

_FILES = ("optimizer.safetensors", "optimizer.pt", "optimizer.bin")
_KEY = "exp_avg_sq"


def read_second_moments(path: Path, subset: Subset) -> dict[str, Float[np.ndarray, " parameters"]]:
    """Adam's ``exp_avg_sq`` of every weight of a subset, flat.

    Two forms are read: safetensors whose keys are parameter names, alone or followed by ``.exp_avg_sq``; and
    ``optimizer.pt`` as torch optimizers save it, loaded with ``weights_only`` so that no code in it can run. The latter
    knows weights by number only: its trainable weights must be those of the subset, in the model's order.

    Args:
        path: The file, or the checkpoint folder that holds it.
        subset: The parameters.

    Raises:
        UserError: No such file, a file that wants to run code, no Adam state in it, or weights that do not match.
    """
    if path.is_dir():
        found = next((path / name for name in _FILES if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"`optimizer_state={str(path)!r}`: the folder holds none of {', '.join(_FILES)}.")
        path = found
    if not path.is_file():
        raise UserError(f"`optimizer_state={str(path)!r}`: no such file.")
    moments = _from_safetensors(path) if path.suffix == ".safetensors" else _from_torch(path, subset)
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
    return result


def _from_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"`optimizer_state={str(path)!r}`: cannot be read ({str(error).splitlines()[0]}).") from error
    wanted = {key: value for key, value in tensors.items() if key.endswith(f".{_KEY}")}
    return {key.removesuffix(f".{_KEY}"): value for key, value in (wanted or tensors).items()}


def _from_torch(path: Path, subset: Subset) -> dict[str, torch.Tensor]:
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
    if not isinstance(state, dict) or not all(isinstance(entry, dict) and _KEY in entry for entry in state.values()):
        raise UserError(f"`optimizer_state={str(path)!r}`: no Adam state ({_KEY}) in it.")
    if len(state) != len(subset.parameters):
        raise UserError(
            f"`optimizer_state={str(path)!r}`: the state of {len(state)} weights, but {len(subset.parameters)} are "
            "selected; select what was trained, or save the state as safetensors by parameter name."
        )
    return {name: state[key][_KEY] for name, key in zip(subset.parameters, sorted(state), strict=True)}
