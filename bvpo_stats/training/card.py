"""The card of a trained model: what was trained, on which pairs, alpha's course, and what became of the loss."""

from __future__ import annotations

import re
from importlib.metadata import version
from statistics import fmean
from typing import Any

from bvpo_stats.model.policy import Policy
from bvpo_stats.training.config import BVPOConfig
from bvpo_stats.training.data import PromptSelection

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_MOST_ROWS = 12  # of alpha's course


def model_card(
    args: BVPOConfig,
    policy: Policy,
    selection: PromptSelection,
    identity: dict[str, Any],
    history: list[dict[str, Any]],
) -> str:
    """README.md of what `BVPOTrainer.save_model` writes, in the place of PEFT's empty template.

    Front matter for the hub (base model where it is a hub id, library, tags), then tables. The interval of alpha is
    that of the last estimate before each step, at the level of the settings.

    Args:
        args: The settings.
        policy: What was trained.
        selection: Its prompts.
        identity: Of the run; the fingerprint of its pairs is there.
        history: Log entries so far.
    """
    history = [entry for entry in history if "loss" in entry]
    steps = history[-1]["step"] if history else 0
    base, _, content = policy.identity.partition("+")[0].partition("@")
    adapter = policy.has_adapter
    tags = ["bvpo-stats", "preference-optimization", args.loss_type, *(["lora"] if adapter else [])]
    head = ["---", *([f"base_model: {base}"] if _HUB_ID.fullmatch(base) else [])]
    head += [f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation", "tags:"]
    head += [f"- {tag}" for tag in tags] + ["---", ""]
    what = "LoRA adapter" if adapter else "All weights"
    weights = sum(int(weight.numel()) for weight in policy.model.parameters() if weight.requires_grad)
    name = base.rstrip("/").rpartition("/")[2] if not _HUB_ID.fullmatch(base) else base
    lines = [
        f"# {what} for {name}, trained on preference pairs",
        "",
        f"Written by bvpo-stats {version('bvpo-stats')} after {steps} steps. The loss of a step is alpha L_t "
        "+ (1 - alpha) L_e: L_t on pairs with reasoning traces (D_t), L_e on pairs with an empty trace (D_e).",
        "",
        "| setting | value |",
        "|---|---|",
        *(
            f"| {label} | {value} |"
            for label, value in (
                ("base model", f"{name}, content {content or 'unknown'}"),
                ("prompt template", policy.template.name),
                ("trained weights", f"{weights:,}"),
                ("loss", f"{args.loss_type}, beta {args.beta:g}"),
                ("alpha", args.alpha if not args.adaptive else f"adaptive, rule {args.alpha_rule}"),
                ("prompts", f"{len(selection.train)} ({selection.too_long} too long, {selection.unmatched} unmatched)"),
                ("pairs", f"fingerprint {identity['pairs']}"),
                ("batch, learning rate", f"{args.prompts_per_step} prompts, {args.learning_rate:g} at its peak"),
                ("seed", args.seed),
            )
            if value != ""
        ),
        "",
    ]
    course = [entry for entry in history if "alpha" in entry]
    if course:
        lines += ["## Alpha's course", "", *_course(course, f"{args.alpha_level:.0%}"), ""]
    if history:
        part = max(1, len(history) // 10)
        names = [
            n for n in history[-1] if n.endswith(("loss", "rewards/margins", "rewards/accuracies")) and n in history[0]
        ]
        lines += ["## The log, means over its first and its last tenth", "", "| | first | last |", "|---|--:|--:|"]
        for name_ in names:
            first, last = (fmean(entry[name_] for entry in rows) for rows in (history[:part], history[-part:]))
            lines.append(f"| {name_} | {first:.4g} | {last:.4g} |")
        lines += ["", "These are training pairs: how it answers, with intervals, is what `evaluate` measures.", ""]
    lines += [
        "## Use", "",
        "    import bvpo_stats as bvpo", "",
        f"    policy = bvpo.load_policy({f'{name!r}, adapter=' if adapter else ''}'THIS-FOLDER')",
        "    samples = bvpo.sample(policy, ['What is 17 * 24?'])", "",
    ]  # fmt: skip
    return "\n".join([*head, *lines]).rstrip() + "\n"


def _course(history: list[dict[str, Any]], level: str) -> list[str]:
    places = sorted({round(i * (len(history) - 1) / max(1, _MOST_ROWS - 1)) for i in range(_MOST_ROWS)})
    rows = [f"| step | alpha | estimate | {level} interval |", "|--:|--:|--:|--:|"]
    for place in places:
        if place < len(history):
            entry = history[place]
            low, high = entry.get("alpha/low"), entry.get("alpha/high")
            estimate = entry.get("alpha/estimate")
            known = "-" if estimate is None else f"{estimate:.3g}"
            spread = "-" if low is None or high is None else f"{low:.3g} to {high:.3g}"
            rows.append(f"| {entry['step']} | {entry['alpha']:.3g} | {known} | {spread} |")
    return rows
