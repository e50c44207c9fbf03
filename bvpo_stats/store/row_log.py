"""Results of slow work, row by row in a fixed order, that outlive a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.store.jsonl import append_jsonl, read_jsonl


class RowLog:
    """An append-only JSONL file whose rows are asked for in the same order by every run.

    What a killed run has finished is read back, in constant memory; what it has not is computed and appended. A portion
    that is partly on file is computed whole and only its missing rows are written, so every run does the same
    computations on the same batches.

    Args:
        path: The file; a half-written last line must have been cut (:func:`~bvpo_stats.store.jsonl.repair_tail`).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stored: Iterator[tuple[int, dict[str, Any]]] = read_jsonl(path) if path.exists() else iter(())

    def rows(
        self, keys: Sequence[dict[str, Any]], compute: Callable[[], Sequence[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """The rows of the next portion of work.

        Args:
            keys: The fields that identify each row of the portion.
            compute: Gives the remaining fields of all of them; called only where some are not on file.

        Raises:
            UserError: The file holds other rows than these.
        """
        stored = list(islice(self._stored, len(keys)))
        for (number, row), key in zip(stored, keys, strict=False):
            if any(row.get(name) != value for name, value in key.items()):
                raise UserError(
                    f"{self._path}:{number}: expected the row of {'/'.join(map(str, key.values()))}. The file was "
                    "changed since the run began; delete it to compute it anew."
                )
        found = [row for _, row in stored]
        if len(found) < len(keys):
            computed = [{**key, **values} for key, values in zip(keys, compute(), strict=True)]
            append_jsonl(self._path, computed[len(found) :])
            found += computed[len(found) :]
        return found
