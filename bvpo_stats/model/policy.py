"""Loading a policy: causal LM, tokenizer, template protocol and, on top, an adapter."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from bvpo_stats.embedded.assets import EMBEDDED, embedded_model_path
from bvpo_stats.errors import UserError, check_kind
from bvpo_stats.model.head import causal_lm_of
from bvpo_stats.model.options import PolicyOptions as PolicyOptions
from bvpo_stats.model.subset import (
    LoraOptions,
    active_configs,
    check_adapter_config,
    create_lora,
    sharing_copy,
)
from bvpo_stats.model.templates import Template, find_template
from bvpo_stats.store.jsonl import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Policy:
    """A policy ready for use: evaluation mode, dropout off.

    Attributes:
        model: The causal LM, possibly wrapped by PEFT.
        tokenizer: Its fast tokenizer.
        template: The protocol bound to the tokenizer.
        identity: Name and content fingerprint; what records carry to tell models apart.
        eos_ids: Tokens that end a completion.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    identity: str
    eos_ids: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return torch.device(self.model.device)

    @property
    def pad_id(self) -> int:
        """Token for padding positions; they are always masked out."""
        return int(self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.eos_ids[0])

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the model has positions for, None where it has no limit.

        With LongRoPE the positions end where its frequencies change: transformers picks one set for a whole batch by
        its longest sequence, so that beyond it log pi of a sequence would depend on its neighbours, and on whether it
        was generated or read.
        """
        return self._positions()[0]

    @property
    def positions_end(self) -> str:
        """Why the positions end where they do, for messages."""
        return self._positions()[1]

    def _positions(self) -> tuple[int | None, str]:
        config, why = self.model.config, "max_position_embeddings of its config.json"
        most = getattr(config, "max_position_embeddings", None)
        ropes = getattr(config, "rope_parameters", None) or {}
        nested = [value for value in ropes.values() if isinstance(value, dict)]  # one for each kind of layer
        for rope in nested or [ropes]:
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            if rope.get("rope_type") in ("longrope", "dynamic") and original and (most is None or original < most):
                most, why = original, f"where the frequencies of its {rope['rope_type']} positions change"
        return most, why

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter to disable."""
        return hasattr(self.model, "disable_adapter")

    @property
    def at_reference(self) -> bool:
        """Whether theta = theta_ref: no adapter, or an active LoRA adapter whose B are all zero, as a new one's are."""
        if not self.has_adapter:
            return True
        modules: Any = self.model.modules()
        layers = [module for module in modules if hasattr(module, "lora_B") and hasattr(module, "active_adapters")]
        others = ("modules_to_save", "trainable_token_indices")  # move the policy whatever B is
        if any(getattr(config, name, None) for config in active_configs(self.model) for name in others):
            return False
        bs = [layer.lora_B[name] for layer in layers for name in layer.active_adapters if name in layer.lora_B]
        weights = [weight for b in bs for weight in (b.weight, b.bias) if weight is not None]
        return bool(weights) and not any(bool(weight.any()) for weight in weights)

    @contextlib.contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The reference policy: the same weights with the adapter disabled (the model itself where there is none)."""
        model: Any = self.model
        if hasattr(model, "disable_adapter"):
            trained = [(weight, weight.requires_grad) for weight in model.parameters()]
            try:
                with model.disable_adapter():
                    yield self.model
            finally:
                for weight, was in trained:  # PEFT marks all of an adapter that it enables
                    if weight.requires_grad != was:
                        weight.requires_grad_(was)
        else:
            yield self.model


def load_policy(
    model: str | PolicyOptions | PreTrainedModel = EMBEDDED,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    lora: int | LoraOptions | None = None,
    adapter: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    template: str | None = None,
    empty_trace: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> Policy:
    """A policy, from safetensors weights or around a model that is loaded already.

    Args:
        model: ``embedded``, a folder, a hub id; a transformers causal LM, wrapped by PEFT or not, which goes by its
            content (`loaded_identity`); or all of this as `PolicyOptions`, which leave ``lora`` alone to be said here.
        tokenizer: The fast tokenizer of a loaded model.
        lora: A new LoRA adapter on top: its rank, or `LoraOptions`; None for none.
        adapter: Folder or hub id of a PEFT adapter.
        dtype: ``auto`` (float32 on a CPU, the checkpoint's on an accelerator; a loaded model's own) or one of
            :data:`DTYPES`.
        device: ``auto`` (CUDA where present; where a loaded model is), ``cpu``, ``cuda``, ``cuda:1``, ...
        template: Overrides the template protocol.
        empty_trace: Overrides the spelling of the empty trace.
        trust_remote_code: Runs code shipped with the model.
        attention: Attention implementation of transformers, None for its default.

    Raises:
        UserError: Missing or unreadable model, weights that are not safetensors, unknown dtype or device, no tokenizer
            or one without a usable template, or an adapter that does not fit.

    Example:
        >>> policy = load_policy("embedded", lora=4, device="cpu")
        >>> policy.at_reference
        True
    """
    named = isinstance(model, str)
    options = PolicyOptions(  # complains about what cannot be, for a loaded model too
        str(model) if named else EMBEDDED, adapter, device, dtype, template, empty_trace, trust_remote_code, attention
    )
    if isinstance(model, (str, PolicyOptions)):
        policy = _load(options if named else cast(PolicyOptions, model))
        if tokenizer is not None:
            policy = with_tokenizer(policy, tokenizer)
    else:
        if not hasattr(model, "parameters") or not hasattr(model, "config"):
            raise UserError(
                f"`model` must be a name, a folder or a transformers causal LM, not a {type(model).__name__}."
            )
        policy = _wrap(model, tokenizer, template, empty_trace)
        if dtype != "auto":
            policy.model.to(_dtype(dtype, device))  # type: ignore[arg-type]
            if dtype == "float64" and hasattr(policy.model, "set_experts_implementation"):
                policy.model.set_experts_implementation("eager")  # as in _load
        if device != "auto":
            policy.model.to(pick_device(device))  # type: ignore[arg-type]
        if adapter is not None:
            adapted: Any = _add_adapter(sharing_copy(policy.model), adapter)
            identity = f"{policy.identity}+{content_identity(adapter, adapter, None)}"
            policy = replace(policy, model=adapted.requires_grad_(False).eval(), identity=identity)
    if lora is None:
        return policy
    check_kind("lora", lora, (int, LoraOptions), "a rank or LoraOptions")
    return with_lora(policy, LoraOptions(r=lora) if isinstance(lora, int) else lora)


def as_policy(policy: Policy | str) -> Policy:
    """A policy as it is, or the one of that name.

    Raises:
        UserError: Neither, or as in `load_policy`.
    """
    if isinstance(policy, str):
        return load_policy(policy)
    if not isinstance(policy, Policy):
        raise UserError(f"`policy` must be a Policy, not a {type(policy).__name__}: make one with load_policy(...).")
    return policy


def with_lora(policy: Policy, options: LoraOptions | None = None) -> Policy:
    """The policy with a new LoRA adapter, at theta_ref since B = 0; the given policy goes on without it.

    Raises:
        UserError: As in `create_lora`.
    """
    return replace(policy, model=create_lora(policy.model, options or LoraOptions()))


def _load(options: PolicyOptions) -> Policy:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = model_source(options.model)
    device, dtype = pick_device(options.device), _dtype(options.dtype, options.device)
    if options.adapter is not None:
        _check_adapter_files(options.adapter)
    common: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if dtype == torch.float64:
        common["experts_implementation"] = "eager"  # the grouped products of mixtures of experts know no float64
    model: Any
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=options.trust_remote_code)
    except Exception as error:
        raise load_error(options.model, error) from error
    template = find_template(tokenizer, name=options.template, empty_trace=options.empty_trace)  # before the weights
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=options.attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **common,
            )
    except Exception as error:
        raise load_error(options.model, error) from error
    model, found = loaded
    check_loaded(f"`model={options.model!r}`", model, found)
    eos_ids = _eos_ids(model, tokenizer)
    words = model.get_input_embeddings().weight.shape[0]
    if max(*template.prompt_ids("probe", "nothinking"), *eos_ids) >= words:
        raise UserError(
            f"`model={options.model!r}`: its tokenizer uses ids beyond the model's {words} embeddings; they do not "
            "belong together."
        )
    identity = content_identity(options.model, source, model)
    if options.adapter is not None:
        model = _add_adapter(model, options.adapter)
        identity += f"+{content_identity(options.adapter, options.adapter, None)}"
    # Sampling parameters shipped with a model (top_k, repetition_penalty, ...) would silently change the distribution
    # that is sampled from; every setting of a run is explicit instead.
    model.generation_config = GenerationConfig()
    model.requires_grad_(False)
    template = replace(template, words=words, eos_ids=eos_ids)
    return Policy(model.to(device).eval(), tokenizer, template, identity, eos_ids)


def on_own_device(options: PolicyOptions, local_rank: int, processes: int) -> PolicyOptions:
    """The options with each process of a machine on its own GPU, where the choice was left to us.

    Args:
        options: What to load.
        local_rank: Number of this process on its machine.
        processes: Number of processes in all.
    """
    if processes == 1 or options.device != "auto" or not torch.cuda.is_available():
        return options
    return replace(options, device=f"cuda:{local_rank % torch.cuda.device_count()}")


def _wrap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, template: str | None, empty_trace: str | None
) -> Policy:
    from transformers import GenerationConfig

    if tokenizer is None:
        raise UserError(
            "A model that is loaded already needs its tokenizer beside it (`tokenizer`; in a trainer "
            "`processing_class`)."
        )
    _check_tokenizer(tokenizer)
    for config in active_configs(model):
        check_adapter_config(config, "The model's adapter")
    eos_ids = _eos_ids(model, tokenizer)
    model.generation_config = GenerationConfig()
    identity = loaded_identity(model, tokenizer)
    protocol = find_template(tokenizer, name=template, empty_trace=empty_trace)
    embeddings: Any = model.get_input_embeddings()
    words = int(embeddings.weight.shape[0])
    return Policy(model.eval(), tokenizer, replace(protocol, words=words, eos_ids=eos_ids), identity, eos_ids)


def with_tokenizer(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """The policy with another tokenizer, and the template that belongs to it.

    Raises:
        UserError: It is no tokenizer, or has no usable template.
    """
    _check_tokenizer(tokenizer)
    template = replace(find_template(tokenizer), words=policy.template.words, eos_ids=policy.eos_ids)
    name, at, content = policy.identity.partition("@")
    if _tokenizer_content(tokenizer) != _tokenizer_content(policy.tokenizer):
        both = json.dumps([content, _tokenizer_content(tokenizer)]).encode()
        content = f"{hashlib.sha256(both).hexdigest()[:12]}{content[12:]}"
    return replace(policy, tokenizer=tokenizer, template=template, identity=f"{name}{at}{content}")


def _check_tokenizer(tokenizer: object) -> None:
    from transformers import PreTrainedTokenizerBase

    check_kind("tokenizer", tokenizer, PreTrainedTokenizerBase, "a transformers tokenizer")


@contextlib.contextmanager
def with_adapter(policy: Policy, adapter: str) -> Iterator[Policy]:
    """The policy with an adapter on top, which is taken off again at the end: several adapters share one base.

    Args:
        policy: A policy without an adapter.
        adapter: Folder or hub id of a PEFT adapter.

    Yields:
        What :func:`load_policy` gives for the same model and adapter.

    Raises:
        UserError: The adapter does not fit.
    """
    model: Any = _add_adapter(policy.model, adapter)
    model.requires_grad_(False)
    identity = f"{policy.identity}+{content_identity(adapter, adapter, None)}"
    try:
        yield replace(policy, model=model.to(policy.device).eval(), identity=identity)
    finally:
        model.unload()


def load_template(options: PolicyOptions) -> Template:
    """The template alone: reads the tokenizer and leaves the weights where they are.

    Raises:
        UserError: Missing or unreadable tokenizer, or one without a usable template.
    """
    return load_served_policy(options).template


def model_source(model: str) -> str:
    """The folder or hub id behind a ``--model`` value.

    Raises:
        UserError: It looks like a folder and is none.
    """
    if model == EMBEDDED:
        return str(embedded_model_path())
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"`model={model!r}`: the folder has no config.json, so it holds no transformers model.")
        return str(path)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise UserError(f"`model={model!r}`: no such folder. Give a model folder, a hub id, or leave it out.")
    return model


def load_error(model: str, error: Exception) -> UserError:
    """What a user can do about an exception of transformers on loading a model.

    Args:
        model: As it was asked for.
        error: The exception.
    """
    reason = _first_line(error)
    if "trust_remote_code" in str(error):
        return UserError(f"`model={model!r}` ships its own code. Trust it? Allow it: `trust_remote_code=True`.")
    if "safetensors" in str(error):
        return UserError(f"`model={model!r}`: no safetensors weights ({reason}). Convert them with save_pretrained.")
    if isinstance(
        error, (TypeError, KeyError, AttributeError, IndexError)
    ):  # of transformers' code, on such a config.json
        return UserError(
            f"Cannot load `model={model!r}`: transformers cannot build a model from its config.json "
            f"({type(error).__name__}: {reason}). Is its `model_type` right, and is it whole?"
        )
    return UserError(f"Cannot load `model={model!r}`: {reason} Check the name, the folder's files, and hub access.")


def _add_adapter(model: Any, adapter: str) -> PreTrainedModel:
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    _check_adapter_files(adapter)
    try:
        with warnings.catch_warnings():
            # FutureWarning: between PEFT and transformers. UserWarning: weights that find no place, refused below.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            adapted = PeftModel.from_pretrained(model, adapter, is_trainable=False)
            stored, placed = set(load_peft_weights(adapter, device="cpu")), set(get_peft_model_state_dict(adapted))
        if stored != placed:
            odd = min(stored ^ placed)
            there = "the adapter has" if odd in stored else "the model has a place for"
            raise ValueError(f"{len(stored ^ placed)} weights do not correspond, e.g. {there} {odd}.")
        return adapted
    except Exception as error:
        reason = _first_line(error)
        raise UserError(
            f"Cannot load `adapter={adapter!r}` on this model: {reason} Is it an adapter of another base?"
        ) from error


def _check_adapter_files(adapter: str) -> None:
    """Refuses, before anything is loaded, an adapter that cannot be scored exactly, or is not in safetensors."""
    from peft import PeftConfig
    from transformers.utils.hub import cached_file

    folder = Path(adapter).expanduser()
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        raise UserError(f"`adapter={adapter!r}`: the folder has no adapter_config.json, so it holds no PEFT adapter.")
    try:
        config = PeftConfig.from_pretrained(str(folder) if folder.is_dir() else adapter)
    except Exception as error:  # no such folder, no such repository, or what PEFT makes of a damaged file
        raise UserError(f"Cannot load `adapter={adapter!r}`: {_first_line(error)}") from error
    check_adapter_config(config, f"`adapter={adapter!r}`")
    try:
        cached_file(str(folder) if folder.is_dir() else adapter, "adapter_model.safetensors")
    except OSError as error:
        raise UserError(
            f"`adapter={adapter!r}`: no adapter_model.safetensors (adapter_model.bin is not read: it could run code). "
            "Load it with PEFT once and write it again with save_pretrained."
        ) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    configured = None if generation is None else generation.eos_token_id
    ids = [] if configured is None else ([configured] if isinstance(configured, int) else list(configured))
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise UserError("Neither the model nor the tokenizer names an end-of-sequence token; completions cannot end.")
    return tuple(int(i) for i in ids)


def pick_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is the GPU where there is one.

    Raises:
        UserError: It is not available here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        float(torch.zeros(1, device=device))  # "meta" has a name, but no numbers
    except Exception as error:  # torch raises AssertionError or RuntimeError, depending on the build
        raise UserError(f"`device={name!r}`: not available here ({str(error).splitlines()[0]}).") from error
    return device


def _dtype(name: str, device: str) -> torch.dtype | str:
    if name == "auto":
        return "auto" if pick_device(device).type != "cpu" else torch.float32
    if name not in DTYPES:
        raise UserError(f"`dtype={name!r}`: unknown. Choose auto or one of {', '.join(DTYPES)}.")
    return DTYPES[name]


_MODEL_FILES = (
    "*.safetensors", "config.json", "generation_config.json", "*.py",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.jinja", "chat_template.json",
    "chat_templates/*.jinja",
)  # fmt: skip
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def content_identity(name: str, source: str, model: PreTrainedModel | None) -> str:
    """Name plus a fingerprint of the content: of weights, configuration, tokenizer and template, or a hub's commit.

    A folder that was renamed or moved keeps the fingerprint (`bvpo_stats.records.content_of`).

    Args:
        name: As the user gave it.
        source: The folder or hub id behind it.
        model: The model, where it is loaded; tells the commit of a hub id.
    """
    folder = Path(source).expanduser()
    short = name if name == EMBEDDED or not folder.is_dir() else re.sub("[@+]", "-", folder.resolve().name)
    if not folder.is_dir():
        commit = getattr(getattr(model, "config", None), "_commit_hash", None)
        return f"{short}@{commit[:12]}" if commit else short
    patterns = _MODEL_FILES if (folder / "config.json").exists() else _ADAPTER_FILES
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter: large models have several files
        digests = pool.map(_file_digest, files)
        found = "".join(f"{file.relative_to(folder)}:{digest}\n" for file, digest in zip(files, digests, strict=True))
    return f"{short}@{hashlib.sha256(found.encode()).hexdigest()[:12]}"


def loaded_identity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Name and fingerprint of a model in memory.

    That of the folder it was loaded from, where the folder still holds these very weights and this tokenizer: records
    and runs then know it for the same model. Otherwise over weights, configuration, tokenizer and template as they are
    in memory. An adapter that has moved the policy stands behind it, by its own weights.

    Args:
        model: The causal LM, wrapped by PEFT or not.
        tokenizer: Its tokenizer.
    """
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in causal_lm_of(model).state_dict().items()}
    adapter = {name: tensor for name, tensor in weights.items() if _ADAPTED.search(name)}
    own = {name: tensor for name, tensor in weights.items() if name not in adapter}
    source = str(getattr(model.config, "name_or_path", "") or "")
    if any(t.device.type == "meta" or hasattr(t, "full_tensor") or not t.numel() for t in own.values()):
        return source or type(model).__name__  # sharded, or not there yet: the name must do
    folder = _folder_behind(source, model)
    if folder is not None and _holds(folder, own, tokenizer):
        name = EMBEDDED if folder.resolve() == Path(embedded_model_path()).resolve() else source
        identity = content_identity(name, source, model)
    else:
        settings = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_CONTENT and not k.startswith("_")}
        content = json.dumps(
            [settings, _tokenizer_content(tokenizer), _tensor_digests(own)], sort_keys=True, default=str
        )
        name = re.sub("[@+]", "-", Path(source).name or type(causal_lm_of(model)).__name__)
        identity = f"{name}@{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if not any(bool(tensor.any()) for name, tensor in adapter.items() if "lora_A" not in name and tensor.numel()):
        return identity  # no adapter, or one that has not moved
    moved = hashlib.sha256(json.dumps(_tensor_digests(adapter), sort_keys=True).encode()).hexdigest()
    return f"{identity}+adapter@{moved[:12]}"


