"""The whole story on the embedded model, in a few minutes: each study in turn, then one page of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bvpo_stats.pages.page import write_page
from bvpo_stats.pages.runs import KINDS, read_run


@dataclass(frozen=True)
class Sizes:
    """How much each stage does; the defaults take a few minutes.

    Attributes:
        questions: Questions of the variance study; None for all.
        prompts: Prompts of the alpha-star study; None for all.
        steps: Optimizer steps of training.
        looks: How often training looks at the trace gradient's bias, and saves.
        problems: Problems of the evaluation.
        draws: Examples drawn where a theorem is checked on samples.
        theorem_prompts: Questions put to the embedded model for Appendix B's check.
    """

    questions: int | None = None
    prompts: int | None = None
    steps: int = 24
    looks: int = 4
    problems: int = 80
    draws: int = 16_384
    theorem_prompts: int = 40


FULL = Sizes()
QUICK = Sizes(questions=20, prompts=60, steps=4, looks=1, problems=10, draws=2_048, theorem_prompts=0)
"""A first impression in half the time; its intervals are wide."""


_LEARNING_RATE = 1e-4  # the preset's is for longer runs: at 1e-3, 24 steps unlearn arithmetic


@dataclass(frozen=True)
class Stage:
    """One study of the story.

    Attributes:
        name: Its folder.
        question: What it answers.
        run: Runs or resumes it in a folder.
    """

    name: str
    question: str
    run: Callable[[Path, int, Sizes], object]


def run_demo(output: Path, seed: int = 0, sizes: Sizes = FULL) -> Path:
    """Runs (or resumes) every stage in a folder of its own and writes the page.

    Args:
        output: Folder of the story.
        seed: Decides every draw.
        sizes: How much each stage does.

    Returns:
        The HTML file.

    Raises:
        UserError: A folder holds something else; see the message.
    """
    import torch

    torch.set_num_threads(1)  # the model is so small that a second thread mostly waits
    for place, stage in enumerate(STAGES, start=1):
        print(f"{place}/{len(STAGES)} {stage.name}: {stage.question}", flush=True)
        stage.run(output / stage.name, seed, sizes)
        for sentence in _findings(output / stage.name):
            print(f"    {sentence}", flush=True)
    return write_page(output, title="bvpo-stats on the embedded model")


def _findings(folder: Path) -> list[str]:
    run = read_run(folder, folder.name)
    if run.report is None or run.study not in KINDS:
        return []
    return [finding.sentence for finding in run.read().present().findings]


def _variance(folder: Path, seed: int, sizes: Sizes) -> None:
    from bvpo_stats.studies.variance.config import VarianceConfig
    from bvpo_stats.studies.variance.run import run_variance

    run_variance(VarianceConfig(limit=sizes.questions, seed=seed), folder)


def _alpha_star(folder: Path, seed: int, sizes: Sizes) -> None:
    from bvpo_stats.studies.alpha_star.config import AlphaConfig, AlphaInputs
    from bvpo_stats.studies.alpha_star.run import run_alpha_star

    run_alpha_star(AlphaConfig(inputs=AlphaInputs(limit=sizes.prompts), seed=seed), folder)


def _train(folder: Path, seed: int, sizes: Sizes) -> None:
    from bvpo_stats.studies.train.config import TrainConfig
    from bvpo_stats.studies.train.run import run_train

    config = TrainConfig(
        alpha="adaptive",
        learning_rate=_LEARNING_RATE,
        max_steps=sizes.steps,
        alpha_update_steps=sizes.steps // sizes.looks,
        save_steps=sizes.steps // sizes.looks,
        seed=seed,
    )
    run_train(config, folder)


def _evaluate(folder: Path, seed: int, sizes: Sizes) -> None:
    from bvpo_stats.studies.evaluate.config import EvaluateConfig
    from bvpo_stats.studies.evaluate.run import evaluate
    from bvpo_stats.studies.train.config import MODEL

    trained = f"trained={folder.parent / 'train' / MODEL}"
    evaluate(EvaluateConfig(adapters=(trained,), samples=4, limit=sizes.problems, seed=seed), folder)


def _theorems(folder: Path, seed: int, sizes: Sizes) -> None:
    from bvpo_stats.lab.theorems.config import TheoremConfig
    from bvpo_stats.lab.theorems.run import run_theorems

    config = TheoremConfig(draws=sizes.draws, seed=seed, embedded_prompts=sizes.theorem_prompts)
    finished = read_run(folder, folder.name).report
    if finished is None or finished.get("config") != asdict(config):
        run_theorems(config, folder)


STAGES = (
    Stage("variance", "how much variance do traces add?", _variance),
    Stage("alpha-star", "which mix of trace and empty-trace gradient is best?", _alpha_star),
    Stage("train", "does alpha find its value while training?", _train),
    Stage("evaluate", "what did training change?", _evaluate),
    Stage("theorems", "does every claim of the paper hold, on models whose exact answers are known?", _theorems),
)
