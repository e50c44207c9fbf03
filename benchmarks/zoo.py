"""The model zoo: tiny random models of 55 types in 67 configurations; each is exact, or refused by name.

    python benchmarks/zoo.py [NAME ...] [--keep FOLDER]

Each model is built with random weights and the embedded tokenizer, written to a folder, loaded as a user would, and
looked at in float64: draws of a padded batch against the same draws one prompt at a time; log-probabilities and every
sequence's own gradient in a padded batch against the model's own logits and autograd, one sequence at a time. What is
refused must be refused in one line. Where the refusal offers attention layers alone, as for mixtures of experts, they
are taken and must be exact. Writes ``zoo.md`` and ``zoo.json`` next to this file, and fails where an outcome is not the
expected one.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bvpo_stats.embedded.tokenizer import build_tokenizer
from bvpo_stats.errors import UserError
from bvpo_stats.model.batching import TokenSequence, collate
from bvpo_stats.model.policy import Policy, load_policy
from bvpo_stats.model.scores import check_alone, check_scores, score_pass
from bvpo_stats.model.sinks import Keep
from bvpo_stats.model.subset import LoraOptions, create_lora, lora_subset
from bvpo_stats.records import Prompt
from bvpo_stats.sampling.engines.base import Request, SamplingOptions
from bvpo_stats.sampling.engines.transformers_engine import TransformersEngine

LOGP_TOLERANCE = 1e-5  # nats; some models compute positions in float32
SCORE_TOLERANCE = 1e-5  # of a sequence's gradient norm
QUESTIONS = ("Compute 4-5.", "Compute (3+4)*(2-1)+17-2.", "Compute 1.")
COMPLETIONS = (7, 50, 20)  # tokens
DRAWN = 24  # tokens

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_HEAD: dict[str, Any] = {"head_dim": 16}
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "decoder_sparse_step": 1,
}
_MIXTRAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
_GRANITE: dict[str, Any] = {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.25}
_LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 40,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 0.7 * i for i in range(8)],
        "original_max_position_embeddings": 40,
        "partial_rotary_factor": 1.0,
    },
}
_DYNAMIC: dict[str, Any] = {
    "max_position_embeddings": 48,
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
}
_LLAMA3: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    }
}
_GEMMA: dict[str, Any] = {**_HEAD, **_TIED, "sliding_window": 8, "query_pre_attn_scalar": 16}
_NEXT: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 48,
}

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", _HEAD),
    "qwen3_sliding": ("qwen3", {**_HEAD, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3_tied": ("qwen3", {**_HEAD, **_TIED}),
    "qwen3_attnbias": ("qwen3", {**_HEAD, "attention_bias": True}),
    "qwen3_moe": ("qwen3_moe", {**_HEAD, **_MOE}),
    "qwen3_next": ("qwen3_next", {**_HEAD, **_NEXT, **_MOE}),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "qwen2_moe": ("qwen2_moe", {"shared_expert_intermediate_size": 48, **_MOE}),
    "llama": ("llama", {}),
    "llama_bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_dynamic_rope": ("llama", _DYNAMIC),
    "llama3_rope": ("llama", _LLAMA3),
    "mistral_sliding": ("mistral", {**_HEAD, "sliding_window": 8}),
    "mixtral": ("mixtral", _MIXTRAL),
    "gemma": ("gemma", {**_HEAD, **_TIED}),
    "gemma2": ("gemma2", _GEMMA),
    "gemma2_nocap": ("gemma2", {**_GEMMA, "final_logit_softcapping": None}),
    "gemma3_text": ("gemma3_text", {**_GEMMA, "sliding_window_pattern": 2}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": 8}),
    "phi3_longrope": ("phi3", _LONGROPE),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {**_GPT, **_TIED}),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 8}),
    "gpt_bigcode": ("gpt_bigcode", {**_GPT, **_TIED}),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 8}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, **_TIED}),
    "opt_proj": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 32, **_TIED, "do_layer_norm_before": False}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4, **_TIED}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "expansion_ratio": 2, **_TIED}),
    "falcon": ("falcon", {"alibi": False, "new_decoder_architecture": False, "multi_query": True, **_TIED}),
    "falcon_alibi": ("falcon", {"alibi": True, "multi_query": False, **_TIED}),
    "falcon_h1": (
        "falcon_h1",
        {
            **_HEAD,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "granite": ("granite", {**_GRANITE, "logits_scaling": 1.0}),
    "granite_scaled": ("granite", {**_GRANITE, "logits_scaling": 8.0}),
    "granitemoe": ("granitemoe", {**_MIXTRAL, "logits_scaling": 1.0}),
    "deepseek_v2": ("deepseek_v2", {**_LATENT, **_ROUTED, "num_key_value_heads": 4}),
    "deepseek_v3": ("deepseek_v3", {**_LATENT, **_ROUTED, "num_key_value_heads": 4}),
    "olmo": ("olmo", {"clip_qkv": 0.5}),
    "olmo2": ("olmo2", {}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("cohere", {"logit_scale": 1.0, **_TIED}),
    "cohere_scaled": ("cohere", {"logit_scale": 0.0625, **_TIED}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "exaone4": ("exaone4", {"sliding_window": 8, "sliding_window_pattern": 2}),
    "glm": ("glm", _HEAD),
    "glm4": ("glm4", _HEAD),
    "glm4_moe": ("glm4_moe", {**_HEAD, **_ROUTED}),
    "gpt_oss": ("gpt_oss", {**_HEAD, **_MIXTRAL, "sliding_window": 8}),
    "mamba": ("mamba", {"state_size": 8, **_TIED}),
    "mamba2": ("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "nemotron": ("nemotron", {}),
    "minimax": (
        "minimax",
        {**_HEAD, **_MIXTRAL, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    ),
    "minicpm3": ("minicpm3", {**_LATENT, "scale_depth": 1.4, "scale_emb": 12, "dim_model_base": 256}),
    "ernie4_5": ("ernie4_5", _HEAD),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _HEAD),
    "seed_oss": ("seed_oss", _HEAD),
    "helium": ("helium", _HEAD),
    "arcee": ("arcee", {}),
    "apertus": ("apertus", {}),
    "rwkv": ("rwkv", {"attention_hidden_size": 64, "context_length": 512}),
    "nanochat": ("nanochat", {}),
    "bitnet": ("bitnet", {}),
    "diffllama": ("diffllama", {}),
}

EXACT = "exact"
LOGITS_ARE_CHANGED = "the chunked head does not support it"
MIXES_SEQUENCES = "layers that mix sequences"
NOT_LINEAR = "only LoRA on Linear layers is"

# How scores come out, where they are not exact with LoRA on all Linear layers. Words that the refusal must hold.
SCORES = {
    "cohere_scaled": LOGITS_ARE_CHANGED,
    "granite_scaled": LOGITS_ARE_CHANGED,
    "gemma2": LOGITS_ARE_CHANGED,
    "minicpm3": LOGITS_ARE_CHANGED,
    "nanochat": LOGITS_ARE_CHANGED,
    "falcon": "FalconLinear",
    "falcon_alibi": "FalconLinear",
    "mamba": "incompatible with Mamba-based models",
    "mamba2": "incompatible with Mamba-based models",
    "falcon_h1": "incompatible with Mamba-based models",
    "opt": MIXES_SEQUENCES,
    "opt_proj": MIXES_SEQUENCES,
    "qwen2_moe": MIXES_SEQUENCES,
    "deepseek_v2": NOT_LINEAR,
    "deepseek_v3": NOT_LINEAR,
    "glm4_moe": NOT_LINEAR,
    "minimax": NOT_LINEAR,
    "mixtral": NOT_LINEAR,
    "olmoe": NOT_LINEAR,
    "qwen3_moe": NOT_LINEAR,
    "qwen3_next": NOT_LINEAR,
}
DRAWS = {"minicpm3": "cannot be sampled from with transformers"}
POSITIONS = {"phi3_longrope": 40, "llama_dynamic_rope": 48}
"""Where longer sequences are refused: the models' frequencies change there."""


