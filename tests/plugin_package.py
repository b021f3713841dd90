"""A package that a test installs: one module and its entry points, where Python looks for packages."""

from __future__ import annotations

import ast
import inspect
import re
from itertools import count
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[1] / "docs" / "write-your-own"
_NUMBERS = count(1)


def install_plugin(
    folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, entries: str, code: str = "VALUE = 3"
) -> None:
    """Install `package` into `folder` for the length of a test, as pip would.

    Args:
        entries: its entry_points.txt, in which MODULE stands for the module's name.
        code: the module's text.
    """
    module = f"plugin_for_test_{next(_NUMBERS)}"
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(entries.replace("MODULE", module), encoding="utf-8")
    (folder / f"{module}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)


def code_of_page(name: str) -> str:
    """The module that docs/write-your-own/NAME.md shows."""
    found = re.search(r"```python\n(.*?)```", (PAGES / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return found[1]


def code_of_docstring(owner: object) -> str:
    """The example in the docstring of a class or module: its indented block that begins with an import."""
    found = re.search(r"^    (?:import|from) .*\n(?:    .*\n|\n)+", f"{inspect.getdoc(owner)}\n", re.MULTILINE)
    assert found
    return inspect.cleandoc(found[0])


def without_docstrings(code: str) -> str:
    """What the code does: equal for two texts that differ in comments, docstrings and blank lines alone."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.unparse(tree)
