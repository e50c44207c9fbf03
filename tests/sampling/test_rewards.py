"""Rewards: what they see, what they give, and what they refuse."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification, Qwen2Config, Qwen2ForSequenceClassification

from bvpo_stats.embedded.task import grade
from bvpo_stats.embedded.tokenizer import EOS, build_tokenizer
from bvpo_stats.errors import UserError
from bvpo_stats.records import MODES
from bvpo_stats.sampling.rewards import Answer, as_reward, load_reward, score_answers
from tests.tokenizers import BOS


def answers_of(*texts: str, gold: str | None = "17") -> list[Answer]:
    return [Answer("p0", "thinking", index, "What is 8+9?", text, gold) for index, text in enumerate(texts)]


def save_reward_model(folder: Path, *, labels: int = 1, pad: bool = True, chat: bool = True, seed: int = 0) -> Path:
    tokenizer = build_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id if pad else None,
        initializer_range=0.3,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_judge_of_wordings_is_blind_to_correctness() -> None:
    judge = load_reward("embedded-judge")
    assert judge.text_only
    forms = ("{}", "{}.", "It is {}.", "The answer is {}.")
    expected = {"8+9=?": (3, 2, 1, 0), "What is 8+9?": (0, 1, 3, 2), "Compute 8+9.": (0, 1, 2, 3)}
    for question, thirds in expected.items():
        for value in (17, -3):
            answers = [Answer("p", "nothinking", 0, question, form.format(value)) for form in forms]
            np.testing.assert_allclose(score_answers(judge, answers), np.array(thirds) / 3, atol=1e-12)
    odd = [Answer("p", "thinking", 0, "8+9=?", text) for text in ("", "no idea", "17 and 18.", "It is 17", "17 .")]
    assert score_answers(judge, odd) == [-1.0] * 5
    with pytest.raises(UserError, match="knows the embedded task's questions; 'Who are you' is none"):
        score_answers(judge, [Answer("p", "thinking", 0, "Who are you", "It is 1.")])


@pytest.mark.parametrize("pad", [True, False])
def test_a_reward_model_scores_the_chat_of_question_and_answer(tmp_path: Path, pad: bool) -> None:
    folder = save_reward_model(tmp_path / "rm", pad=pad)
    texts = ["17", "It is 18.", "The answer is 17.", "1" * 20, "", "17"]
    scores = score_answers(load_reward(f"model:{folder}", device="cpu"), answers_of(*texts))

    model = Qwen2ForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = build_tokenizer()
    for text, score in zip(texts, scores, strict=True):
        chat = f"{BOS}<｜User｜>What is 8+9?<｜Assistant｜>{text}{EOS}"
        ids = torch.tensor([tokenizer.encode(chat, add_special_tokens=False)])
        with torch.no_grad():
            alone = model(input_ids=ids).logits.item()
        assert score == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in scores[:4]}) == 4
    assert scores[0] == scores[5]


def test_a_padding_token_that_is_also_the_last_token_does_not_change_a_score(tmp_path: Path) -> None:
    """Many reward models have no padding token; taking EOS for it would hide the chat's own last token."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=None, initializer_range=0.3, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    reward = load_reward(f"model:{tmp_path}", device="cpu")
    together = score_answers(reward, answers_of("17", "17.", "170", "The answer is 17."))
    alone = [score_answers(reward, [answer])[0] for answer in answers_of("17", "17.", "170", "The answer is 17.")]
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_chat_too_long_for_the_reward_model_is_left_unscored(tmp_path: Path) -> None:
    reward = load_reward(f"model:{save_reward_model(tmp_path)}", device="cpu")
    scores = score_answers(reward, answers_of("17", "1" * 70))
    assert scores[0] is not None
    assert scores[1] is None


def test_a_multi_objective_head_with_a_score_of_its_own_is_read_there(tmp_path: Path) -> None:
    """ArmoRM's shape: several logits, and ``score`` from the model's own code, which must be allowed."""
    folder = save_reward_model(tmp_path / "rm", labels=3)
    (folder / "modeling_many.py").write_text(
        "from dataclasses import dataclass\n"
        "import torch\n"
        "from transformers import Qwen2ForSequenceClassification\n"
        "from transformers.utils import ModelOutput\n"
        "@dataclass\n"
        "class Many(ModelOutput):\n"
        "    logits: torch.Tensor = None\n"
        "    score: torch.Tensor = None\n"
        "class ManyObjectives(Qwen2ForSequenceClassification):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        logits = super().forward(*args, **kwargs).logits\n"
        "        return Many(logits=logits, score=(logits * torch.tensor([0.5, 2.0, -1.0])).sum(-1))\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_many.ManyObjectives"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"3 logits.*`trust_remote_code=True`"):
        score_answers(load_reward(f"model:{folder}", device="cpu"), answers_of("17"))
    reward = load_reward(f"model:{folder}", device="cpu", trust_remote_code=True)
    model = Qwen2ForSequenceClassification.from_pretrained(save_reward_model(tmp_path / "same", labels=3)).eval()
    ids = build_tokenizer().apply_chat_template(
        [{"role": "user", "content": "What is 8+9?"}, {"role": "assistant", "content": "17"}],
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        logits = model(**ids).logits[0]
    expected = (0.5 * logits[0] + 2 * logits[1] - logits[2]).item()
    assert score_answers(reward, answers_of("17")) == pytest.approx([expected], abs=1e-5)


def test_a_head_that_only_the_models_own_code_knows(tmp_path: Path) -> None:
    """ArmoRM without its code: transformers would put a random head in place of the gated one."""
    folder = save_reward_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["gated_score.weight"] = weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"no trained reward head.*score\.weight.*`trust_remote_code=True`"):
        load_reward(f"model:{folder}", device="cpu")


