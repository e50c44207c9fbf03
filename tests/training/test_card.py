"""The card beside a trained adapter, and what is pushed to the hub (against a stand-in of its interface)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bvpo_stats.errors import UserError
from bvpo_stats.store.hub import push_folder
from tests.cli.running import failed_politely, run
from tests.golden.cases import Runs


class Hub:
    """Keeps what `HfApi` is asked for."""

    calls: list[dict[str, Any]] = []  # noqa: RUF012
    fault: Exception | None = None

    def create_repo(self, repository: str, **options: Any) -> Any:
        if self.fault is not None:
            raise self.fault
        self.calls.append({"repository": repository, **options})
        return type("Url", (), {"repo_id": f"me/{repository.rpartition('/')[2]}"})()

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(options)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "fault", None)
    return Hub


def test_the_card_says_what_was_trained(golden: Runs) -> None:
    text = (golden.output("train-adaptive") / "model" / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    front = yaml.safe_load(head)
    assert front["library_name"] == "peft"
    assert "bvpo-stats" in front["tags"]
    assert "base_model" not in front  # the embedded model is not on the hub
    assert "More Information Needed" not in body
    assert "after 12 steps" in body
    assert "| alpha | adaptive, rule rising |" in body
    assert re.search(r"\| pairs \| fingerprint \w+ \|", body)
    assert re.search(r"\| 12 \| [\d.]+ \| ", body)  # alpha's course ends at the last step
    assert "| loss | " in body
    assert not list((golden.output("train-adaptive") / "checkpoints").rglob("README.md"))


def test_a_finished_run_is_pushed_with_its_card(golden: Runs, hub: type[Hub]) -> None:
    folder = golden.output("train") / "model"
    assert push_folder(folder, "bvpo-adapter", "model", ["*"]) == "me/bvpo-adapter"
    made, sent = hub.calls
    assert made == {"repository": "bvpo-adapter", "repo_type": "model", "private": True, "exist_ok": True}
    assert sent["folder_path"] == str(folder)
    assert sent["repo_id"] == "me/bvpo-adapter"


def test_pairs_are_pushed_with_their_card(golden: Runs, hub: type[Hub], tmp_path: Path) -> None:
    words = ("pairs", "--samples", golden.output("sample"), "--reward", "embedded", "--mode", "thinking")
    done = run(*words, "--push-to-hub", "me/pairs", "--output", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    assert "Pushed: me/pairs" in done.stdout
    assert hub.calls[0]["repo_type"] == "dataset"
    assert "README.md" in hub.calls[1]["allow_patterns"]
    hub.fault = OSError("401 Client Error: log in first\nmore")
    failed = run(*words, "--push-to-hub", "me/pairs", "--output", tmp_path / "p")
    failed_politely(failed, "--push-to-hub me/pairs", "401 Client Error: log in first", "tries it again")


def test_a_folder_without_a_card_is_not_pushed(tmp_path: Path, hub: type[Hub]) -> None:
    with pytest.raises(UserError, match=r"no README\.md"):
        push_folder(tmp_path, "x", "model", ["*"])
    assert not hub.calls
