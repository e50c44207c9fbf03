"""What a pairs run reports: how many pairs, and what was set aside and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from bvpo_stats.records import Mode, PreferencePair, Truncation
from bvpo_stats.sampling.pairs import Choice, ScoredCompletion, SetAside
from bvpo_stats.sampling.traces import BankOptions, BankTally
from bvpo_stats.store.jsonl import write_atomic
from bvpo_stats.store.tables import read_records, write_records
from bvpo_stats.studies.base import Presentation, Report, ResultTable, number

_NAMES = {"thinking": "D_t (thinking)", "nothinking": "D_e (nothinking)"}
_ROWS = (
    ("prompts", "prompts with responses"),
    ("responses", "responses"),
    ("truncated", "responses set aside: truncated"),
    ("unclosed", "responses set aside: trace never closed"),
    ("unscored", "responses set aside: no reward"),
    ("too_few", "prompts set aside: fewer than two responses left"),
    ("identical", "prompts set aside: identical answers"),
    ("ties", "prompts set aside: best and worst tie"),
    ("small_gap", "prompts set aside: reward gap below the least"),
    ("pairs", "pairs"),
    ("shared_best", "pairs whose best reward several responses share"),
    ("shared_worst", "pairs whose worst reward several responses share"),
    ("other_tokens", "pairs whose text reads back as other tokens"),
)
_GAPS = (("mean_gap", "reward gap, mean"), ("min_gap", "reward gap, least"), ("max_gap", "reward gap, largest"))
_REASONS: dict[SetAside, str] = {
    "too few": "too_few",
    "identical": "identical",
    "tie": "ties",
    "small gap": "small_gap",
}
_COUNTS = tuple(name for name, _ in _ROWS)


_MOST_TIED = 0.5
"""Share of prompts lost to ties beyond which the report says so."""
_FEW_JOINT = 0.2
"""Share of the pairs of the larger set with a partner in the other below which the report says so."""


@dataclass(frozen=True)
class ModeSummary:
    """Counts of one mode.

    ``prompts = pairs + too_few + identical + ties + small_gap``; responses set aside are not among those
    that could be chosen.

    Attributes:
        prompts: Prompts with at least one response.
        responses: All responses.
        truncated: Responses cut at the token limit.
        unclosed: Responses that ended without closing their trace.
        unscored: Complete responses without a reward.
        too_few: Prompts with fewer than two complete, scored responses.
        identical: Prompts whose answers (or whose best and worst) are the same text.
        ties: Prompts whose different answers all have the same reward.
        small_gap: Prompts whose best and worst reward differ by less than the least gap that was asked for.
        pairs: Pairs.
        shared_best: Pairs whose largest reward several responses share; the lowest sample index was taken.
        shared_worst: The same for the smallest reward.
        other_tokens: Pairs whose text a tokenising trainer would read as other tokens than the sampler wrote.
        mean_gap: Mean of chosen minus rejected reward; None without pairs.
        min_gap: Smallest gap.
        max_gap: Largest gap.
        mean_chosen_tokens: Mean length of the chosen completions.
        mean_rejected_tokens: Mean length of the rejected completions.
    """

    prompts: int
    responses: int
    truncated: int
    unclosed: int
    unscored: int
    too_few: int
    identical: int
    ties: int
    pairs: int
    shared_best: int
    shared_worst: int
    other_tokens: int
    mean_gap: float | None
    min_gap: float | None
    max_gap: float | None
    mean_chosen_tokens: float | None
    mean_rejected_tokens: float | None
    small_gap: int = 0


@dataclass
class ModeTally:
    """Running counts of one mode; see :class:`ModeSummary`."""

    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))
    gap_sum: float = 0.0
    gaps: int = 0
    gap_range: tuple[float, float] = (float("inf"), float("-inf"))
    tokens: tuple[int, int] = (0, 0)

    def count(self, responses: Sequence[ScoredCompletion], choice: Choice | SetAside) -> None:
        """Counts one prompt's responses and what came of them."""
        counts = self.counts
        counts["prompts"] += 1
        counts["responses"] += len(responses)
        for response in responses:
            completion = response.completion
            if completion.finish_reason != "stop":
                counts["truncated"] += 1
            elif completion.answer_start is None:
                counts["unclosed"] += 1
            elif response.reward is None:
                counts["unscored"] += 1
        if isinstance(choice, Choice):
            counts["pairs"] += 1
            counts["shared_best"] += choice.n_best > 1
            counts["shared_worst"] += choice.n_worst > 1
        else:
            counts[_REASONS[choice]] += 1

    def count_pair(self, pair: PreferencePair, *, exact_text: bool) -> None:
        """Counts a pair's gap and lengths."""
        if pair.chosen_reward is not None and pair.rejected_reward is not None:
            gap = pair.chosen_reward - pair.rejected_reward
            self.gap_sum += gap
            self.gaps += 1
            self.gap_range = (min(self.gap_range[0], gap), max(self.gap_range[1], gap))
        self.tokens = (self.tokens[0] + len(pair.chosen_ids), self.tokens[1] + len(pair.rejected_ids))
        self.counts["other_tokens"] += not exact_text

    def summary(self) -> ModeSummary:
        """The counts so far."""
        n = self.counts["pairs"]
        means = [total / n if n else None for total in self.tokens]
        low, high = self.gap_range if self.gaps else (None, None)
        return ModeSummary(
            **self.counts,
            mean_gap=self.gap_sum / self.gaps if self.gaps else None,
            min_gap=low,
            max_gap=high,
            mean_chosen_tokens=means[0],
            mean_rejected_tokens=means[1],
        )