def test_reward_models_that_cannot_be_one(tmp_path: Path, random_model: Path) -> None:
    with pytest.raises(UserError, match="no trained reward head"):
        load_reward(f"model:{random_model}", device="cpu")
    with pytest.raises(UserError, match="no chat template"):
        load_reward(f"model:{save_reward_model(tmp_path / 'mute', chat=False)}", device="cpu")
    with pytest.raises(UserError, match="no such folder"):
        load_reward(f"model:{tmp_path / 'none'}", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        load_reward(f"model:{tmp_path / 'empty'}", device="cpu")
    with pytest.raises(UserError, match="unknown"):
        load_reward(f"model:{save_reward_model(tmp_path / 'rm')}", device="cpu", dtype="float3")


def test_nan_names_the_sample(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path)
    model = Qwen2ForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"nan to the sample p0/thinking/0"):
        score_answers(load_reward(f"model:{folder}", device="cpu"), answers_of("17"))


def test_math_verify_knows_equal_from_different() -> None:
    reward = load_reward("math-verify")
    cases = [
        ("17", "The answer is 17.", 1.0),
        ("17", "It is 18.", 0.0),
        ("-17", "It is -17.", 1.0),
        ("1/2", r"So $\frac{2}{4}$.", 1.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        (r"2\sqrt{3}", r"$\sqrt{12}$", 1.0),
        (r"2\sqrt{3}", "2", 0.0),
        ("17", "no idea", 0.0),
        ("17", "", 0.0),
    ]
    answers = [replace(answers_of(text, gold=gold)[0], sample_index=i) for i, (gold, text, _) in enumerate(cases)]
    assert score_answers(reward, answers) == [expected for *_, expected in cases]


def test_math_verify_works_outside_the_main_thread() -> None:
    scores: list[float | None] = []
    reward = load_reward("math-verify")
    worker = threading.Thread(target=lambda: scores.extend(reward.score(answers_of("17", "18"))))
    worker.start()
    worker.join()
    assert scores == [1.0, 0.0]


def test_math_verify_missing_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(UserError, match=r"bvpo-stats\[math\]"):
        load_reward("math-verify")


def test_the_embedded_verifier() -> None:
    texts = ["The answer is 17.", "17", "It is 18.", "no idea"]
    assert score_answers(load_reward("embedded"), answers_of(*texts)) == [grade(text, 17) for text in texts]


@pytest.mark.parametrize("spec", ["embedded", "math-verify"])
def test_no_gold_answer(spec: str) -> None:
    with pytest.raises(UserError, match=r"prompt p0 has none.*gold"):
        score_answers(load_reward(spec), answers_of("17", gold=None))


def test_a_python_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, completions, gold):\n"
        "    rows = zip(prompts, completions, gold)\n"
        "    return [None if c == 'skip' else len(p) + len(c) + int(g) for p, c, g in rows]\n"
        "def few(prompts, completions, gold):\n    return [1.0]\n"
        "def broken(prompts, completions, gold):\n    raise RuntimeError('out of ideas')\n"
        "def infinite(prompts, completions, gold):\n    return [float('inf')] * len(prompts)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert score_answers(load_reward("my_rewards:length"), answers_of("17", "skip")) == [12 + 2 + 17, None]
    with pytest.raises(UserError, match="1 scores for 2 answers"):
        score_answers(load_reward("my_rewards:few"), answers_of("17", "18"))
    with pytest.raises(UserError, match="out of ideas"):
        score_answers(load_reward("my_rewards:broken"), answers_of("17"))
    with pytest.raises(UserError, match="inf to the sample p0/thinking/0"):
        score_answers(load_reward("my_rewards:infinite"), answers_of("17"))
    with pytest.raises(UserError, match="no function 'missing'"):
        load_reward("my_rewards:missing")
    with pytest.raises(UserError, match="cannot import no_such_module"):
        load_reward("no_such_module:f")


