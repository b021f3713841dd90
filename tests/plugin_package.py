"""A package that a test installs: one module and its entry points, where Python looks for packages."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

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
