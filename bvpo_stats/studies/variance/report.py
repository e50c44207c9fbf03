"""Appendix B for one model: the report that tables, figures and files are made from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bvpo_stats.sampling.engines.base import SamplingOptions
from bvpo_stats.studies.variance.profiles import Histogram, PositionBin
from bvpo_stats.studies.variance.tables import Definitions, VarianceTables


@dataclass(frozen=True)
class VarianceReport:
    """Appendix B for one model: everything the tables and figures show.

    Attributes:
        model: Identity of the model.
        seed: Seed of the run, None for responses from elsewhere.
        tables: Tables 3, 4 and 5.
        definitions: How they are defined.
        sampling: Sampling options, None for responses from elsewhere.
        template: Name of the protocol.
        published: The paper's row, where the model is one of its three.
        lengths: Distribution of lengths, tokens.
        logps: Distribution of joint log-probabilities, nats.
        positions: NLL along the trace and the answer.
        versions: Software versions.
    """

    model: str
    seed: int | None
    tables: VarianceTables
    definitions: Definitions
    sampling: SamplingOptions | None
    template: str
    published: dict[str, Any] | None
    lengths: Histogram
    logps: Histogram
    positions: dict[str, list[PositionBin]]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The report as it stands in ``report.json``: the tables at the top level."""
        plain = asdict(self)
        tables = plain.pop("tables")
        return {"study": "variance", **tables, **plain}
