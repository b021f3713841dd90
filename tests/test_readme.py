"""Every table of the README and every model card is what the run files give, and no figure in a table is typed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from search_r3.data.beir import resolve_root
from search_r3.evaluation.blocks import Remaking, remake_all, typed_figures

ROOT = Path(__file__).resolve().parents[1]
CARDS = sorted(path.parent.name for path in (ROOT / "models").glob("*/search_r3.json"))


@pytest.fixture(scope="module")
def made() -> Remaking:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*documents have an empty")
        return remake_all([ROOT / "README.md"], ROOT / "results", ROOT / "models", resolve_root())


def test_the_tables_are_those_of_the_run_files(made: Remaking) -> None:
    if made.check.unchecked:
        taken = ", ".join(made.check.unchecked)
        warnings.warn(f"not measured again but taken from results/metrics, for want of the data: {taken}", stacklevel=1)
    assert made.check.problems == []
    assert made.files[0].diff() == "", "run: search-r3 tables"


@pytest.mark.parametrize("name", CARDS)
def test_the_card_is_what_the_tool_writes(made: Remaking, name: str) -> None:
    (card,) = [file for file in made.files if file.path.parent.name == name]
    assert card.diff() == "", "run: search-r3 tables"
    assert not card.changed


def test_no_figure_in_a_table_of_the_readme_is_typed() -> None:
    assert typed_figures((ROOT / "README.md").read_text(encoding="utf-8")) == []
