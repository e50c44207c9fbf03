"""Pairs of preference data of elsewhere: D_e from the answers alone, D_t with traces drawn for them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from bvpo_stats import options as o
from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import Policy, load_policy
from bvpo_stats.model.templates import Template
from bvpo_stats.progress import in_hand, progress, say
from bvpo_stats.records import MODES, SIDES, PreferencePair, TraceRecord, from_dict, to_dict
from bvpo_stats.sampling.layouts import foreign_pair, plain_row
from bvpo_stats.sampling.pairs import reads_back, reference_logps, training_text
from bvpo_stats.sampling.preferences import check_layout, layout_of, preference_rows
from bvpo_stats.sampling.sample import SET_ASIDE_FILE
from bvpo_stats.sampling.traces import WINDOW, BankOptions, BankTally, PairSide, TraceDrawer, traces_for_answers
from bvpo_stats.store.jsonl import RowLog, append_jsonl, encode_row, write_atomic
from bvpo_stats.store.run_folder import open_run
from bvpo_stats.store.tables import source_rows
from bvpo_stats.studies.pairs.config import PairsConfig, PreferenceOptions
from bvpo_stats.studies.pairs.report import ModeTally, PairsReport, PreferenceSummary, write_run

TRACES_FILE = "traces.jsonl"
_DONE_FILE = "done.jsonl"
_PLACEHOLDER = "."
"""A trace that stands where one will be drawn, so that the answer is tokenised behind a closing tag."""


@dataclass(frozen=True)
class _Answers:
    """A row's two answers.

    Attributes:
        pair: Of D_t, with the traces that came with them, or with a placeholder in their place.
        empty: Of D_e.
        given: Whether traces came with them.
    """

    pair: PreferencePair
    empty: PreferencePair
    given: bool

    @property
    def gap(self) -> float | None:
        """Difference of the scores, where both are there."""
        high, low = self.pair.chosen_reward, self.pair.rejected_reward
        return None if high is None or low is None else high - low


def run_preferences(config: PairsConfig, options: PreferenceOptions, output: Path) -> PairsReport:
    """Makes (or resumes) D_t, D_e and a trace bank in a folder.

    Rows are worked on in windows; what a killed run has finished is kept. A row that cannot be used is set aside with
    its reason; data of an unknown shape are refused.

    Raises:
        UserError: Anything wrong with the input; see the message.
    """
    counts, content = _survey(options)
    policy = load_policy(config.policy)
    bank = BankOptions(options.traces_per_answer, ("mh", "prior"), 1.0, options.mh_moves, options.burn_in)
    cut_off = o.max_new_tokens(options.max_new_tokens, config.policy.model)
    identity = {
        "preferences": content,
        "limit": options.limit,
        "model": policy.identity,
        "template": policy.template.name,
        "dtype": str(policy.model.dtype),
        "seed": options.seed,
        "max_new_tokens": cut_off,
        "reference": config.ref_logps,
        "min_gap": config.min_gap,
        "modes": list(config.modes),
        **asdict(bank),
    }
    tallies = {mode: ModeTally() for mode in config.modes}
    set_aside: list[dict[str, str]] = []
    tally, kinds = BankTally(), Counter[str]()
    drawer = TraceDrawer(policy, bank.temperature, options.seed, options.batch_size)
    with open_run(output, "pairs", identity) as folder:
        parts = {name: folder / f"{name}.part" for name in (*(f"{mode}.jsonl" for mode in config.modes), TRACES_FILE)}
        for part in parts.values():
            part.write_bytes(b"")
        log = RowLog(folder / _DONE_FILE)
        answers = islice(_answers(config, options, policy.template, tallies, set_aside), options.limit)
        joint, number = 0, 0
        with progress("Pairing", min(options.limit or counts.total(), counts.total()), "pairs") as advance:
            while window := list(islice(answers, WINDOW)):
                keys = [{"row": number + place, "prompt_id": a.pair.prompt_id} for place, a in enumerate(window)]
                with in_hand(len(window)):
                    rows = log.rows(keys, partial(_finished, window, number, config, drawer, bank, cut_off))
                for each, row in zip(window, rows, strict=True):
                    _add(tally, row["tally"])
                    pairs = [from_dict(PreferencePair, dict(pair), _DONE_FILE) for pair in row["pairs"]]
                    kinds["given" if each.given else "drawn"] += any(pair.mode == "thinking" for pair in pairs)
                    joint += len(pairs) == len(MODES)
                    for mode in config.modes:
                        tallies[mode].counts["prompts"] += 1
                        tallies[mode].counts["responses"] += 2
                        made = [pair for pair in pairs if pair.mode == mode]
                        tallies[mode].counts["pairs"] += len(made)
                        tallies[mode].counts["too_few"] += not made
                        tallies[mode].counts["unclosed"] += row["unclosed"] if mode == "thinking" else 0
                        for pair in made:
                            tallies[mode].count_pair(pair, exact_text=reads_back(pair, policy.template.tokenizer))
                            append_jsonl(parts[f"{mode}.jsonl"], [to_dict(pair)], sums=False)
                    append_jsonl(parts[TRACES_FILE], row["traces"], sums=False)
                number += len(window)
                advance(len(window))
        if not number and set_aside:
            raise UserError(f"No row gives a pair. {set_aside[0]['reason']}")
        write_atomic(folder / SET_ASIDE_FILE, "".join(encode_row(row) + "\n" for row in set_aside))
        for name, part in parts.items():
            part.replace(folder / name)
        if not kinds["drawn"]:
            (folder / TRACES_FILE).unlink()
        report = PairsReport(
            model=policy.identity,
            template=policy.template.name,
            reward="the data's",
            n_prompts=number,
            n_responses=2 * number,
            half_written=0,
            set_aside=dict(Counter(row["kind"] for row in set_aside)),
            in_both_modes=joint if len(config.modes) == 2 else None,
            modes={mode: tally_.summary() for mode, tally_ in tallies.items()},
            ref_logps=config.ref_logps,
            preferences=PreferenceSummary(dict(counts), kinds["given"], kinds["drawn"], bank, tally),
        )
        write_run(report, folder)
    return report


def _rows(options: PreferenceOptions) -> Iterator[tuple[str, Any]]:
    for where, row in source_rows(options.source, options.split, "source", config_name=options.config_name):
        check_layout(row, where)
        yield where, row


def _survey(options: PreferenceOptions) -> tuple[Counter[str], str]:
    """Rows by layout, and a hash of them all; the first of an unknown shape is refused."""
    counts, digest = Counter[str](), hashlib.sha256()
    for _, row in _rows(options):
        counts[layout_of(row) or ""] += 1
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    if not counts:
        raise UserError(f"`source={options.source!r}` holds no rows.")
    say(f"Preferences: {', '.join(f'{count:,} rows of {name}' for name, count in counts.items())}.")
    return counts, digest.hexdigest()[:16]


def _answers(
    config: PairsConfig,
    options: PreferenceOptions,
    template: Template,
    tallies: dict[Any, ModeTally],
    set_aside: list[dict[str, str]],
) -> Iterator[_Answers]:
    """The rows that can be used; the others are counted, or set aside with their reason."""
    for where, row in preference_rows(_rows(options)):
        if row is None:
            for tally in tallies.values():
                tally.counts["prompts"] += 1
                tally.counts["ties"] += 1
            continue
        try:
            found = _both(row, template, where)
        except UserError as error:
            reason = str(error).removeprefix(f"{where}: ")
            set_aside.append({"place": where, "kind": reason.partition(". ")[0][:80], "reason": str(error)})
            continue
        if found.gap is not None and found.gap < max(config.min_gap, 0.0):
            for tally in tallies.values():
                tally.counts["prompts"] += 1
                tally.counts["small_gap"] += 1
            continue
        yield found


def _both(row: dict[str, Any], template: Template, where: str) -> _Answers:
    """D_t and D_e of one row.

    Raises:
        UserError: An answer that is empty or ambiguous, or traces for one of the two alone.
    """
    tag = template.protocol.close_tag
    if row.get("prompt_ids") is None:
        row = plain_row(row, template, where)
        texts = [str(row["chosen"]), str(row["rejected"])]
    else:  # token ids; whatever they say, it is in the texts, too
        pair = foreign_pair(dict(row), template, "thinking", where)
        texts = [pair.chosen, pair.rejected]
    traced = [tag in text for text in texts]
    if traced[0] != traced[1]:
        raise UserError(f"{where}: one of the two answers has a trace, the other none.")
    if traced[0]:
        pair = foreign_pair(dict(row), template, "thinking", where)
        answers = [pair.chosen_answer or "", pair.rejected_answer or ""]
    elif row.get("prompt_ids") is not None:
        raise UserError(f"{where}: token ids without a trace; give the answers as text.")
    else:
        answers = texts
        joined = [template.joined(_PLACEHOLDER, text) for text in texts]
        pair = foreign_pair({**row, "chosen": joined[0], "rejected": joined[1]}, template, "thinking", where)
    prompt = {"prompt": pair.prompt, "prompt_id": pair.prompt_id} if row.get("prompt_ids") is not None else {}
    rest = {name: value for name, value in row.items() if not name.endswith("_ids")}
    empty = foreign_pair(
        {**rest, **prompt, "chosen": answers[0], "rejected": answers[1]}, template, "nothinking", where
    )
    both = [
        replace(each, temperature=None, top_p=None, top_k=None, model=None, template=template.name)
        for each in (pair, replace(empty, prompt_id=pair.prompt_id))
    ]
    return _Answers(both[0], both[1], traced[0])


def _finished(
    window: Sequence[_Answers], first: int, config: PairsConfig, drawer: TraceDrawer, bank: BankOptions, cut_off: int
) -> list[dict[str, Any]]:
    """What goes on record of a window: its pairs, their bank, and what the chains did."""
    policy, tally = drawer.policy, BankTally()
    sides = [
        _side(answers.pair, side, first + place, policy, cut_off)
        for place, answers in enumerate(window)
        if not answers.given and "thinking" in config.modes
        for side in SIDES
    ]
    traces = {side.name: found for side, found in zip(sides, _drawn(sides, drawer, bank, tally), strict=True)}
    rows: list[dict[str, Any]] = []
    for place, answers in enumerate(window):
        pairs = {"thinking": answers.pair, "nothinking": answers.empty}
        own: list[TraceRecord] = []
        unclosed = 0
        if not answers.given and "thinking" in config.modes:
            banks = [traces[f"{first + place}/{answers.pair.prompt_id}/{side}"] for side in SIDES]
            unclosed = sum(not found for found in banks)
            own = [replace(trace, prompt_id=answers.pair.prompt_id) for found in banks for trace in found]
            if unclosed:
                del pairs["thinking"]
                own = []
            else:
                pairs["thinking"] = _with_traces(answers.pair, own, policy.template)
        made = [pair for mode, pair in pairs.items() if mode in config.modes]
        if config.ref_logps:
            made = [
                replace(pair, **logps)  # type: ignore[arg-type]
                for pair, logps in zip(made, reference_logps(policy, made), strict=True)
            ]
        rows.append({"pairs": [to_dict(p) for p in made], "traces": [to_dict(t) for t in own], "unclosed": unclosed})
    for place, row in enumerate(rows):  # the window's chains ran together, so the first row has their counts
        row["tally"] = asdict(tally if place == 0 else BankTally())
    return rows


def _drawn(
    sides: Sequence[PairSide], drawer: TraceDrawer, bank: BankOptions, tally: BankTally
) -> list[list[TraceRecord]]:
    return traces_for_answers(sides, drawer, bank, tally) if sides else []


def _side(pair: PreferencePair, side: Any, number: int, policy: Policy, cut_off: int) -> PairSide:
    ids, start = (
        (pair.chosen_ids, pair.chosen_answer_start)
        if side == "chosen"
        else (pair.rejected_ids, pair.rejected_answer_start)
    )
    answer = ids[start:]
    room = None if policy.max_positions is None else policy.max_positions - len(pair.prompt_ids)
    longest = cut_off if room is None else min(cut_off, room)
    name = f"{number}/{pair.prompt_id}"  # several rows may ask the same
    return PairSide(name, side, pair.prompt, pair.prompt_ids, (), answer, max(longest - len(answer), 1), (), ())


def _with_traces(pair: PreferencePair, traces: Sequence[TraceRecord], template: Template) -> PreferencePair:
    """The pair with the first of the posterior traces of each answer."""
    chosen, rejected = (next(t for t in traces if t.source == "anchor" and t.side == side) for side in SIDES)
    return replace(
        pair,
        chosen=training_text(chosen.completion_ids, template.tokenizer),
        rejected=training_text(rejected.completion_ids, template.tokenizer),
        chosen_ids=chosen.completion_ids,
        rejected_ids=rejected.completion_ids,
        chosen_answer_start=chosen.answer_start,
        rejected_answer_start=rejected.answer_start,
    )


def _add(tally: BankTally, more: dict[str, Any]) -> None:
    """Adds the counts of a window."""
    for name, value in more.items():
        known = getattr(tally, name)
        total = {key: known[key] + value[key] for key in known} if isinstance(known, dict) else known + value
        setattr(tally, name, total)
