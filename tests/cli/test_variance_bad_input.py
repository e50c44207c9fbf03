"""What a user can get wrong with ``variance``: one clear line, exit code 2, nothing overwritten."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from tests.cli.running import failed_politely, run
from tests.studies.test_variance_tables import write_samples
from tests.tokenizers import plain

PROMPT = '{"prompt": "1+1=?"}\n'


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(PROMPT)
    return path


def test_models_that_are_not_there(tmp_path: Path) -> None:
    failed_politely(run("variance", "--model", tmp_path / "none", "--output", tmp_path / "o"), "no such folder")
    (tmp_path / "empty").mkdir()
    failed_politely(run("variance", "--model", tmp_path / "empty", "--output", tmp_path / "o"), "config.json")
    failed_politely(run("variance", "--model", "no-one/nothing", "--output", tmp_path / "o"), "no-one/nothing")
    assert not (tmp_path / "o").exists()


def test_weights_that_cannot_be_read(tmp_path: Path, random_model: Path, prompts: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in random_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"not weights")
    failed_politely(run("variance", "--model", broken, "--prompts", prompts, "--output", tmp_path / "o"), "Cannot load")


def test_pickled_weights_are_refused(tmp_path: Path, random_model: Path, prompts: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in random_model.iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).write_bytes(file.read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    failed_politely(
        run("variance", "--model", pickled, "--prompts", prompts, "--output", tmp_path / "o"), "safetensors"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("holds no prompts", "`prompt`")),
        (b"1+1=?\n", ("prompts.jsonl:1", "not JSON")),
        (b'{"prompt": "1+1"}\n[1]\n', ("prompts.jsonl:2", "list")),
        (b'{"text": "1+1"}\n', ("prompts.jsonl:1", "no field `prompt`", "text")),
        (b'{"prompt": "1+1"}\n{"prompt": "\xff"}\n', ("prompts.jsonl:2", "UTF-8")),
        (b'{"prompt": "  "}\n', ("prompts.jsonl:1", "empty")),
        (b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', ("prompts.jsonl:2", "twice")),
    ],
)
def test_prompts_files(tmp_path: Path, random_model: Path, content: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    result = run("variance", "--model", random_model, "--prompts", path, "--output", tmp_path / "o")
    failed_politely(result, *words)
    assert not (tmp_path / "o").exists()


def test_missing_prompts_file(tmp_path: Path) -> None:
    failed_politely(run("variance", "--prompts", tmp_path / "none.jsonl", "--output", tmp_path / "o"), "does not exist")


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--samples", "1", "at least 2"),
        ("--temperature", "0", "--temperature"),
        ("--temperature", "-1", "--temperature"),
        ("--temperature", "nan", "--temperature"),
        ("--top-p", "0", "--top-p"),
        ("--max-new-tokens", "-5", "--max-new-tokens"),
        ("--max-new-tokens", "0", "--max-new-tokens"),
        ("--batch-size", "0", "--batch-size"),
        ("--level", "95", "--level"),
        ("--nll", "words", "--nll"),
        ("--limit", "0", "--limit"),
        ("--dtype", "float8", "--dtype"),
        ("--device", "abacus", "--device"),
        ("--template", "nonsense", "--template"),
    ],
)
def test_options_out_of_range(
    tmp_path: Path, random_model: Path, prompts: Path, option: str, value: str, word: str
) -> None:
    result = run("variance", "--model", random_model, "--prompts", prompts, "--output", tmp_path / "o", option, value)
    failed_politely(result, word)


def test_tokenizer_without_think_tags(tmp_path: Path, random_model: Path, prompts: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "plain"
    tokenizer = plain()
    config = AutoConfig.from_pretrained(random_model, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    result = run("variance", "--model", folder, "--prompts", prompts, "--output", tmp_path / "o")
    failed_politely(result, "<think>", "--empty-trace")


def test_model_that_returns_nan(tmp_path: Path, random_model: Path, prompts: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "nan"
    model = AutoModelForCausalLM.from_pretrained(random_model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(random_model).save_pretrained(folder)
    failed_politely(run("variance", "--model", folder, "--prompts", prompts, "--output", tmp_path / "o"), "NaN")


def test_output_of_a_different_run_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "o"
    first = run("variance", "--samples-from", write_samples(tmp_path / "a.jsonl"), "--output", output)
    assert first.returncode == 0, first.stderr
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    other = write_samples(tmp_path / "b.jsonl", truncated=1)
    failed_politely(run("variance", "--samples-from", other, "--output", output), "different run", "samples_from")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_output_with_something_else_in_it(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "a.jsonl")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.tex").write_text("precious")
    failed_politely(run("variance", "--samples-from", samples, "--output", tmp_path / "o"), "not empty")
    failed_politely(run("variance", "--samples-from", samples, "--output", samples), "is a file")


def test_disk_full(tmp_path: Path, random_model: Path, prompts: Path) -> None:
    """A limit on file sizes stands in for the end of the disk; afterwards the run goes on where it stopped."""
    output = tmp_path / "o"
    arguments = ("variance", "--model", random_model, "--prompts", prompts, "--max-new-tokens", 3, "--output", output)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        failed_politely(run(*arguments), "Disk full", "samples.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (output / "samples.jsonl").stat().st_size == 0
    failed_politely(run(*arguments), "truncated")
    assert len((output / "samples.jsonl").read_text().splitlines()) == 10


def test_all_truncated(tmp_path: Path, random_model: Path, prompts: Path) -> None:
    result = run(
        "variance", "--model", random_model, "--prompts", prompts, "--max-new-tokens", 3, "--output", tmp_path / "o"
    )
    failed_politely(result, "truncated", "--max-new-tokens")


def test_samples_from_elsewhere(tmp_path: Path) -> None:
    failed_politely(run("variance", "--samples-from", tmp_path / "none", "--output", tmp_path / "o"), "no such file")
    path = write_samples(tmp_path / "twice.jsonl")
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text("".join(json.dumps(dict(row, sample_index=0)) + "\n" for _ in range(2)))
    failed_politely(run("variance", "--samples-from", path, "--output", tmp_path / "o"), "twice.jsonl:2", "twice")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("variance", "--samples", 1, "--output", tmp_path / "o", "--debug")
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("text", "word"), [("samples: [", "YAML"), ("- 5\n", "option names"), ("sample: 5\n", "unknown options sample")]
)
def test_config_files(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    failed_politely(run("variance", "--config", path, "--output", tmp_path / "o"), word)
