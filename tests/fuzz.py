"""Files and options as they should not be: mutated, damaged, misspelled. Each attempt must end in one of three ways.

- ``right``: what changes nothing (order of fields, line ends, compression, unknown fields) gives the same numbers.
- ``refused``: exit code 2 and one line on stderr.
- ``repaired``: exit code 0 with the numbers of the undamaged input, or of the input without the damaged record.

Anything else is a fault: another number, a traceback, silence, a second line. ``python -m tests.fuzz --seed S --n N``
runs any number of attempts and prints the faults; the suite runs some hundred (`tests/test_fuzz.py`).
"""

from __future__ import annotations

import argparse
import functools
import gzip
import importlib
import json
import math
import random
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from bvpo_stats.errors import UserError
from bvpo_stats.gradients.examples import join
from bvpo_stats.model.policy import PolicyOptions, load_served_policy, load_template
from bvpo_stats.records import MODES, PreferencePair, Prompt, TraceRecord, to_dict
from bvpo_stats.sampling.layouts import read_pairs
from bvpo_stats.sampling.pairs import make_pairs
from bvpo_stats.sampling.prompts import load_prompts
from bvpo_stats.sampling.rewards import load_reward, score_answers
from bvpo_stats.sampling.rewards.base import Answer
from bvpo_stats.store.tables import read_records
from bvpo_stats.studies.alpha_star.config import AlphaInputs
from bvpo_stats.studies.alpha_star.run import load_traces
from tests.cli.running import Result, run
from tests.cli.test_nonsense import COMMANDS, NONSENSE, options_of
from tests.sampling.samples import both_modes, template

Row = dict[str, Any]
Rng = random.Random

LONG = "x" * 300
WRONG: tuple[Any, ...] = (
    *(True, -1, 1.5, 10**400, math.nan, math.inf, -math.inf, "", "\ud800", "a\x00b", LONG),
    *([], {}, [None], [[1]], ["1"], [-100], [10**9], [1.5], [True], {"a": 1}, [{"role": "user"}], None),
)
"""What hardly any field may be."""


@dataclass
class Tally:
    """Attempts by kind and outcome, and the faults in words."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{kind} {outcome}: {count}" for (kind, outcome), count in sorted(self.counts.items())]
        return f"{sum(self.counts.values())} attempts; {', '.join(parts)}"


@dataclass(frozen=True)
class Attempt:
    """One mutated input.

    Attributes:
        content: Bytes of the file.
        name: Its name.
        harmless: Whether it says the same as before, so that it must be read as before.
        row: The mutated row; None where the damage is the file's.
        words: What was done.
    """

    content: bytes
    name: str
    harmless: bool
    row: int | None
    words: str


def encoded(rows: list[Row], *, ascii_only: bool = False) -> bytes:
    """JSON lines; lone surrogates go in as escapes, NaN and infinity as JavaScript's words."""
    lines = []
    for row in rows:
        line = json.dumps(row, ensure_ascii=ascii_only)
        try:
            lines.append(line.encode() + b"\n")
        except UnicodeEncodeError:
            lines.append(json.dumps(row).encode() + b"\n")
    return b"".join(lines)


def harmless(rows: list[Row], stem: str, rng: Rng) -> Attempt:
    """The same records, written otherwise."""
    rows = [dict(rng.sample(list(row.items()), len(row))) for row in rows]
    data, name = encoded(rows, ascii_only=rng.random() < 0.3), f"{stem}.jsonl"
    words = ["fields shuffled"]
    changes: dict[str, Callable[[bytes], bytes]] = {
        "CRLF": lambda x: x.replace(b"\n", b"\r\n"),
        "blank lines": lambda x: x.replace(b"\n", b"\n\n   \n"),
        "no last newline": lambda x: x.rstrip(b"\n"),
        "byte order mark": lambda x: b"\xef\xbb\xbf" + x,
        "an unknown field": lambda x: x.replace(b"{", b'{"zz_note": "hello", ', 1),
    }
    for word in rng.sample(list(changes), rng.randrange(3)):
        data = changes[word](data)
        words.append(word)
    if rng.random() < 0.2:
        data, name = gzip.compress(data), f"{name}.gz"
        words.append("gzip")
    return Attempt(data, name, True, None, ", ".join(words))


