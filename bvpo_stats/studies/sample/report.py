"""The report of a sampling run: what is on record by mode, and how fast it went."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bvpo_stats.records import Mode
from bvpo_stats.sampling.engines.base import SamplingOptions
from bvpo_stats.sampling.sample import ModeSummary, SamplingTally
from bvpo_stats.store.jsonl import write_atomic, write_sealed
from bvpo_stats.store.run_folder import parse_shard
from bvpo_stats.studies.base import REPORT_FILE, Presentation, Report, ResultTable

_HEAD = ("Mode", "Responses", "Length", "Trace", "Answer", "Cut", "Unclosed", "Empty")


@dataclass(frozen=True)
class SampleReport(Report):
    """What a sampling run has on record, and how fast it went.

    Attributes:
        engine: Name of the engine.
        model: Identity of the model.
        template: Name of the protocol.
        prompts: Fingerprint of the prompts (count and hash) or of the file.
        shard: ``i/n``.
        sampling: Sampling options, None for responses from elsewhere.
        dialect: How the server was asked, None for the other engines or when nothing was left to ask.
        modes: Summary by mode, of everything on record (of a shard: its own part).
        set_aside: Requests set aside, by reason.
        set_aside_first: What happened to the first of them, by reason.
        tally: What this call drew.
        tokens_per_second: Tokens drawn a second by this call, None where it had nothing left to draw.
    """

    study: ClassVar[str] = "sample"

    engine: str
    model: str
    template: str
    prompts: str
    shard: str
    sampling: SamplingOptions | None
    dialect: str | None
    modes: dict[Mode, ModeSummary]
    set_aside: dict[str, int]
    set_aside_first: dict[str, str]
    tally: SamplingTally
    tokens_per_second: float | None

    def present(self) -> Presentation:
        """Counts and mean lengths by mode."""
        shard = "" if self.shard == "1/1" else f", shard {self.shard}"
        table = ResultTable(
            f"Responses on record{shard}; mean lengths in tokens",
            _HEAD,
            tuple(_row(name, mode) for name, mode in self.modes.items()),
        )
        return Presentation(
            "Sampled responses", tables=(table,), notes=tuple(self._notes()), cautions=tuple(self._cautions())
        )

    def written(self, folder: Path) -> str:
        """The folder."""
        return f"{folder}/"

    def write(self, folder: Path) -> None:
        """Writes ``report.md`` and ``report.json``; a shard's carry its number."""
        shard = parse_shard(self.shard)
        write_atomic(shard.file(folder, "report.md"), self.markdown())
        write_sealed(shard.file(folder, REPORT_FILE), self.to_json())

    def _notes(self) -> list[str]:
        lines = [f"Model {self.model}, template {self.template}, engine {self.engine}."]
        if self.sampling is not None:
            s = self.sampling
            lines.append(
                f"{s.samples} responses per prompt and mode at temperature {s.temperature:g}, top-p {s.top_p:g}, "
                f"at most {s.max_new_tokens} new tokens, seed {s.seed}."
            )
        if self.set_aside:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.set_aside.items()))
            total = sum(self.set_aside.values())
            lines.append(f"Set aside: {total} requests ({reasons}); see set_aside*.jsonl.")
            lines += [f"First {reason}: {what}" for reason, what in sorted(self.set_aside_first.items())]
        if self.tokens_per_second is None:
            lines.append("Nothing was left to draw.")
        else:
            tally = self.tally
            lines.append(
                f"This call: {tally.responses} responses, {tally.tokens} tokens in {tally.seconds:.1f} s "
                f"({self.tokens_per_second:.0f} tokens per second)."
            )
        return lines

    def _cautions(self) -> list[str]:
        """What a reader should worry about."""
        lines = []
        for name, mode in self.modes.items():
            lines += mode.truncation.cautions(name, drawn_here=self.engine != "file")
        if sum(self.set_aside.values()) > sum(mode.responses for mode in self.modes.values()):
            hint = " Is `model` the model that the server serves?" if self.engine == "openai" else ""
            lines.append(f"More was set aside than kept.{hint}")
        if self.dialect is not None and self.dialect.endswith("plain"):
            lines.append(
                "This server takes OpenAI's own fields only; top-k and other defaults of its own may be in force."
            )
        return lines


def _row(name: str, mode: ModeSummary) -> tuple[str, ...]:
    means = (getattr(mode, key) for key in ("mean_tokens", "mean_trace_tokens", "mean_answer_tokens"))
    flaws = (getattr(mode, key) for key in ("truncated", "unclosed", "empty_answers"))
    shown = ["-" if mean is None else f"{mean:.1f}" for mean in means]
    return (name, str(mode.responses), *shown, *map(str, flaws))
