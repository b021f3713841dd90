"""The release check of `make figures`: README.md, docs/ and the model cards agree with results/.

It reads every run file, so a new result changes its outcome. The unit tests of the code that makes these tables use
small made-up runs (tests/evaluation, tests/test_benchmarks_scale.py).
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest

from search_r3.data.beir import resolve_root
from search_r3.evaluation.publish.markdown_blocks import BEGIN, END, PAGES, Regeneration, regenerate_all

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scale  # noqa: E402

SCALE_PAGE = ROOT / "docs" / "scale.md"
FIGURE = re.compile(r"\d\.\d")
"""A measured number, such as 0.643."""
CARDS = sorted(path.parent.name for path in (ROOT / "models").glob("*/search_r3.json"))


@pytest.fixture(scope="module")
def made() -> Regeneration:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*documents have an empty")
        return regenerate_all([ROOT / page for page in PAGES], ROOT / "results", ROOT / "models", resolve_root())


def test_the_tables_are_those_of_the_run_files(made: Regeneration) -> None:
    if made.check.unchecked:
        taken = ", ".join(made.check.unchecked)
        warnings.warn(f"not measured again but taken from results/metrics, for want of the data: {taken}", stacklevel=1)
    assert made.check.problems == []
    assert [file.diff() for file in made.files[: len(PAGES)]] == [""] * len(PAGES), "run: search-r3 tables"


@pytest.mark.parametrize("name", CARDS)
def test_the_card_is_what_the_tool_writes(made: Regeneration, name: str) -> None:
    (card,) = [file for file in made.files if file.path.parent.name == name]
    assert card.diff() == "", "run: search-r3 tables"
    assert not card.changed


def typed_figures(text: str) -> list[str]:
    """The rows of Markdown tables with a measured number outside generated blocks, which no command updates."""
    kept, inside = [], False
    for line in text.splitlines():
        if BEGIN.match(line):
            inside = True
        elif END.match(line):
            inside = False
        elif not inside and line.startswith("|") and FIGURE.search(line):
            kept.append(line)
    return kept


def test_typed_figures_are_those_outside_of_blocks() -> None:
    inside = "<!-- table: results -->\n| tiny | 0.643 |\n<!-- /table -->\n"
    assert typed_figures(f"{inside}| a | 0.5 |\n\nprose 0.7\n\n| command | what |\n") == ["| a | 0.5 |"]


@pytest.mark.parametrize("page", PAGES)
def test_no_figure_in_a_table_of_results_is_typed(page: str) -> None:
    assert typed_figures((ROOT / page).read_text(encoding="utf-8")) == []


def test_the_rates_that_scale_md_uses_agree_with_each_other() -> None:
    """A step of stage 1 and the loss of stage 2 in bfloat16 reach the same FLOP/s, to a quarter."""
    reached = [item.tflops for item in scale.measured() if item.precision.startswith("bfloat16")]
    assert len(reached) == 2
    assert max(reached) < 1.25 * min(reached)


def test_what_scale_md_calls_measured_is_what_was_measured() -> None:
    figures = scale._figures(scale.RESULTS / "scale.json")
    for name in ("stored_share", "index_share"):
        assert getattr(scale.Plan(), name) == pytest.approx(figures[name], rel=0.05)
    assert f"{figures['rows']:,} rows of {figures['text_bytes']:.0f} bytes" in SCALE_PAGE.read_text(encoding="utf-8")


def test_scale_md_is_what_the_script_makes() -> None:
    page = SCALE_PAGE.read_text(encoding="utf-8")
    made = scale.filled(page, scale.blocks(scale.Plan()))
    assert made == page, "run: python benchmarks/scale.py --page docs/scale.md"
    assert "No GPU has been measured" in page
