"""``bvpo-stats pairs``: preference data from samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bvpo_stats.studies.pairs.config import PairsConfig

EXAMPLES = """Examples:

bvpo-stats pairs

bvpo-stats pairs --samples runs/samples --reward embedded --output runs/pairs

bvpo-stats pairs --samples runs/r1 --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --reward model:PATH --ref-logps

bvpo-stats pairs --samples runs/maths --reward math-verify --mode thinking

bvpo-stats pairs --from-preferences HuggingFaceH4/ultrafeedback_binarized --split train_prefs --model MODEL"""


def find(given: dict[str, Any], output: Path) -> dict[str, Any]:
    """Samples and reward, where the user gave none.

    Args:
        given: Values by option.
        output: The command's folder.

    Raises:
        UserError: There are no samples, or nothing says what ranks their answers.
    """
    from bvpo_stats.errors import UserError
    from bvpo_stats.pages.runs import read_run

    from .following import found_run, is_embedded

    if "from_preferences" in given:
        return {}
    found: dict[str, Any] = {}
    if "samples" not in given:
        found["samples"] = found_run(output, "sample", "samples").folder
    if "reward" not in given:
        samples = Path({**found, **given}["samples"])
        if not is_embedded((read_run(samples, samples.name).report or {}).get("model")):
            raise UserError(
                f"`reward` is not given, and {samples} holds no finished run of the embedded model, whose answers "
                "`reward='embedded'` would rank. Give e.g. `reward='model:REWARD-MODEL'` or `reward='math-verify'`."
            )
        found["reward"] = "embedded"
    return found


def pairs(config: PairsConfig, output: Path) -> None:
    """Pair the best and the worst response of each prompt, by the final answer alone (Sections 3.3, 5.1, C.3).

    With --from-preferences, of answers that others wrote and ranked: traces are drawn for them from the model.
    """
    from bvpo_stats.studies.pairs.run import run_pairs

    from .following import show

    report = run_pairs(config, output)
    if config.push_to_hub is not None:
        from bvpo_stats.store.hub import push_folder

        files = ["README.md", "*thinking.jsonl", "*thinking.parquet", "traces.jsonl"]
        print(f"Pushed: {push_folder(output, config.push_to_hub, 'dataset', files)}")
    show(report, output)
