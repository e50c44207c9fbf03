"""Settings of an alpha-star run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from bvpo_stats import options as o
from bvpo_stats.model.options import EMBEDDED
from bvpo_stats.records import Mode, PreferencePair, TraceRecord
from bvpo_stats.store.tables import record_paths


@dataclass(frozen=True)
class AlphaInputs:
    """Where the records of a run are.

    Attributes:
        pairs: D_t: ``embedded``, a file, or the folder of a pairs run.
        empty_pairs: D_e, likewise; None for what lies beside D_t.
        traces: Trace bank: a file or the folder of a traces run; None for none (or the embedded one).
        limit: Use only the first so many prompts.
    """

    pairs: Annotated[
        str, o.Option("D_t: a pairs file (JSONL or Parquet) or the folder of a pairs run; `embedded`.")
    ] = EMBEDDED
    empty_pairs: Annotated[str | None, o.Option("D_e, likewise. [default: what lies beside `pairs`]")] = None
    traces: Annotated[
        str | None, o.Option("Trace bank, for mu away from the reference point: file or folder of a run.")
    ] = None
    limit: o.Limit = None

    def __post_init__(self) -> None:
        o.check_options(self)

    def paths(self) -> tuple[Path, Path, Path | None]:
        """Files of D_t, D_e and the traces.

        Raises:
            UserError: One of them is not there.
        """
        return self.set_path("thinking"), self.set_path("nothinking"), self.traces_path()

    def set_path(self, mode: Mode) -> Path:
        """File of D_t (``thinking``) or D_e (``nothinking``).

        Raises:
            UserError: It is not there.
        """
        if mode == "thinking":
            (path,) = record_paths(self.pairs, PreferencePair, mode=mode, name="pairs")
        else:
            source = self.pairs if self.empty_pairs is None else self.empty_pairs
            (path,) = record_paths(source, PreferencePair, mode=mode, name="empty_pairs")
        return path

    def traces_path(self) -> Path | None:
        """File of the trace bank; None where there is none.

        Raises:
            UserError: It is not there.
        """
        traces = EMBEDDED if self.traces is None and self.pairs == EMBEDDED else self.traces
        return None if traces is None else record_paths(traces, TraceRecord, name="traces")[0]