@dataclass(frozen=True)
class PreferenceSummary:
    """What became of preference data of elsewhere.

    Attributes:
        layouts: Rows by layout.
        given: Pairs that brought a trace for either answer.
        drawn: Pairs whose traces were drawn here.
        bank: K, moves and burn-in of the chains.
        tally: What the chains did.
    """

    layouts: dict[str, int]
    given: int
    drawn: int
    bank: BankOptions
    tally: BankTally

    def notes(self) -> Iterator[str]:
        """Where answers and traces come from."""
        kinds = ", ".join(f"{count} of {name}" for name, count in self.layouts.items())
        yield f"Rows: {kinds}. The answers are of elsewhere, ranked by whoever made the data."
        if self.given:
            yield f"{self.given} pairs brought their traces, which are kept; D_e has their answers without them."
        if self.drawn:
            options, tally = self.bank, self.tally
            yield (
                f"{self.drawn} pairs got traces from the model: chains under pi(r | x, y), started at a draw of "
                f"pi(r | x), {options.burn_in} moves before the first, which is the pair's own, {options.mh_moves} "
                f"between the {options.traces_per_answer} that are kept in traces.jsonl."
            )
            if tally.proposals:
                yield f"{tally.moved / tally.proposals:.0%} of {tally.proposals} moves changed the trace."

    def cautions(self) -> Iterator[str]:
        """What this changes in the theory."""
        if self.given:
            yield (
                "Traces that came with the data are no draws of this model: E g_t is not mu, by a bias that is not "
                "known. Theorem 2's weights hold for pairs that the model sampled itself."
            )
        if self.drawn:
            yield (
                "The answers are not draws of this model, so alpha* is that of these answers. Given them, E g_t = mu "
                "at the reference as far as the chains have reached pi(r | x, y); they started at pi(r | x), and how "
                "far they are is not known. `bvpo-stats alpha-star` therefore does not take mu = E g_t, and asks for "
                "the bank (`traces`)."
            )
            if self.tally.stuck > 0.2 * self.tally.sides:
                yield (
                    f"{self.tally.stuck} of {self.tally.sides} answers have a chain that never changed its trace: a "
                    "draw of pi(r | x) stands behind them. Raise `burn_in`, or sample answers from the model."
                )


