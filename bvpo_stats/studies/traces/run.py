"""The traces run: K traces for each answer of D_t, ready for the marginal gradient (statistics of K traces)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy, load_policy, load_template
from bvpo_stats.progress import in_hand, progress, say
from bvpo_stats.records import PreferencePair, to_dict
from bvpo_stats.sampling.traces import (
    WINDOW,
    BankTally,
    TraceDrawer,
    check_one_temperature,
    sampling_temperature,
    window_traces,
)
from bvpo_stats.store.jsonl import append_jsonl, encode_row, mend, read_jsonl, write_atomic
from bvpo_stats.store.run_folder import open_run
from bvpo_stats.store.sample_index import SampleIndex, open_sample_index, samples_fingerprint
from bvpo_stats.store.tables import fingerprint, read_records, record_paths
from bvpo_stats.studies.traces.config import TracesConfig
from bvpo_stats.studies.traces.report import TracesReport

TRACES_FILE = "traces.jsonl"
_STATES_FILE = "progress.jsonl"


@dataclass(frozen=True)
class _State:
    """How far a run has got: the bank's first ``bytes`` bytes were made from the first ``pairs`` pairs."""

    pairs: int
    bytes: int
    tally: BankTally


def run_traces(config: TracesConfig, output: Path) -> TracesReport:
    """Makes (or resumes) a trace bank in a folder: ``traces.jsonl`` and a report.

    Pairs are worked on in windows; a run that was killed repeats at most one window, with the same random numbers.

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
    with open_run(output, "traces", identity) as folder:
        with open_sample_index(config.samples, folder / ".samples.sqlite", ("thinking",), vocabulary) as index:
            index.source.check_sampling_model(policy.identity)
            pairs = islice(read_records(pairs_path, PreferencePair, vocabulary=vocabulary), total)
            state, temperature = _fill_bank(config, policy, index, pairs, total, folder)
        report = TracesReport(
            model=policy.identity,
            template=policy.template.name,
            n_pairs=total,
            sampled_at=temperature,
            bank=config.bank,
            burn_in=config.bank.burn_in_moves(temperature),
            seed=config.seed,
            tally=state.tally,
        )
        report.write(folder)
    return report


def _fill_bank(
    config: TracesConfig,
    policy: Policy,
    index: SampleIndex,
    pairs: Iterator[PreferencePair],
    total: int,
    folder: Path,
) -> tuple[_State, float]:
    """Adds what is missing to the bank; returns its state and the temperature of the pairs' samples."""
    bank, states = folder / TRACES_FILE, folder / _STATES_FILE
    state = _restore(bank, states)
    drawer = TraceDrawer(policy, config.bank.temperature, config.seed, config.batch_size)
    temperatures: set[float] = set()
    done, k = 0, config.bank.traces_per_answer
    if state.pairs < total:
        kinds = {"posterior": {"anchor", "same-answer", "mh"}, "prior": {"prior"}}
        wanted = [f"{k} {kind}" for kind, sources in kinds.items() if sources & set(config.bank.sources)]
        say(
            f"Tracing: {total - state.pairs:,} pairs, two answers each, up to {' and '.join(wanted)} traces an answer: "
            f"{2 * k * len(wanted) * (total - state.pairs):,} traces at most."
        )
    with progress("Tracing", total, "pairs", done=state.pairs) as advance:
        while window := list(islice(pairs, WINDOW)):
            done += len(window)
            temperatures.update(map(sampling_temperature, window))
            check_one_temperature(temperatures)
            if done <= state.pairs:
                continue
            with in_hand(len(window)):
                records = window_traces(window, index.completions, drawer, config.bank, state.tally)
                append_jsonl(bank, map(to_dict, records))
            state = _State(done, bank.stat().st_size, state.tally)
            append_jsonl(states, [asdict(state)])
            advance(len(window))
    return state, temperatures.pop()


def _restore(bank: Path, states: Path) -> _State:
    """Reads how far a run has got, and cuts the bank back to there; to an earlier window where rows of it are damaged.

    Raises:
        UserError: The states are of another kind.
    """
    for path in (bank, states):
        mend(path, ordered=True)
    size = bank.stat().st_size if bank.exists() else 0
    state, kept = _State(0, 0, BankTally()), []
    for number, row in read_jsonl(states) if states.exists() else ():
        try:
            found = _State(row["pairs"], row["bytes"], BankTally(**row["tally"]))
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
