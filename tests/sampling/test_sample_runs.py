"""``sample`` as a whole: runs, shards side by side, kills, exports, and what a user can get wrong."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.model.policy import PolicyOptions, load_policy
from bvpo_stats.records import Completion, Truncation, arrow_schema, from_dict, to_dict
from bvpo_stats.sampling.engines.base import SamplingOptions
from bvpo_stats.sampling.engines.server import ServerOptions
from bvpo_stats.sampling.sample import _look
from bvpo_stats.store.run_folder import Shard
from bvpo_stats.store.tables import read_records
from bvpo_stats.studies.sample.config import SampleConfig
from bvpo_stats.studies.sample.run import run_sample
from tests.cli.running import failed_politely, run
from tests.processes import python
from tests.sampling import killed_runs
from tests.sampling.fake_server import Reply, serve
from tests.sampling.samples import sample

ROOT = Path(__file__).parents[2]
PROMPTS = 66


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"id": f"q{n}", "prompt": "1+" * (n * 7 % 11) + "1=?", "answer": n * 7 % 11 + 1} for n in range(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def config(random_model: Path, prompts: str) -> SampleConfig:
    return killed_runs.config(str(random_model), prompts)


@pytest.fixture(scope="module")
def uninterrupted(config: SampleConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run_sample(replace(config, parquet=True), folder)
    return folder


def run_processes(*arguments: object) -> list[list[int]]:
    done = python("-m", "tests.sampling.killed_runs", *arguments)
    assert done.returncode == 0, done.stderr
    ends: list[list[int]] = json.loads(done.stdout)
    return ends


def lines(folder: Path) -> list[str]:
    return sorted(line for path in folder.glob("samples*.jsonl") for line in path.read_text().splitlines())


def drawn(folder: Path) -> dict[str, float]:
    """Responses as they are on record, and log q of each, which goes with its batch up to rounding."""
    rows = [json.loads(line) for line in lines(folder)]
    return {json.dumps(row | {"sampler_logp": None}): row["sampler_logp"] for row in rows}


def test_damaged_responses_are_drawn_again_and_none_counts_twice(
    uninterrupted: Path, config: SampleConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    samples = run / "samples.jsonl"
    rows = samples.read_bytes().splitlines(keepends=True)
    digit = rows[3].replace(b'"completion_ids":[', b'"completion_ids":[1', 1)
    samples.write_bytes(b"".join([*rows[:3], digit, *rows[4:], rows[0]]))
    with pytest.raises(UserError, match=r"samples\.jsonl:4: the line is not as it was written, or comes twice"):
        list(read_records(run, Completion))
    report = run_sample(config, run)
    assert lines(run) == lines(uninterrupted)
    assert report.modes["thinking"].responses == report.modes["nothinking"].responses == PROMPTS * 4
    assert "samples.jsonl: 2 damaged or copied lines cut, the first of them line 4" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["answer", "prompt"])
def test_corrected_prompts_or_golds_in_the_same_file(
    uninterrupted: Path, config: SampleConfig, tmp_path: Path, column: str
) -> None:
    rows = [json.loads(line) for line in Path(config.prompts).read_text().splitlines()]
    rows[5][column] = "7"
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"answer": "gold answers", "prompt": "prompts"}[column]
    with pytest.raises(UserError, match=rf"different run \({words}: .* there, .* now\)"):
        run_sample(replace(config, prompts=str(tmp_path / "prompts.jsonl")), uninterrupted)


def test_a_run_is_complete_and_reported(uninterrupted: Path, config: SampleConfig) -> None:
    found = list(read_records(uninterrupted, Completion))
    assert len({completion.key for completion in found}) == len(found) == PROMPTS * 2 * 4
    report = json.loads((uninterrupted / "report.json").read_text())
    assert report["modes"]["thinking"]["responses"] == report["modes"]["nothinking"]["responses"] == PROMPTS * 4
    assert report["tally"]["tokens"] == sum(len(completion.completion_ids) for completion in found)
    assert report["model"] == found[0].model == load_policy(config.policy or PolicyOptions()).identity
    assert report["sampling"]["temperature"] == 0.5
    assert all(completion.gold is not None for completion in found)


def test_parquet_holds_the_same_records(uninterrupted: Path, tmp_path: Path) -> None:
    table = datasets.load_dataset(
        "parquet",
        data_files=str(uninterrupted / "samples.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert table.column_names == arrow_schema(Completion).names
    rows = [from_dict(Completion, row) for row in table]
    assert rows == list(read_records(uninterrupted, Completion))


@pytest.mark.slow
def test_ten_kills_leave_no_duplicate_and_no_hole(
    uninterrupted: Path, tmp_path: Path, random_model: Path, prompts: str
) -> None:
    *killed, last = run_processes("kills", 10, random_model, prompts, tmp_path / "run")
    sizes = [size for _, size in killed]
    assert [code for code, _ in killed] == [-signal.SIGKILL] * 10
    assert sizes == sorted(sizes)  # nothing that was written is lost
    assert sizes[-1] < last[1]  # the last kill still struck a run at work
    assert len(set(sizes)) > 4
    assert last[0] == 0
    assert lines(tmp_path / "run") == lines(uninterrupted)


@pytest.mark.slow
def test_two_processes_share_one_folder(
    uninterrupted: Path, tmp_path: Path, config: SampleConfig, random_model: Path, prompts: str
) -> None:
    """Two shards at the same time give, record by record, what one process gives."""
    assert run_processes("shards", 2, random_model, prompts, tmp_path / "run") == [[0, 0], [0, 0]]
    parts = sorted(path.name for path in (tmp_path / "run").iterdir() if path.suffix in (".jsonl", ".parquet"))
    assert parts == [f"samples-0000{i}-of-00002.{kind}" for i in (1, 2) for kind in ("jsonl", "parquet")]
    assert lines(tmp_path / "run") == lines(uninterrupted)
    whole = run_sample(config, tmp_path / "run")  # the unsharded command finds nothing left to do
    assert whole.tally.responses == 0
    assert whole.modes["thinking"].responses == PROMPTS * 4


def test_a_shard_without_prompts_is_no_fault(tmp_path: Path, config: SampleConfig) -> None:
    report = run_sample(replace(config, limit=2, shard=Shard(2, 2)), tmp_path / "run")
    assert report.modes == {}
    assert "Nothing was left to draw." in report.present().notes


def test_a_torn_last_line_is_drawn_again(uninterrupted: Path, tmp_path: Path, config: SampleConfig) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    path = tmp_path / "run" / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-300])
    tally = run_sample(config, tmp_path / "run").tally
    assert tally.responses >= 1
    assert path.read_bytes() == (uninterrupted / "samples.jsonl").read_bytes()


def test_the_batch_size_does_not_change_the_draws(random_model: Path, prompts: str, tmp_path: Path) -> None:
    """In float64, where the rounding of a batch does not reach a draw."""
    base = SampleConfig(
        policy=PolicyOptions(model=str(random_model), dtype="float64"),
        samples=3,
        max_new_tokens=12,
        temperature=0.2,
        prompts=prompts,
        limit=6,
    )
    for size in (1, 5, None):
        run_sample(replace(base, batch_size=size), tmp_path / str(size))
    one, five, every = (drawn(tmp_path / size) for size in ("1", "5", "None"))
    assert one.keys() == five.keys() == every.keys()
    for line in one:
        assert [five[line], every[line]] == pytest.approx([one[line]] * 2, abs=1e-3)


def test_one_mode_alone(config: SampleConfig, tmp_path: Path, uninterrupted: Path) -> None:
    report = run_sample(replace(config, modes=("nothinking",), limit=4), tmp_path / "run")
    assert list(report.modes) == ["nothinking"]
    alone, among = drawn(tmp_path / "run"), drawn(uninterrupted)
    assert alone == {line: pytest.approx(among[line], abs=1e-3) for line in alone}


# The other engines


def test_the_file_engine_reports_like_the_others(tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    rows = [to_dict(sample("q", index, "17", mode=mode)) for mode in ("thinking", "nothinking") for index in range(3)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = SampleConfig(policy=None, engine="file", samples_from=source, parquet=True)
    report = run_sample(settings, tmp_path / "run")
    assert (report.modes["thinking"].responses, report.model, report.template) == (3, "embedded@test", "embedded")
    assert run_sample(settings, tmp_path / "run").tally.responses == 0
    source.write_text(source.read_text().replace("17", "18"))
    with pytest.raises(UserError, match=r"different run .*samples_from"):
        run_sample(settings, tmp_path / "run")


def test_a_server_that_is_down_leaves_no_folder_behind(tmp_path: Path, random_model: Path, prompts: str) -> None:
    with serve(lambda call, number: Reply()) as at:
        url = at.url
    settings = SampleConfig(
        policy=PolicyOptions(model=str(random_model)),
        engine="openai",
        prompts=prompts,
        server=ServerOptions(url, retries=0),
    )
    with pytest.raises(UserError, match="refuses the connection"):
        run_sample(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "sglang"}, "`engine='sglang'`: unknown"),
        ({"engine": "vllm", "policy": None}, "needs `model`"),
        ({"engine": "openai"}, "`base_url`"),
        ({"engine": "openai", "server": ServerOptions("http://x"), "policy": None}, "needs `model`"),
        ({"engine": "openai", "server": ServerOptions("http://x"), "policy": PolicyOptions(adapter="a")}, "`adapter`"),
        ({"server": ServerOptions("http://x")}, "`base_url` is for `engine='openai'`"),
        ({"engine": "file"}, "`samples_from`"),
        ({"samples_from": Path("x")}, "`samples_from` is for `engine='file'`"),
        ({"engine": "file", "samples_from": Path("x"), "shard": Shard(1, 2)}, "`shard`"),
        ({"limit": 0}, "`limit=0`"),
    ],
)
def test_settings_that_do_not_fit_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SampleConfig(**{"policy": PolicyOptions(), **changes})


# The command line


def test_the_command_prints_a_summary(tmp_path: Path, random_model: Path, prompts: str) -> None:
    arguments = ["sample", "--model", random_model, "--prompts", prompts, "--limit", 2, "--samples", 2]
    result = run(*arguments, "--max-new-tokens", 5, "--output", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert "nothinking" in result.stdout
    assert "tokens per second" in result.stdout
    assert "Careful: " in result.stdout  # five tokens are not enough for anybody
    assert len(lines(tmp_path / "run")) == 8


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--mode", "loud"), "--mode"),
        (("--shard", "3/2"), "--shard"),
        (("--temperature", "0"), "--temperature"),
        (("--samples", "0"), "--samples"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
        (("--batch-size", "none"), "--batch-size"),
        (("--engine", "openai"), "--base-url"),
        (("--engine", "openai", "--base-url", "x"), "--base-url"),
        (("--engine", "file", "--samples-from", "none.jsonl"), "none.jsonl"),
        (("--engine", "file", "--samples-from", "x", "--prompts", "y"), "--prompts"),
        (("--prompts", "none.jsonl"), "none.jsonl"),
    ],
)
def test_bad_options_end_in_one_clear_line(tmp_path: Path, options: tuple[str, ...], word: str) -> None:
    failed_politely(run("sample", "--output", tmp_path / "run", *options), word)
    assert not (tmp_path / "run").exists()


def test_a_run_is_extended_by_more_prompts_behind_the_old(config: SampleConfig, tmp_path: Path) -> None:
    few = replace(config, limit=3, samples=1)
    run_sample(few, tmp_path / "run")
    before = lines(tmp_path / "run")
    report = run_sample(replace(few, limit=5), tmp_path / "run")
    assert report.tally.responses == 2 * 2
    assert set(before) < set(lines(tmp_path / "run"))
    assert report.modes["thinking"].responses == 5
    rows = Path(config.prompts).read_text().splitlines()[:7]
    changed = json.loads(rows[1]) | {"answer": 99}
    for number, (first, words) in enumerate(((rows[:1][0], "prompts"), (json.dumps(changed), "gold answers"))):
        other = tmp_path / f"{number}.jsonl"  # a prompt in front of the old ones, a corrected answer
        other.write_text("\n".join([first.replace("q0", "new"), *rows] if number == 0 else [rows[0], first, *rows[2:]]))
        with pytest.raises(UserError, match=rf"different run \(.*{words}: .* there, .* now"):
            run_sample(replace(few, prompts=str(other), limit=None), tmp_path / "run")
    assert run_sample(replace(few, limit=5), tmp_path / "run").tally.responses == 0
    with pytest.raises(UserError, match="different run"):
        run_sample(replace(few, limit=4), tmp_path / "run")


def test_a_model_that_closes_no_trace_is_said_at_once(
    config: SampleConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights at random: cut at the limit, or ended without a closing tag; either way by the first responses."""
    run_sample(replace(config, limit=10, samples=1, max_new_tokens=2), tmp_path / "cut")
    said = capsys.readouterr().err
    assert re.search(r"None of the first \d+ thinking responses closes its trace: \d+ were cut at 2 tokens", said)
    assert said.count("None of the first") == 1
    assert "raise `max_new_tokens`" in said


@pytest.mark.parametrize(
    ("starts", "reason", "words"),
    [
        ([None] * 8, "stop", "8 ended by themselves, so more tokens do not help"),
        ([None] * 8, "length", "8 were cut at 256 tokens"),
        ([None] * 7 + [3], "stop", ""),
        ([None] * 7, "stop", ""),
    ],
)
def test_what_the_first_responses_say(
    starts: list[int | None], reason: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first: Truncation | None = Truncation()
    for index, start in enumerate(starts):
        drawn = [sample("p", index, "17", answer_start=start, finish_reason=reason)]
        first = _look(first, [*drawn, sample("p", index, "17", mode="nothinking")], SamplingOptions())
    said = capsys.readouterr().err
    assert words in said
    assert bool(words) == bool(said)