@dataclass(frozen=True)
class PairsReport(Report):
    """A pairs run.

    Attributes:
        model: Identity of the sampling model.
        template: Name of the template protocol.
        reward: Identity of the reward.
        n_prompts: Prompts with responses.
        n_responses: Responses.
        half_written: Half-written last lines of the samples that were passed over.
        set_aside: Requests that gave the sampling run no usable response, by reason; its set_aside*.jsonl names them.
        in_both_modes: Prompts with a pair in D_t and in D_e, which joint statistics need; None for one mode.
        modes: Counts by mode.
        ref_logps: Whether reference log-probabilities are stored.
        truncation: Responses without an answer by mode; their shares stand in every pair.
        preferences: Of preference data; None for samples.
    """

    study: ClassVar[str] = "pairs"

    model: str
    template: str
    reward: str
    n_prompts: int
    n_responses: int
    half_written: int
    set_aside: dict[str, int]
    in_both_modes: int | None
    modes: dict[Mode, ModeSummary]
    ref_logps: bool
    truncation: dict[Mode, Truncation] = field(default_factory=dict)
    preferences: PreferenceSummary | None = None

    def present(self) -> Presentation:
        """Counts by mode."""
        modes = self.modes
        rows = [(label, *(str(getattr(counts, name)) for counts in modes.values())) for name, label in _ROWS]
        rows += [(label, *(number(getattr(counts, name)) for counts in modes.values())) for name, label in _GAPS]
        table = ResultTable("Responses and pairs by mode", ("", *(_NAMES[mode] for mode in modes)), tuple(rows))
        return Presentation(
            "Preference pairs", tables=(table,), notes=tuple(self._notes()), cautions=tuple(self._cautions())
        )

    def written(self, folder: Path) -> str:
        """The sets and the report."""
        names = ", ".join(f"{mode}.jsonl and .parquet" for mode in self.modes)
        bank = "traces.jsonl, " if self.preferences is not None and self.preferences.drawn else ""
        return f"{names}, {bank}report.json in {folder}"

    def write(self, folder: Path) -> None:
        """As every report, and README.md: tells ``datasets.load_dataset(FOLDER, "thinking")`` which file is which."""
        lines = ["---", "configs:"]
        for mode in self.modes:
            lines += [f"- config_name: {mode}", f"  data_files: {mode}.parquet"]
        write_atomic(folder / "README.md", "\n".join([*lines, "---", "", self.markdown()]))
        super().write(folder)

    def _notes(self) -> list[str]:
        if self.preferences is not None:
            lines = [f"Model {self.model}, template {self.template}.", *self.preferences.notes()]
        else:
            lines = [
                f"Samples of {self.model}, template {self.template}; final answers scored by {self.reward}.",
                "Chosen and rejected: best and worst complete response by reward, the lowest sample index among "
                "equals.",
            ]
        if self.in_both_modes is not None:
            lines.append(f"{self.in_both_modes} prompts have a pair in both modes.")
        if self.half_written:
            lines.append(
                f"{self.half_written} half-written last line of the samples was passed over; resume the sampling run."
            )
        return lines

    def _cautions(self) -> list[str]:
        lines = [] if self.preferences is None else list(self.preferences.cautions())
        if self.preferences is not None and self.set_aside:
            reasons = "; ".join(f"{count}: {reason}" for reason, count in sorted(self.set_aside.items()))
            lines.append(f"{sum(self.set_aside.values())} rows were set aside ({reasons}); see set_aside.jsonl.")
        elif self.set_aside:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.set_aside.items()))
            lines.append(
                f"The sampling run set {sum(self.set_aside.values())} requests aside ({reasons}; see its "
                "set_aside*.jsonl). They are not among the responses counted here."
            )
        for mode, counts in self.modes.items():
            alike = counts.ties + counts.identical
            if alike > _MOST_TIED * counts.prompts:
                lines.append(
                    f"Ties: {alike} of {counts.prompts} prompts of {_NAMES[mode]} give no pair, since their answers "
                    "are the same or have the same reward. Draw more responses a prompt (`samples` of `sample`), take "
                    "other prompts or a finer `reward`."
                )
            elif not counts.pairs:
                lines.append(f"No pairs in {_NAMES[mode]}; the counts above say why.")
        pairs = [counts.pairs for counts in self.modes.values()]
        if self.in_both_modes is not None and self.in_both_modes < _FEW_JOINT * max(pairs) and min(pairs):
            lines.append(
                f"{self.in_both_modes} prompts have a pair in both modes, of {' and '.join(map(str, pairs))}: "
                "`bvpo-stats alpha-star` and `train` join D_t and D_e by prompt. Draw more responses a prompt "
                "(`samples` of `sample`) or take more prompts."
            )
        for mode, counts in self.modes.items():
            if mode in self.truncation:
                lines += self.truncation[mode].cautions(mode)
            if counts.other_tokens:
                lines.append(
                    f"In {counts.other_tokens} of {counts.pairs} pairs of {_NAMES[mode]} the sampler wrote other "
                    "tokens than the tokenizer makes of the text: the *_ids columns are exact, a trainer that "
                    "tokenises the text columns is not."
                )
        return lines


def write_run(report: PairsReport, folder: Path) -> None:
    """Ends a run whose pairs are in place: Parquet beside each mode's JSONL, then the report.

    Args:
        report: Of the run.
        folder: Its own; holds ``thinking.jsonl``, ``nothinking.jsonl`` or both.
    """
    without = () if report.ref_logps else ("ref_chosen_logps", "ref_rejected_logps")
    for mode in report.modes:
        pairs = read_records(folder / f"{mode}.jsonl", PreferencePair)
        write_records(folder / f"{mode}.parquet", pairs, PreferencePair, without=without)
    report.write(folder)
