"""The README's table is what the run files give."""

from __future__ import annotations

from pathlib import Path

from search_r3.data.beir import resolve_root
from search_r3.evaluation.tables import check_readme

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_remade_from_the_run_files() -> None:
    check = check_readme(ROOT / "README.md", ROOT / "results", resolve_root())
    assert not check.problems