def wrong_field(rows: list[Row], stem: str, rng: Rng) -> Attempt:
    """One field of one record is something it cannot be, or missing."""
    rows = [dict(row) for row in rows]
    number = rng.randrange(len(rows))
    name = rng.choice([key for key in rows[number] if key not in ("text", "trace", "answer", "chosen", "rejected")])
    old = rows[number][name]
    if rng.random() < 0.15:
        del rows[number][name]
        words = f"row {number} without {name}"
    elif isinstance(old, list) and rng.random() < 0.6:
        place = rng.randrange(len(old))
        value = rng.choice((-1, -100, 10**30, 1.5, True, None, "1", [1], math.nan))
        rows[number][name] = [*old[:place], value, *old[place + 1 :]]
        words = f"row {number}: {name}[{place}] = {value!r}"
    else:
        fine = {"prompt": (LONG,), "reward": (-1, 1.5)}.get(name, ())  # other data, but nothing wrong with it
        value = rng.choice([value for value in WRONG if value not in fine])
        rows[number][name] = value
        words = f"row {number}: {name} = {str(value)[:40]!r} ({type(value).__name__})"
    return Attempt(encoded(rows), f"{stem}.jsonl", False, number, words)


def damaged_file(rows: list[Row], stem: str, rng: Rng) -> Attempt:
    """The file itself is damaged, or something else under its name."""
    data, kind = encoded(rows), rng.randrange(9)
    place = rng.randrange(1, len(data))
    line = data.find(b"\n", place) + 1
    name, number = f"{stem}.jsonl", None
    if kind == 0:
        data, words = data[:place], f"cut at byte {place}"
        number = data.count(b"\n")
    elif kind == 1:
        data, words = data[:place] + b"\xff\xfe" + data[place:], f"not UTF-8 at byte {place}"
    elif kind == 2:
        data, words = rng.randbytes(200), "200 random bytes"
    elif kind == 3:
        deep = rng.choice((b"[", b'{"a":')) * 100_000
        data, words = data[:line] + deep + b"\n" + data[line:], "a line nested 100,000 deep"
    elif kind == 4:
        data, words = b"", "empty"
    elif kind == 5:
        name, data, words = f"{name}.gz", gzip.compress(data)[: place // 3], "a gzip file that ends early"
    elif kind == 6:
        data, words = data[:line] + b"[1, 2]\nnull\n" + data[line:], "lines that are no objects"
    elif kind == 7:
        name, words = f"{stem}.parquet", "JSON lines called Parquet"
    else:
        name, words = f"{stem}.json", "JSON lines called JSON"
    return Attempt(data, name, False, number, words)


def attempt(rows: list[Row], stem: str, rng: Rng) -> Attempt:
    """A mutated file of these records."""
    return rng.choices((harmless, wrong_field, damaged_file), (3, 6, 3))[0](rows, stem, rng)


Numbers = Any
Target = Callable[[Path, Path], Numbers]
"""Reads a file (working in a folder of its own) into the final numbers."""


class Fault(Exception):
    """A run that ended in none of the three ways."""


def answered(result: Result) -> None:
    """Raises UserError for a polite refusal, `Fault` for a rude one."""
    if result.returncode == 0:
        return
    lines = result.stderr.splitlines()
    polite = [line for line in lines if line.startswith("Error: ")]
    if result.returncode != 2 or len(polite) != 1 or lines[-1] != polite[0] or "Traceback" in result.stderr:
        raise Fault(f"exit code {result.returncode}: {result.stderr[-400:]}")
    raise UserError(polite[0])


@functools.cache
def responses() -> tuple[Row, ...]:
    """Responses of three prompts in both modes, every answer of a prompt with a reward of its own."""
    found = []
    for number, words in enumerate((("17", "18"), ("It is 17.", "99"), ("17", "The answer is 16."))):
        found += both_modes(f"p{number}", words)
    return tuple(json.loads(json.dumps(to_dict(completion))) for completion in found)


def as_texts() -> list[Row]:
    """The same as other programs write them: text alone."""
    kept = ("prompt_id", "mode", "prompt", "text", "finish_reason", "gold", "temperature")
    return [{name: row[name] for name in kept} for row in responses()]


def pair_lines(folder: Path) -> Numbers:
    """What counts in the pairs of a folder."""
    rows = [json.loads(line) for mode in MODES for line in (folder / f"{mode}.jsonl").read_text().splitlines()]
    names = ("prompt_id", "mode", "chosen_ids", "rejected_ids", "chosen_reward", "rejected_reward")
    return sorted([row[name] for name in names] for row in rows)


def from_responses(path: Path, work: Path) -> Numbers:
    """``sample --engine file`` and ``pairs``."""
    source = ("--engine", "file", "--model", "embedded", "--samples-from", path)
    answered(run("sample", *source, "--output", work / "samples"))
    answered(run("pairs", "--samples", work / "samples", "--reward", "embedded", "--output", work / "pairs"))
    return pair_lines(work / "pairs")


@functools.cache
def pairs_and_traces() -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Pairs of both sets, and their own traces as a bank."""
    completions = list(read_records([dict(row) for row in responses()]))
    pairs = make_pairs(completions, "embedded", policy=template())
    bank = []
    for pair in (pair for pair in pairs if pair.mode == "thinking"):
        for side, ids, start in (
            ("chosen", pair.chosen_ids, pair.chosen_answer_start),
            ("rejected", pair.rejected_ids, pair.rejected_answer_start),
        ):
            assert start is not None
            for source, index in (("anchor", 0), ("mh", 0), ("mh", 1)):
                bank.append(
                    TraceRecord(pair.prompt_id, side, source, index, pair.prompt_ids, ids, start, -3.5, -4.25, 1.0)  # type: ignore[arg-type]
                )
    return tuple(tuple(json.loads(json.dumps(to_dict(record))) for record in records) for records in (pairs, bank))  # type: ignore[return-value]


def examples_of(pairs: Any, traces: Any) -> Numbers:
    """What counts in examples."""
    joined = join(pairs, traces, unmatched="drop")
    return [
        [
            example.prompt_id,
            [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in example.pairs],
            [(t.side, t.source, t.index, t.completion_ids, t.trace_logp, t.joint_logp) for t in example.traces],
        ]
        for example in joined.examples
    ]


def from_pairs(path: Path, work: Path) -> Numbers:
    """A pairs file, joined with an undamaged bank."""
    bank = read_records([dict(row) for row in pairs_and_traces()[1]], TraceRecord)
    return examples_of(read_pairs(path, load_template(PolicyOptions())), bank)


def from_traces(path: Path, work: Path) -> Numbers:
    """A bank, joined with undamaged pairs."""
    pairs = read_records([dict(row) for row in pairs_and_traces()[0]], PreferencePair)
    return examples_of(pairs, load_traces(AlphaInputs(traces=str(path)), load_template(PolicyOptions())))


def prompts() -> list[Row]:
    """Questions with gold answers."""
    return [{"prompt_id": f"p{i}", "prompt": f"What is {i}+{i}?", "gold": str(2 * i)} for i in range(5)]


def from_prompts(path: Path, work: Path) -> Numbers:
    """A prompts file."""
    found: list[Prompt] = list(load_prompts(str(path)))
    return [prompt.question for prompt in found]  # a number or a long word may be an id


def scores() -> list[Row]:
    """Rewards computed elsewhere."""
    return [{"prompt_id": "p", "mode": "thinking", "sample_index": i, "reward": i / 4} for i in range(5)]


def from_scores(path: Path, work: Path) -> Numbers:
    """A file of scores."""
    answers = [Answer("p", "thinking", i, "q", "a", None) for i in range(5)]
    return [score for score in score_answers(load_reward(f"file:{path}"), answers) if score is not None]


FILES: dict[str, tuple[str, Callable[[], list[Row]], Target]] = {
    "responses": ("responses", lambda: [dict(row) for row in responses()], from_responses),
    "texts": ("responses", as_texts, from_responses),
    "pairs": ("pairs", lambda: [dict(row) for row in pairs_and_traces()[0]], from_pairs),
    "traces": ("traces", lambda: [dict(row) for row in pairs_and_traces()[1]], from_traces),
    "prompts": ("prompts", prompts, from_prompts),
    "scores": ("scores", scores, from_scores),
}
"""Name of the file, its records, and what reads them."""


class Fuzz:
    """Attempts one after another, in a folder of their own."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng, self.folder, self.tally = Rng(seed), folder, Tally()
        self.known: dict[tuple[str, int | None], Numbers] = {}
        self.number = 0

    def work(self) -> Path:
        """A fresh folder."""
        self.number += 1
        path = self.folder / str(self.number)
        path.mkdir()
        return path

    def numbers(self, kind: str, without: int | None = None) -> Numbers:
        """The final numbers of the undamaged records, or of all but one."""
        if (kind, without) not in self.known:
            stem, records, target = FILES[kind]
            work = self.work()
            rows = [row for number, row in enumerate(records()) if number != without]
            (work / f"{stem}.jsonl").write_bytes(encoded(rows))
            try:
                self.known[kind, without] = target(work / f"{stem}.jsonl", work)
            except UserError as error:
                self.known[kind, without] = str(error)
        return self.known[kind, without]

    def file(self) -> None:
        """A mutated file."""
        kind = self.rng.choices(list(FILES), (4, 4, 3, 3, 2, 1))[0]
        stem, records, target = FILES[kind]
        tried, work = attempt(records(), stem, self.rng), self.work()
        path = work / tried.name
        path.write_bytes(tried.content)
        accepted = [self.numbers(kind)]
        if tried.row is not None and tried.row < len(records()):
            accepted.append(self.numbers(kind, tried.row))
        self.judge(kind, tried.words, lambda: target(path, work), accepted, harmless=tried.harmless)

    def option(self) -> None:
        """A nonsense option; only what is refused or reached counts, nothing runs."""
        command = self.rng.choice(list(COMMANDS))
        _, place, needed = COMMANDS[command]
        module, _, name = place.partition(":")
        words = [*needed]
        for parameter in self.rng.sample(options_of(command), self.rng.randrange(1, 4)):
            words += [f"{parameter.flag}={self.rng.choice(NONSENSE)}"]
        reached = mock.Mock(side_effect=UserError("reached"))

        def call() -> None:
            with mock.patch.object(importlib.import_module(f"bvpo_stats.{module}"), name, reached):
                answered(run(command, *words, "--output", self.folder / "never"))

        self.judge("options", f"{command} {words!r}", call, [])

    def damage(self) -> None:
        """A byte of a finished run is turned over or its file cut; the same command, a report and readers go on."""
        work = self.work()
        (work / "responses.jsonl").write_bytes(encoded(FILES["responses"][1]()))
        from_responses(work / "responses.jsonl", work)
        files = sorted(path for path in work.rglob("*") if path.is_file() and path.name[0] != ".")
        path = self.rng.choice([path for path in files if path.parent != work and path.suffix not in (".md", ".png")])
        data = path.read_bytes()
        if data and self.rng.random() < 0.6:
            place = self.rng.randrange(len(data))
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << self.rng.randrange(8)]) + data[place + 1 :])
            words = f"a bit of byte {place} of {path.relative_to(work)}"
        else:
            place = self.rng.randrange(len(data) + 1)
            path.write_bytes(data[:place])
            words = f"{path.relative_to(work)} cut at {place}"

        def again() -> Numbers:
            if path.parent.name == "pairs" and self.rng.random() < 0.3:
                answered(run("report", work / "pairs", "--output", work / "page.html"))
                return self.numbers("responses")
            return from_responses(work / "responses.jsonl", work)

        self.judge("damage", words, again, [self.numbers("responses")])

    def judge(
        self, kind: str, words: str, call: Callable[[], Numbers], accepted: list[Numbers], *, harmless: bool = False
    ) -> None:
        """Sorts one attempt into its outcome."""
        try:
            found = call()
        except UserError as error:
            outcome, problem = "refused", None
            if harmless:
                problem = f"refused: {error}"
            elif not str(error).strip() or not str(error).isprintable():
                problem = f"a message that does not print: {error!r}"
        except Fault as fault:
            outcome, problem = "fault", str(fault)
        except Exception as error:
            where = traceback.format_exc().strip().splitlines()[-3:]
            outcome, problem = "fault", f"{type(error).__name__}: {str(error)[:200]} ({' '.join(where)[:300]})"
        else:
            outcome = "right" if harmless else "repaired"
            problem = None if found in accepted else f"another number: {str(found)[:300]}"
        self.tally.counts[kind, "fault" if problem else outcome] += 1
        if problem:
            self.tally.faults.append(f"{kind}: {words}: {problem}")


@contextmanager
def loaded_once() -> Iterator[None]:
    """The embedded tokenizer is read once, not at every attempt."""
    with (
        mock.patch("bvpo_stats.studies.sample.run.load_served_policy", functools.cache(load_served_policy)),
        mock.patch("bvpo_stats.studies.pairs.run.load_template", functools.cache(load_template)),
    ):
        yield


def fuzz(seed: int, n: int, folder: Path) -> Tally:
    """Makes n attempts.

    Args:
        seed: Decides all of them.
        n: How many.
        folder: Where they work; must exist.
    """
    found = Fuzz(seed, folder)
    with loaded_once():
        for _ in range(n):
            found.rng.choices((found.file, found.option, found.damage), (8, 2, 2))[0]()
    return found.tally


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = fuzz(arguments.seed, arguments.n, Path(folder))
    print(f"seed {arguments.seed}: {tally}")
    for fault in tally.faults:
        print(f"FAULT {fault}")
    sys.exit(1 if tally.faults else 0)


if __name__ == "__main__":
    main()