@dataclass(frozen=True)
class Outcome:
    """What came of one configuration.

    Attributes:
        name: Of the configuration.
        draws: ``exact``, or the refusal, or what is wrong.
        scores: The same of log-probabilities and gradients, with LoRA on all Linear layers.
        attention: The same with the attention layers that the refusal offers; None where it offers none.
        positions: Longest sequence, where longer ones are refused.
        logp_error: Largest difference of a sequence's log-probability, in nats.
        score_error: Largest difference of a sequence's gradient, relative to its norm.
        seconds: Time taken.
    """

    name: str
    draws: str
    scores: str
    attention: str | None
    positions: int | None
    logp_error: float | None
    score_error: float | None
    seconds: float

    @property
    def expected(self) -> bool:
        """Whether it came out as it should."""
        return (
            _as_expected(self.draws, DRAWS.get(self.name, EXACT))
            and _as_expected(self.scores, SCORES.get(self.name, EXACT))
            and self.attention in (None, EXACT)
            and self.positions == POSITIONS.get(self.name)
        )


def _as_expected(found: str, expected: str) -> bool:
    return found == EXACT if expected == EXACT else found.startswith("refused") and expected in found


def build(name: str, folder: Path) -> None:
    """Writes a tiny random model of a configuration, every parameter nontrivial."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, extra = CONFIGURATIONS[name]
    tokenizer = build_tokenizer()
    torch.manual_seed(1)
    own = {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(_BASE | own | extra)), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.is_floating_point() and weight.dim() == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def examine(name: str, folder: Path) -> Outcome:
    """Loads a model and compares what the package computes with the model's own forward."""
    begin = time.perf_counter()
    policy = load_policy(str(folder), dtype="float64", device="cpu")
    draws = _refusal_or(lambda: _draws(policy))
    found: dict[str, Any] = {"logp": None, "score": None, "positions": None}
    scores = _refusal_or(lambda: _scores(policy, LoraOptions(r=3, seed=1), found))
    attention = None
    if offered := re.search(r"`target_modules='([^']+)'`", scores):
        targets = tuple(offered[1].split(","))
        attention = _refusal_or(lambda: _scores(policy, LoraOptions(r=3, seed=1, targets=targets), found))
    seconds = time.perf_counter() - begin
    return Outcome(name, draws, scores, attention, found["positions"], found["logp"], found["score"], round(seconds, 1))