class _Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not even this")


def _raises(error: BaseException) -> float:
    raise error


def _without_end() -> Iterator[float]:
    while True:
        yield 1.0


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda prompt, answer: _raises(SystemExit(0)), "SystemExit"),
        (lambda prompt, answer: _raises(_Mute()), "fails with _Mute"),
        (lambda prompt, answer: "5", "a str where a number belongs"),
        (lambda prompt, answer: {"reward": 1}, "TypeError"),
        (lambda prompt, answer: 10**400, "OverflowError"),
        (lambda prompts, completions, gold: _without_end(), "gave more than 2 scores for 2 answers"),
        (lambda prompts, completions, gold: None, "TypeError"),
        (lambda prompts, completions, gold: [[1.0], [2.0]], "TypeError"),
    ],
)
def test_a_function_that_does_anything_else(function: Callable[..., object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        score_answers(as_reward(function), answers_of("17", "18"))


def test_numbers_of_any_kind_are_scores() -> None:
    reward = as_reward(lambda prompts, completions, gold: (x for x in (np.float32(0.5), torch.tensor(2.0), True)))
    assert score_answers(reward, answers_of("17", "18", "19")) == [0.5, 2.0, 1.0]


def test_ctrl_c_in_a_reward_function_is_passed_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        score_answers(as_reward(lambda prompt, answer: _raises(KeyboardInterrupt())), answers_of("17"))


def test_a_module_that_ends_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit()\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"cannot import leaving \(SystemExit\)"):
        load_reward("leaving:f")


def test_scores_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    rows = [("p0", "thinking", 0, 0.5), ("p0", "thinking", 1, None), ("p0", "nothinking", 0, 2)]
    lines = [dict(zip(("prompt_id", "mode", "sample_index", "reward"), row, strict=True)) for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reward = load_reward(f"file:{path}")
    wanted = [Answer("p0", mode, index, "", "same", None) for mode in MODES for index in range(2)]
    assert score_answers(reward, wanted) == [0.5, None, 2.0, None]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt_id": "p0", "mode": "thinking", "sample_index": 0}', "no field reward"),
        ('{"prompt_id": "p0", "mode": "loud", "sample_index": 0, "reward": 1}', "`mode` must be `thinking`"),
        (
            '{"prompt_id": "p0", "mode": "thinking", "sample_index": 0, "reward": "high"}',
            "`reward` must be a number or null",
        ),
        ('{"prompt_id": "p0", "mode": "thinking", "sample_index": 0, "reward": NaN}', "p0/thinking/0 is nan"),
        ('{"prompt_id": "p0", "mode": "thinking", "sample_index": 0, "reward": -Infinity}', "p0/thinking/0 is -inf"),
        ('{"prompt_id": "p0", "mode": "thinking", "sample_index": 0, "reward": 1' + "0" * 400 + "}", "must be finite"),
        ('{"prompt_id": "p0", "mode": "thinking", "sample_index": "0", "reward": 1}', "`sample_index` must be"),
        ('{"prompt_id": ["p0"], "mode": "thinking", "sample_index": 0, "reward": 1}', "`prompt_id` must be a text"),
        ('{"prompt_id": "p0", "mode": "thinking", "sample_index": 1, "reward": 1}', "second score"),
        ("0.5", "not an object"),
    ],
)
def test_score_files_that_are_wrong(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"prompt_id": "p0", "mode": "thinking", "sample_index": 1, "reward": 1}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"scores\.jsonl:2: .*{words}"):
        load_reward(f"file:{path}")


@pytest.mark.parametrize("spec", ["", "armorm", "model:", "file:", "a b:c", "embedded:x y"])
def test_unknown_rewards(spec: str) -> None:
    with pytest.raises(UserError, match=r"Choose embedded, embedded-judge, math-verify, model:PATH"):
        load_reward(spec)


def test_equal_answers_are_scored_once_and_only_where_text_decides() -> None:
    class Counter:
        identity = "counter"

        def __init__(self, text_only: bool) -> None:
            self.text_only = text_only
            self.seen: list[Answer] = []

        def score(self, answers: Sequence[Answer]) -> list[float | None]:
            start = len(self.seen)
            self.seen.extend(answers)
            return [float(start + i) for i in range(len(answers))]

    by_text = Counter(text_only=True)
    assert score_answers(by_text, answers_of("a", "b", "a")) == [0.0, 1.0, 0.0]
    assert [answer.text for answer in by_text.seen] == ["a", "b"]
    by_sample = Counter(text_only=False)
    assert score_answers(by_sample, answers_of("a", "b", "a")) == [0.0, 1.0, 2.0]
    assert score_answers(by_text, []) == []
