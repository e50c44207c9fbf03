"""``bvpo-stats report``: one page, complete in itself, whatever the folder holds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bvpo_stats.errors import UserError
from bvpo_stats.pages.page import write_page
from bvpo_stats.store.jsonl import write_sealed
from tests.cli.running import failed_politely, run

FIGURES = Path(__file__).parents[2] / "figures"
DONE = ("variance", "alpha-star")  # finished runs of two studies
EVIL = '<script>alert("x")</script>&"\''


class Tags(HTMLParser):
    """All tags with their attributes, and whether they are balanced."""

    VOID = frozenset({"meta", "img", "link", "br", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"<{tag}> is not balanced"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every condition: finished, unfinished, broken, of an old version, of an unknown study, and hostile."""
    root = tmp_path_factory.mktemp("runs")
    for name in DONE:
        shutil.copytree(FIGURES / name, root / "done" / name)
    runs = {
        "half/run.json": {"command": "variance", "model": EVIL, "sampling": {"temperature": 0.8}},
        "old/report.json": {"study": "variance", "table3": {}},
        "strange/report.json": {"study": EVIL, EVIL: {"value": EVIL, "list": list(range(20))}, "versions": {"x": EVIL}},
        ".hidden/run.json": {"command": "variance"},
    }
    for name, content in runs.items():
        (root / name).parent.mkdir()
        (root / name).write_text(json.dumps(content))
    (root / "broken").mkdir()
    (root / "broken/report.json").write_text('{"study": "vari')
    return root


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    result = run("report", folder, "--title", f"All of it {EVIL}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"Written: {folder / 'report.html'}"
    return (folder / "report.html").read_text(encoding="utf-8")


def test_every_run_is_on_it(page: str, folder: Path) -> None:
    text = " ".join(Tags(page).words)
    for name in ("half", "old", "strange", "broken", *(f"done/{name}" for name in DONE)):
        assert name in text
    assert ".hidden" not in text
    assert "No report.json yet" in text
    assert "another version" in text
    assert "cannot be read" in text


def test_finished_runs_show_tables_figures_configuration_and_versions(page: str) -> None:
    report = json.loads((FIGURES / "variance/report.json").read_text())
    tags = Tags(page)
    text = " ".join(tags.words)
    assert f"{report['table3']['logp_variance_ratio']['value']:.3f}" in text
    assert f"torch {report['versions']['torch']}" in text
    assert "sampling.temperature" in text
    images = [attributes for tag, attributes in tags.tags if tag == "img"]
    assert len(images) == sum(len(list((FIGURES / name).glob("*.png"))) for name in DONE)
    assert all(image["alt"] for image in images)


def test_page_is_self_contained(page: str) -> None:
    """No script, no address outside the file, images inline; links only within the page."""
    for tag, attributes in Tags(page).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name == "src":
                assert str(value).startswith("data:image/png;base64,")
            if name == "href":
                assert str(value).startswith("#run-")
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert not re.search(r"url\(", page)


def test_links_meet_their_sections(page: str) -> None:
    tags = Tags(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    links = [str(attributes["href"])[1:] for tag, attributes in tags if tag == "a"]
    assert links == ids
    assert len(set(ids)) == len(ids)


def test_whatever_comes_from_data_is_escaped(page: str) -> None:
    assert "<script" not in page
    assert EVIL in " ".join(Tags(page).words)


def test_page_balances(page: str) -> None:
    assert not Tags(page).open


def test_the_same_runs_give_the_same_page(page: str, folder: Path, tmp_path: Path) -> None:
    assert run("report", folder, "--title", f"All of it {EVIL}", "--output", tmp_path / "again.html").returncode == 0
    assert (tmp_path / "again.html").read_text() == page


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    failed_politely(run("report", tmp_path / "nowhere"), "no such folder")
    failed_politely(run("report", tmp_path), "no run in it")
    failed_politely(run("report", folder, "--output", tmp_path), "Name the HTML file")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_a_browser_shows_it_without_complaint(page: str, folder: Path, tmp_path: Path) -> None:
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    shown = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={tmp_path}",
         "--enable-logging=stderr", "--dump-dom", (folder / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr
    assert len(re.findall("<section", shown.stdout)) == len(re.findall("<section", page))


def test_no_language_model_library_is_imported() -> None:
    """Reports are data: showing them takes a second, not the import of torch."""
    code = "import sys, bvpo_stats.pages.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_another_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"command": "variance"}')
    data = tmp_path / "samples.jsonl"
    data.write_text('{"prompt_id": "p"}\n')
    with pytest.raises(UserError, match="no HTML page; nothing was overwritten"):
        write_page(tmp_path, data)
    assert data.read_text() == '{"prompt_id": "p"}\n'
    page = write_page(tmp_path, tmp_path / "page.html")
    assert write_page(tmp_path, page) == page  # a page of an earlier call


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run" / "report.json"
    path.parent.mkdir()
    write_sealed(path, (FIGURES / "variance" / "report.json").read_text())
    assert "not as it was written" not in write_page(tmp_path).read_text()
    path.write_text(path.read_text().replace('"n_samples": ', '"n_samples": 1', 1))
    assert "report.json is not as it was written (its checksum differs)." in write_page(tmp_path).read_text()
    assert "not as it was written" in run("figures", tmp_path, "--output", tmp_path / "f").stdout
    (path.parent / ".report.json.sha256").unlink()  # changed on purpose
    assert "not as it was written" not in write_page(tmp_path).read_text()
