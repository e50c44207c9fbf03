"""The traces run: K traces for each answer of D_t, ready for the marginal gradient (statistics of K traces)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy, load_policy, load_template
from bvpo_stats.progress import in_hand, progress, say
from bvpo_stats.records import Completion, PreferencePair, to_dict
from bvpo_stats.sampling.scoring import RATIO_PAIRS, sampler_ratio
from bvpo_stats.sampling.traces import (
    WINDOW,
    BankTally,
    TraceDrawer,
    check_one_temperature,
    sampling_temperature,
    window_traces,
)
from bvpo_stats.store.jsonl import append_jsonl, encode_row, mend, read_jsonl, write_atomic
from bvpo_stats.store.run_folder import grow, open_run
from bvpo_stats.store.sample_index import open_sample_index, samples_fingerprint
from bvpo_stats.store.tables import fingerprint, read_records, record_paths
from bvpo_stats.studies.traces.config import TracesConfig
from bvpo_stats.studies.traces.report import TracesReport

TRACES_FILE = "traces.jsonl"
_STATES_FILE = "progress.jsonl"


@dataclass(frozen=True)
class _State:
    """How far a run has got.

    Attributes:
        pairs: Pairs done.
        bytes: Bytes of the bank that were made from them.
        tally: Counts over them.
        keys: What they were made from, see `_key`; fewer than pairs where an older version did not say.
    """

    pairs: int
    bytes: int
    tally: BankTally
    keys: Counter[str]


def run_traces(config: TracesConfig, output: Path) -> TracesReport:
    """Makes (or resumes) a trace bank in a folder: ``traces.jsonl`` and a report.

    Pairs are worked on in windows; a run that was killed repeats at most one window, with the same random numbers. A
    bank can be extended: what is there is kept where the pairs now are those it was made from, and more.

    Raises:
        UserError: Anything wrong with the input; see the message.
    """
    (pairs_path,) = record_paths(config.pairs, PreferencePair, mode="thinking", name="pairs")
    vocabulary = load_template(config.policy).vocabulary
    total, temperatures = 0, set()
    for number, pair in enumerate(read_records(pairs_path, PreferencePair, vocabulary=vocabulary), start=1):
        if config.limit is None or number <= config.limit:
            total = number
            temperatures.add(sampling_temperature(pair))
    if not total:
        raise UserError(f"{pairs_path} holds no pairs, so there is nothing to find traces for.")
    check_one_temperature(temperatures)
    samples = samples_fingerprint(config.samples)
    policy = load_policy(config.policy)
    identity = {
        "pairs": fingerprint(pairs_path, "pairs"),
        "samples": samples,
        "limit": config.limit,
        "model": policy.identity,
        "template": policy.template.name,
        "dtype": str(policy.model.dtype),
        "seed": config.seed,
        **asdict(config.bank),
    }
    with open_run(output, "traces", identity, growing=_GROWING) as folder:
        with open_sample_index(config.samples, folder / ".samples.sqlite", ("thinking",), vocabulary) as index:
            index.source.check_sampling_model(policy.identity)
            state = _restore(folder / TRACES_FILE, folder / _STATES_FILE)

            def sources() -> Iterator[_Source]:
                for pair in islice(read_records(pairs_path, PreferencePair, vocabulary=vocabulary), total):
                    yield _Source(pair, index.completions(pair.prompt_id))

            def contained(stored: dict[str, Any]) -> bool:
                return state.keys.total() == state.pairs and not state.keys - Counter(each.key for each in sources())

            grow(folder, identity, _GROWING, contained)
            state = _fill_bank(config, policy, sources(), state, total, folder)
        some = islice(
            read_records(pairs_path, PreferencePair, vocabulary=vocabulary), 0, total, -(-total // RATIO_PAIRS)
        )
        (temperature,) = temperatures
        report = TracesReport(
            model=policy.identity,
            template=policy.template.name,
            n_pairs=total,
            sampled_at=temperature,
            bank=config.bank,
            burn_in=config.bank.burn_in_moves(temperature),
            seed=config.seed,
            tally=state.tally,
            sampler=sampler_ratio(policy, some),
        )
        report.write(folder)
    return report


@dataclass(frozen=True)
class _Source:
    """What the traces of a pair are made from: itself, and the responses to its prompt."""

    pair: PreferencePair
    samples: list[Completion]

    @property
    def key(self) -> str:
        """A hash of all that decides the pair's traces."""
        pair = self.pair
        content = [
            [pair.prompt_id, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, pair.temperature],
            [[s.sample_index, s.completion_ids, s.answer_start, s.max_new_tokens] for s in self.samples],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


_GROWING = ("pairs", "samples", "limit")


def _fill_bank(
    config: TracesConfig, policy: Policy, sources: Iterator[_Source], state: _State, total: int, folder: Path
) -> _State:
    """Adds what is missing to the bank; returns its state."""
    bank, states = folder / TRACES_FILE, folder / _STATES_FILE
    drawer = TraceDrawer(policy, config.bank.temperature, config.seed, config.batch_size)
    k = config.bank.traces_per_answer
    if state.pairs < total:
        kinds = {"posterior": {"anchor", "same-answer", "mh"}, "prior": {"prior"}}
        wanted = [f"{k} {kind}" for kind, sources_ in kinds.items() if sources_ & set(config.bank.sources)]
        say(
            f"Tracing: {total - state.pairs:,} pairs, two answers each, up to {' and '.join(wanted)} traces an answer: "
            f"{2 * k * len(wanted) * (total - state.pairs):,} traces at most."
        )
    missing = _missing(sources, state)
    with progress("Tracing", total, "pairs", done=state.pairs) as advance:
        while window := list(islice(missing, WINDOW)):
            samples = {source.pair.prompt_id: source.samples for source in window}
            with in_hand(len(window)):
                pairs = [source.pair for source in window]
                records = window_traces(pairs, samples.__getitem__, drawer, config.bank, state.tally)
                append_jsonl(bank, map(to_dict, records))
            done, keys = state.pairs + len(window), [source.key for source in window]
            state = _State(done, bank.stat().st_size, state.tally, state.keys + Counter(keys))
            row = {"pairs": state.pairs, "bytes": state.bytes, "tally": asdict(state.tally), "keys": keys}
            append_jsonl(states, [row])
            advance(len(window))
    return state


def _missing(sources: Iterator[_Source], state: _State) -> Iterator[_Source]:
    """The pairs that are not in the bank."""
    done = Counter(state.keys)
    if done.total() < state.pairs:  # an older version wrote it, which went by the order of the pairs
        yield from islice(sources, state.pairs, None)
        return
    for source in sources:
        if done and done[source.key]:
            done[source.key] -= 1
        else:
            yield source


def _restore(bank: Path, states: Path) -> _State:
    """Reads how far a run has got, and cuts the bank back to there; to an earlier window where rows of it are damaged.

    Raises:
        UserError: The states are of another kind.
    """
    for path in (bank, states):
        mend(path, ordered=True)
    size = bank.stat().st_size if bank.exists() else 0
    state, kept = _State(0, 0, BankTally(), Counter()), []
    for number, row in read_jsonl(states) if states.exists() else ():
        try:
            keys = state.keys + Counter(row.get("keys", ()))
            found = _State(row["pairs"], row["bytes"], BankTally(**row["tally"]), keys)
        except (KeyError, TypeError) as error:
            raise UserError(f"{states}:{number}: no state of a traces run. Name a new `output` folder.") from error
        if found.bytes > size:
            say(f"{bank} is shorter than it was: goes on behind pair {state.pairs}.")
            break
        state = found
        kept.append(row)
    write_atomic(states, "".join(encode_row(row) + "\n" for row in kept))
    with bank.open("ab") as handle:
        handle.truncate(state.bytes)
    return state
