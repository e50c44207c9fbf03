"""Pages that are made at build time, not written: notebooks, commands, API reference, documents of the root.

Formulas become MathML, which browsers show without a script.
"""

from __future__ import annotations

import ast
import html
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bvpo_stats"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARTS = ("statistics", "model", "store", "sampling", "gradients", "training", "studies", "lab", "pages", "embedded")
TUTORIAL = ROOT / "examples" / "real_model"
DOCUMENTS = {"Architecture": "ARCHITECTURE.md", "Contributing": "CONTRIBUTING.md", "Changelog": "CHANGELOG.md"}
_NOTEBOOK_LINK = re.compile(r"\]\((\w+)\.ipynb")
_BENCHMARK = re.compile(r"\[[^\]]+\]\(\.\./(benchmarks/[\w.]+)\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the made pages to the navigation."""
    nav = list(config.nav or [])
    nav.append({"Notebooks": [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]})
    nav.append({"Commands": "commands.md"})
    nav.append({"API": ["api/bvpo_stats.md", *({name: f"api/{name}.md"} for name in _parts())]})
    nav.append({"Project": [{title: name.lower()} for title, name in DOCUMENTS.items()]})
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the made pages themselves."""
    pages: dict[str, str | bytes] = {"commands.md": commands()}
    pages |= {"api/bvpo_stats.md": front_door(), **{f"api/{name}.md": api_page(name) for name in _parts()}}
    pages |= {str(path.relative_to(ROOT)): path.read_bytes() for path in (ROOT / "figures").rglob("*.png")}
    pages |= {name.lower(): _document(name) for name in DOCUMENTS.values()}
    pages["real-model.md"] = tutorial()
    pages |= {f"real-model-{path.name}": path.read_bytes() for path in TUTORIAL.glob("*.html")}
    for path in NOTEBOOKS:
        pages |= notebook(path)
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Pictures and the tutorial beside the package are on the site; benchmark tables, which are no pages, are named."""
    markdown = markdown.replace("](../figures/", "](figures/").replace(
        "](../examples/real_model/README", "](real-model"
    )
    return _BENCHMARK.sub(r"`\1`", markdown)


def on_page_content(html: str, **_: object) -> str:
    """Turns formulas into MathML."""
    return _FORMULA.sub(_mathml, html)


def _mathml(found: re.Match[str]) -> str:
    return convert(html.unescape(found[3]), display="block" if found[2] == "[" else "inline")


def _parts() -> list[str]:
    return [name for name in PARTS if (PACKAGE / name / "__init__.py").is_file()]


def front_door() -> str:
    """The names at the top level, each with what it is in a sentence, led to where it lives: one anchor a name."""
    import bvpo_stats

    lines, here = ["# bvpo_stats", "", "The front door: see [From Python](../from-python.md).", ""], []
    for name in bvpo_stats.__all__:
        home = f"bvpo_stats.{bvpo_stats._HOMES[name]}.{name}"
        about = (inspect.getdoc(getattr(bvpo_stats, name)) or "").partition("\n\n")[0].replace("\n", " ")
        lines += [f"- [`{name}`][{home}]: {about}"]
        if home.split(".")[1] not in PARTS:  # of the ground floor, which has no page of its own
            here += [f"::: {home}", ""]
    return "\n".join([*lines, "", *here])


def api_page(name: str) -> str:
    """One page a sub-package: what its ``__init__`` says, then every public module."""
    folder = PACKAGE / name
    about = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    lines = [f"# bvpo_stats.{name}", "", about, ""]
    for path in _modules(folder):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        lines += [f"::: {dotted}", ""]
    return "\n".join(lines)


def _modules(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*.py")) if not path.stem.startswith("_"))


def notebook(path: Path) -> dict[str, str | bytes]:
    """A notebook as it was executed, with its pictures."""
    content = nbformat.read(path, as_version=4)
    content.cells[0].source = content.cells[0].source.partition("\n\n")[2]  # the badge: a page asks no network
    del content.cells[1]  # installs the package where it is missing
    where = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    body, resources = MarkdownExporter().from_notebook_node(content, resources=where)
    pictures = {f"notebooks/{name}": data for name, data in resources["outputs"].items()}
    body = _NOTEBOOK_LINK.sub(r"](\1.md", body)  # its neighbours are pages here, not notebooks
    return {f"notebooks/{path.stem}.md": body, **pictures}


def _document(name: str) -> str:
    """One of the root's documents, whose links to one another are to pages with small letters."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for other in DOCUMENTS.values():
        text = text.replace(f"]({other}", f"]({other.lower()}")
    return text


def tutorial() -> str:
    """The tutorial, its links led to where their targets are here; its scripts, which are no pages, are named alone."""
    text = (TUTORIAL / "README.md").read_text(encoding="utf-8")
    text = text.replace("](../../docs/", "](").replace("](../../figures/", "](figures/")
    text = text.replace("](report.html)", "](real-model-report.html)")
    return re.sub(r"\[([\w.]+\.py)\]\(\1\)", r"`\1`", text)


def commands() -> str:
    """``--help`` of every command."""
    import typer
    from bvpo_stats.cli.main import app
    from typer.cli import get_docs_for_click

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="bvpo-stats")
    return text.replace("# `bvpo-stats`", "# Commands", 1)