def _refusal_or(look: Any) -> str:
    try:
        return str(look())
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"


def _draws(policy: Policy) -> str:
    options = SamplingOptions(samples=1, temperature=1.0, max_new_tokens=DRAWN, seed=3)
    requests = [
        Request(Prompt(f"p{i}", question), "thinking", 0, policy.template.prompt_ids(question, "thinking"), "")
        for i, question in enumerate(QUESTIONS)
    ]
    engine = TransformersEngine(policy)
    together = engine.generate(requests, options)
    alone = [engine.generate([request], options)[0] for request in requests]
    return EXACT if [d.completion_ids for d in together] == [d.completion_ids for d in alone] else "WRONG: by batch"


def _scores(policy: Policy, lora: LoraOptions, found: dict[str, Any]) -> str:
    model = create_lora(policy.model, lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # a fresh adapter's B is zero, and so would be half of the gradient
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    subset = lora_subset(model)
    sequences = _sequences(policy, None)
    most = policy.max_positions
    if most is not None and max(map(len, sequences)) > most:
        try:
            collate(sequences, max_positions=most)
        except UserError:
            found["positions"] = most
        sequences = _sequences(policy, most)
    check_alone(policy, sequences)
    batch = collate(sequences, pad_id=policy.pad_id, max_positions=most)
    check_scores(model, subset, batch)
    keep = Keep()
    logps = score_pass(model, subset, batch, [keep]).sum(1)
    scores = keep.flat(subset, len(batch))
    weights = list(subset.parameters.values())
    for weight in weights:
        weight.requires_grad_(True)
    worst = {"logp": 0.0, "score": 0.0}
    for row, sequence in enumerate(sequences):
        ids = torch.tensor([sequence.prompt_ids + sequence.completion_ids])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].double()
        start = len(sequence.prompt_ids) - 1
        own = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[start:].sum()
        parts = torch.autograd.grad(own, weights, allow_unused=True)
        truth = torch.cat(
            [(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, parts, strict=True)]
        )
        worst["logp"] = max(worst["logp"], abs(float(logps[row] - own)))
        worst["score"] = max(worst["score"], float((scores[row] - truth).norm() / truth.norm()))
    found.update(worst)
    if not (worst["logp"] <= LOGP_TOLERANCE and worst["score"] <= SCORE_TOLERANCE):
        return f"WRONG: log-probabilities by {worst['logp']:.0e}, gradients by {worst['score']:.0e}"
    return EXACT