_ADAPTED = re.compile(r"(?:^|\.)(?:lora_\w+|modules_to_save|original_module|token_adapter|trainable_tokens\w*)(?:\.|$)")
_NOT_CONTENT = ("name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


def _folder_behind(source: str, model: PreTrainedModel) -> Path | None:
    """Where the files of a loaded model are: its folder, or its hub's cache; None where they are not here."""
    from transformers.utils.hub import cached_file

    if source and Path(source).is_dir():
        return Path(source)
    commit = getattr(model.config, "_commit_hash", None)
    if not source or commit is None:
        return None
    try:
        found = cached_file(source, "config.json", revision=commit, local_files_only=True)
    except OSError:
        return None
    return None if found is None else Path(found).parent


def _holds(folder: Path, weights: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a folder's weights and tokenizer are those in memory (in the dtype that is in memory)."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    missing = set(weights)
    places: dict[int, set[str]] = {}  # tied weights are stored once
    for name, tensor in weights.items():
        places.setdefault(tensor.data_ptr(), set()).add(name)
    try:
        with quiet_transformers():
            stored = AutoTokenizer.from_pretrained(str(folder))
        if _tokenizer_content(stored) != _tokenizer_content(tokenizer):
            return False
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (no dictionary)
                    if name not in weights:
                        return False
                    here, there = weights[name].detach().cpu(), handle.get_tensor(name)
                    if here.shape != there.shape or not torch.equal(here, there.to(here.dtype)):
                        return False
                    missing -= places[weights[name].data_ptr()]
    except Exception:  # whatever is wrong with a folder, what is in memory is not what it holds
        return False
    return not missing


def _tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return [words, special, str(tokenizer.chat_template)]


def _tensor_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Of each tensor, dtype, shape and the SHA-256 of its bytes."""

    def digest(tensor: torch.Tensor) -> str:
        values = tensor.detach().cpu().contiguous()
        raw = values.reshape(-1).view(torch.uint8).numpy().data if values.numel() else b""
        return f"{values.dtype} {tuple(values.shape)} {hashlib.sha256(raw).hexdigest()}"

    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def _file_digest(file: Path) -> str:
    if file.name == "adapter_config.json":  # names the folder of its base, which may move
        written = {k: v for k, v in json.loads(file.read_bytes()).items() if k != "base_model_name_or_path"}
        # PEFT writes sets as lists, in another order from process to process
        settings = {k: sorted(map(str, v)) if isinstance(v, list) else v for k, v in written.items()}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return sha256_of(file)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides the loading bars of transformers (our own bars show the long work) and its tables of odd weights."""
    from transformers.utils import logging

    was_enabled, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(50)  # critical
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if was_enabled:
            logging.enable_progress_bar()


# Of older checkpoints: what transformers computes by itself. Of larger ones: parts that a causal LM of text leaves out.
_HARMLESS = re.compile(
    r"inv_freq\Z|masked_bias\Z|(?:\.attn|\.attention)\.bias\Z|position_ids\Z|"
    r"\A(?:model\.)?(?:mtp|vision|visual|audio|multi_modal)",
)
_NAMED = 3


def check_loaded(name: str, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Refuses a model in which random numbers, or nothing, stand for weights of its file.

    Args:
        name: What to call it, as messages name settings.
        model: The model as it was loaded.
        found: What ``from_pretrained(..., output_loading_info=True)`` says.

    Raises:
        UserError: Weights are missing, left over or of another shape, or the configuration names another family.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config, kind = model.config, type(model).__name__
    listed = {
        "without weights for": sorted(found["missing_keys"]),
        "with weights that it has no place for:": sorted(
            key for key in found["unexpected_keys"] if not _HARMLESS.search(key)
        ),
        "with other shapes than the configuration's for": sorted(str(entry[0]) for entry in found["mismatched_keys"]),
    }
    wrong = [
        f"{what} {', '.join(keys[:_NAMED])}{f' and {len(keys) - _NAMED} more' if len(keys) > _NAMED else ''}"
        for what, keys in listed.items()
        if keys
    ]
    if wrong:
        raise UserError(
            f"{name}: its files come {'; '.join(wrong)} (read as {kind}, `model_type={config.model_type!r}`). They "
            "are incomplete or of another model than config.json: get them again from where they come from."
        )
    for written in getattr(config, "architectures", None) or ():
        if written != kind and written in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            raise UserError(
                f"{name}: its config.json calls it {written}, but `model_type={config.model_type!r}` is {kind}. "
                "One of the two is wrong: get config.json again from where the model comes from."
            )


@dataclass(frozen=True)
class ServedPolicy:
    """What is needed to speak a policy's language without loading it.

    Attributes:
        template: Protocol and tokenizer.
        eos_ids: Tokens that end a completion; the tokenizer's own first.
    """

    template: Template
    eos_ids: tuple[int, ...]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.template.tokenizer


def load_served_policy(options: PolicyOptions) -> ServedPolicy:
    """Loads tokenizer and template; no weights are read.

    Args:
        options: ``model``, ``template``, ``empty_trace`` and ``trust_remote_code`` are used.

    Raises:
        UserError: No such model, no tokenizer, no usable template, or no end-of-sequence token.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source = model_source(options.model)
    words = configured = None
    with contextlib.suppress(Exception):  # a tokenizer alone will do here; what is wrong with the model is said later
        config: Any = AutoConfig.from_pretrained(source, trust_remote_code=options.trust_remote_code).get_text_config()
        words, configured = getattr(config, "vocab_size", None), getattr(config, "eos_token_id", None)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # whatever a tokenizer's files provoke
        reason = _first_line(error)
        raise UserError(
            f"Cannot load the tokenizer of `model={options.model!r}`: {reason} Check the name, the folder's files, and "
            "hub access."
        ) from error
    with contextlib.suppress(Exception):  # many models ship none; transformers then takes the configuration's
        configured = GenerationConfig.from_pretrained(source).eos_token_id
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for extra in [configured] if isinstance(configured, int) else configured or []:
        if int(extra) not in ids:
            ids.append(int(extra))
    if not ids:
        raise UserError(f"The tokenizer of `model={options.model!r}` names no end-of-sequence token.")
    template = find_template(tokenizer, name=options.template, empty_trace=options.empty_trace)
    return ServedPolicy(replace(template, words=words, eos_ids=tuple(ids)), tuple(ids))


@contextlib.contextmanager
def gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Within it, decoder layers keep their inputs only and are computed again in backward (non-reentrant).

    Transformers checkpoints a layer only in training mode. Here the decoder layers themselves are marked as training
    while all they contain stays in evaluation mode, so no dropout wakes up.

    Args:
        model: A transformers causal LM, wrapped by PEFT or not.

    Raises:
        UserError: The model has no layers that can be checkpointed.
    """
    causal_lm: Any = causal_lm_of(model)
    layers = [module for module in causal_lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{type(causal_lm).__name__} has no layers that support gradient checkpointing; run without.")
    was_training = [layer.training for layer in layers]
    was_enabled = any(layer.gradient_checkpointing for layer in layers)
    if not was_enabled:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, training in zip(layers, was_training, strict=True):
            layer.training = training
        if not was_enabled:
            causal_lm.gradient_checkpointing_disable()
