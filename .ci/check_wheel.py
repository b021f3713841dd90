"""What a user of the wheel gets: run by `make test-wheel`, with the Python of an environment that holds only the wheel.

It asks that the package comes from that environment and not from the checkout, that the files that are not Python are
in it, and that an index can be made and searched from a folder that has nothing to do with the repository.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import search_r3

PACKAGE = Path(search_r3.__file__).parent
FILES = (
    "py.typed",
    "model/engines/int8/calibration.txt",
    "server/page/index.html",
    "evaluation/report/templates/page.css.j2",
)
COMMAND = Path(sys.executable).with_name("search-r3")
SECONDS = 600
"""A command may take; the first reads and converts the weights."""


def run(*arguments: str, folder: str) -> str:
    """The command's standard output; it must end with exit code 0."""
    done = subprocess.run(
        [COMMAND, *arguments], cwd=folder, stdout=subprocess.PIPE, text=True, timeout=SECONDS, check=False
    )
    if done.returncode != 0:
        sys.exit(f"error: search-r3 {' '.join(arguments)} ended with exit code {done.returncode}")
    return done.stdout


def main() -> None:
    if not PACKAGE.is_relative_to(sys.prefix):
        sys.exit(f"error: search_r3 was imported from {PACKAGE}, not from the environment {sys.prefix}")
    if missing := [name for name in FILES if not (PACKAGE / name).is_file()]:
        sys.exit(f"error: the wheel lacks {', '.join(missing)}; name them in pyproject.toml's package-data")
    if (found := importlib.metadata.version("search-r3")) != search_r3.__version__:
        sys.exit(f"error: the wheel's version is {found}, the package's {search_r3.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "notes").mkdir()
        (Path(folder) / "notes" / "tides.md").write_text("# Tides\n\nThe moon moves the sea.\n", encoding="utf-8")
        (Path(folder) / "notes" / "bread.md").write_text("# Bread\n\nYeast makes dough rise.\n", encoding="utf-8")
        run("--version", folder=folder)
        run("models", folder=folder)
        run("index", "notes", "--into", "notes.index", "--model", "smollm2-135m", folder=folder)
        question = ("search", "notes.index", "what makes bread rise", "--reasoning", "off", "--json")
        answer = json.loads(run(*question, folder=folder))
        if not answer["hits"][0]["path"].endswith("bread.md"):
            sys.exit(f"error: the question about bread found {answer['hits'][0]['path']} first")
    print(f"search_r3 {found}: installed from its wheel, indexes and searches from another folder")


if __name__ == "__main__":
    main()
