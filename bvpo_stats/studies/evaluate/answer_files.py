"""Answer files of AlpacaEval 2 and Arena-Hard: written for their judges, read as baselines."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bvpo_stats.errors import UserError
from bvpo_stats.records import Prompt
from bvpo_stats.store.jsonl import encode_row, read_json_list, read_jsonl

_CODE = re.compile(r"```.*?```", re.DOTALL)
_NAMESPACE = uuid.UUID("6c1f2a5e-6d0b-4b57-9a3c-3a1d5f0e7b42")


@dataclass(frozen=True)
class FinalAnswer:
    """One prompt's final answer, as a judge gets it.

    Attributes:
        prompt: The prompt.
        text: The final answer; empty where the response has none. A trace never stands here.
        tokens: Its tokens.
    """

    prompt: Prompt
    text: str
    tokens: int


def alpaca_eval_text(answers: Iterable[FinalAnswer], generator: str, datasets: Mapping[str, str]) -> str:
    """AlpacaEval's file: a JSON list of ``{instruction, output, generator, dataset, datasplit}``.

    Args:
        answers: In the order of the benchmark.
        generator: Name of the model on the leaderboard.
        datasets: By prompt id: where an instruction comes from.
    """
    rows = [
        {
            "instruction": answer.prompt.prompt,
            "output": answer.text,
            "generator": generator,
            "dataset": datasets[answer.prompt.prompt_id],
            "datasplit": "eval",
        }
        for answer in answers
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def arena_hard_text(answers: Iterable[FinalAnswer], model: str, time: float) -> str:
    """Arena-Hard's file: one line ``{uid, ans_id, model, messages, tstamp, metadata}`` per answer.

    ``metadata`` holds what its style control reads: ``token_len`` (counted by the model's own tokenizer) and the
    numbers of Markdown headers, list items and bold words outside code blocks.

    Args:
        answers: In the order of the benchmark.
        model: Name of the model; the file must be called ``MODEL.jsonl``.
        time: Time stamp, in seconds; equal runs should give equal ones.
    """
    lines = []
    for answer in answers:
        prompt = answer.prompt
        row = {
            "uid": prompt.prompt_id,
            "ans_id": uuid.uuid5(_NAMESPACE, f"{model}/{prompt.prompt_id}").hex,
            "model": model,
            "messages": [
                {"role": "user", "content": prompt.prompt},
                {"role": "assistant", "content": {"answer": answer.text}},
            ],
            "tstamp": time,
            "metadata": {"token_len": answer.tokens, **markdown_counts(answer.text)},
        }
        lines.append(encode_row(row) + "\n")
    return "".join(lines)


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    r"""Headers, list items and bold spans of a Markdown text outside its code blocks, under Arena-Hard's names.

    >>> markdown_counts("# A\n- **b**\n1. c")["list_count"]
    {'ordered': 1, 'unordered': 1}
    """
    plain = _CODE.sub("", text)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, plain, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


@dataclass(frozen=True)
class AnswerFile:
    """Answers to beat.

    Attributes:
        name: The model's name in the file, else the file's.
        answers: Answer text by ``uid`` and by prompt text.
    """

    name: str
    answers: Mapping[str, str]

    def answers_to(self, prompts: Iterable[Prompt], path: Path) -> list[str]:
        """The answers to these prompts, in their order; found by id, else by text.

        Raises:
            UserError: Some are missing.
        """
        found = [self.answers.get(p.prompt_id, self.answers.get(p.prompt)) for p in prompts]
        missing = [p for p, answer in zip(prompts, found, strict=True) if answer is None]
        if missing:
            raise UserError(
                f"`baseline={str(path)!r}` has no answer to {len(missing)} of the {len(found)} prompts, e.g. "
                f"{missing[0].prompt_id} ({missing[0].prompt[:60]!r}). Give the baseline's answers to all of them."
            )
        return [answer for answer in found if answer is not None]


def read_answer_file(path: Path) -> AnswerFile:
    """Reads AlpacaEval's format (``instruction`` and ``output``) or Arena-Hard's, JSON list or JSONL alike.

    Raises:
        UserError: A row without prompt or answer, or a second answer to one prompt; the row is named.
    """
    answers: dict[str, str] = {}
    names: set[str] = set()
    for where, row in _rows(path):
        keys, answer = _read_row(row, where)
        for key in keys:
            if answers.setdefault(key, answer) is not answer:
                raise UserError(f"{where}: a second answer to {key[:60]!r}. Remove one.")
        name = row.get("generator") or row.get("model") or row.get("model_id")
        names |= {str(name)} if name else set()
    if not answers:
        raise UserError(f"`baseline={str(path)!r}` holds no answers.")
    return AnswerFile(names.pop() if len(names) == 1 else path.stem, answers)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise UserError(
            f"`baseline={str(path)!r}`: no such file. Give the answers to beat, in AlpacaEval's or Arena-Hard's form."
        )
    if path.suffix == ".json":
        yield from ((f"{path}[{number}]", row) for number, row in enumerate(read_json_list(path), start=1))
    else:
        yield from ((f"{path}:{number}", row) for number, row in read_jsonl(path))


def _read_row(row: dict[str, Any], where: str) -> tuple[list[str], str]:
    """The names under which a row's prompt may be asked for, and the answer."""
    keys = [str(row[name]) for name in ("uid", "question_id", "prompt_id", "instruction", "prompt") if row.get(name)]
    messages = row.get("messages")
    answer = row.get("output", row.get("answer"))
    if isinstance(messages, list) and messages:
        content = messages[-1].get("content") if isinstance(messages[-1], dict) else None
        answer = content.get("answer") if isinstance(content, dict) else content
    elif isinstance(row.get("choices"), list):  # Arena-Hard's first format
        answer = _first_turn(row["choices"])
    if not keys or not isinstance(answer, str):
        raise UserError(
            f'{where}: not an answer; it needs "instruction" and "output" (AlpacaEval), or "uid" and "messages" '
            f"(Arena-Hard). Fields: {', '.join(row) or 'none'}."
        )
    return list(dict.fromkeys(keys)), answer


def _first_turn(choices: list[Any]) -> Any:
    try:
        return choices[0]["turns"][0]["content"]
    except (IndexError, KeyError, TypeError):
        return None