def _sequences(policy: Policy, most: int | None) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(5)
    words = policy.model.config.vocab_size
    found = []
    for question, length in zip(QUESTIONS, COMPLETIONS, strict=True):
        prompt = policy.template.prompt_ids(question, "thinking")
        length = length if most is None else min(length, most - len(prompt) - 1)
        found.append(TokenSequence(prompt, (*torch.randint(8, words, (length,), generator=generator).tolist(), 3)))
    return found


def _table(outcomes: list[Outcome]) -> str:
    rows = [
        f"| {o.name} | {CONFIGURATIONS[o.name][0]} | {_short(o.draws)} | {_short(o.scores)} | {_short(o.attention)} | "
        f"{'' if o.logp_error is None else f'{o.logp_error:.0e}'} | "
        f"{'' if o.score_error is None else f'{o.score_error:.0e}'} |"
        for o in outcomes
    ]
    head = "| configuration | type | draws | scores, all Linear layers | attention layers alone | log p | gradient |"
    return "\n".join([head, "|---|---|---|---|---|--:|--:|", *rows])


def _short(text: str | None) -> str:
    return "" if text is None else text.replace("|", "\\|")[:150]


def _report(outcomes: list[Outcome], setting: str) -> str:
    counts = Counter(
        "exact"
        if o.scores == EXACT
        else "exact with attention layers alone"
        if o.attention == EXACT
        else "refused by name"
        if o.scores.startswith("refused")
        else "wrong"
        for o in outcomes
    )
    words = ", ".join(f"{count} {what}" for what, count in counts.most_common())
    kinds = len({CONFIGURATIONS[o.name][0] for o in outcomes})
    limits = ", ".join(f"{name} {most}" for name, most in POSITIONS.items())
    return f"""# Model zoo

{len(outcomes)} tiny random models of {kinds} types, in float64: {words}. Draws: those of a padded batch are those of
one prompt at a time. Scores: log-probabilities (largest difference of a sequence, in nats) and gradients (relative to
the sequence's norm) of a padded batch are those of the model's own logits and autograd, one sequence at a time. Longer
sequences than these are refused, since the models' frequencies change there: {limits}. Made by `make zoo`.

{_table(outcomes)}

{setting}
"""


def main() -> None:
    """The whole zoo, or some of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *CONFIGURATIONS], help="Configurations; all without a name.")
    parser.add_argument("--keep", type=Path, help="Leave the models in this folder.")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    names = arguments.names or list(CONFIGURATIONS)
    place = arguments.keep or Path(tempfile.mkdtemp())
    outcomes = []
    try:
        for name in names:
            if not (place / name / "config.json").exists():
                build(name, place / name)
            outcomes.append(examine(name, place / name))
            print(json.dumps(asdict(outcomes[-1]) | {"expected": outcomes[-1].expected}), flush=True)
    finally:
        if arguments.keep is None:
            shutil.rmtree(place, ignore_errors=True)
    if not arguments.names:
        from measure import machine

        here = Path(__file__).parent
        setting = "Setting: " + ", ".join(f"{key} {value}" for key, value in machine().items()) + "."
        rows = [asdict(outcome) for outcome in outcomes]
        (here / "zoo.json").write_text(json.dumps({"machine": machine(), "outcomes": rows}, indent=1) + "\n")
        (here / "zoo.md").write_text(_report(outcomes, setting))
    odd = [outcome.name for outcome in outcomes if not outcome.expected]
    if odd:
        sys.exit(f"Not as expected: {', '.join(odd)}.")


if __name__ == "__main__":
    main()
