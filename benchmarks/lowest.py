"""The lower bounds of pyproject.toml, installed exactly in a fresh environment, and a first use there.

    python benchmarks/lowest.py [--dry-run]

The first argument of pip's resolver is what the package itself says: `name>=1.2` becomes `name==1.2`. With --dry-run
only the resolution is made, which shows whether the bounds go together.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ("tests/statistics", "tests/cli/test_help.py", "tests/cli/test_doctor.py")
EXTRAS = ("cli", "plots")


def lowest(text: str) -> list[str]:
    """The lower bounds of core and of the command line's extras, as exact versions.

    >>> lowest('dependencies = [\\n  "torch>=2.6",\\n]\\ncli = ["typer>=0.20", "bvpo-stats[plots]"]\\nplots = []')
    ['torch==2.6', 'typer==0.20']
    """
    core = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    blocks = [core[1] if core else "", *re.findall(rf"^(?:{'|'.join(EXTRAS)}) = (.*)$", text, re.MULTILINE)]
    return [f"{name}=={bound}" for block in blocks for name, bound in re.findall(r'"([\w-]+)>=([\d.]+)"', block)]


def main() -> int:
    """Makes the environment and runs the tests; returns pip's or pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true")
    dry = parser.parse_args().dry_run
    exact = lowest((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    print("\n".join(exact), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(Path(folder) / "bin" / "python")
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        done = subprocess.run([*install, *(["--dry-run"] if dry else []), *exact], check=False)
        if done.returncode or dry:
            return done.returncode
        subprocess.run([*install, "--no-deps", str(ROOT)], check=True)
        subprocess.run([*install, "pytest>=8", "beartype>=0.19"], check=True)
        return subprocess.run([python, "-m", "pytest", "-q", *TESTS], check=False, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
