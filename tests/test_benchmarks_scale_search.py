"""What docs/scale.md says about searching: one row of it calculated anew, and the fit to measurements."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_scripts import FOLDER
from processes import run

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scale_search  # noqa: E402
from scale_plan import Plan  # noqa: E402
from scale_search import SearchPlan, comparisons, fitted, machines, share, share_for  # noqa: E402

PLAN, SEARCH = Plan(), SearchPlan()


def cells(page: str, start: str) -> list[str]:
    """The cells of the first row of a table that begins so."""
    line = next(line for line in page.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_of_the_page_is_what_its_assumptions_give():
    """A hundred million documents on disk, calculated here from the parameters that the page shows."""
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")

    def given(name: str) -> float:
        return float(cells(page, f"| `{name}` |")[1].replace(",", ""))

    rows, width = 1e8, 3584
    part = given("probe_share") * 100 ** -given("probe_exponent")
    codes, centers = rows * (width / 8 + 8), 10_000 * width * 4
    pages = given("refine") * 20 * 4  # 14,336 bytes of a vector are four of 4,096
    cpu = given("fixed_ms") / 1e3 + given("page_us") * pages / 1e6
    cpu += 1e-9 * (
        given("scan_ns_byte") * part * codes + given("memory_ns_byte") * centers + given("words_ns_row") * rows
    )
    a_second = given("cores") * given("busy_share") / cpu
    memory = codes + centers + rows * given("text_bytes") * given("index_share")
    found = cells(page, "| 100 million | LanceDB, its disk |")
    assert found[2] == f"{memory / 1e9:,.1f} GB"
    for load, cell in zip((10, 100, 1000), found[3:], strict=True):
        if memory > given("memory_gb") * given("memory_share") * 1e9:
            assert cell == "does not fit"
            continue
        count, why, dollars = re.fullmatch(r"([\d,]+) \((\w+)\), \$([\d,]+)", cell).groups()
        assert int(count.replace(",", "")) == max(2, math.ceil(load / a_second))
        assert why == ("cores" if load / a_second > 2 else "availability")
        assert int(dollars.replace(",", "")) == round(int(count.replace(",", "")) * 730 * given("machine_dollars_hour"))


def test_machines_grow_with_the_load_and_what_does_not_fit_is_said():
    ten, hundred = (machines(PLAN, SEARCH, 1e8, load, "disk") for load in (10, 100))
    assert 9 < hundred.count / ten.count < 11
    assert (ten.limit, hundred.limit) == ("cores", "cores")
    assert machines(PLAN, SEARCH, 1e6, 0.1, "disk").limit == "availability"
    assert machines(PLAN, SEARCH, 1e9, 1, "disk") == scale_search.Machines(math.inf, "memory", math.inf)
    assert machines(PLAN, SEARCH, 1e9, 1, "milvus ivf").limit == "memory"
    assert machines(PLAN, SEARCH, 1e6, 100, "object storage").limit == "requests"
    slow_disk = replace(SEARCH, disk_reads_second=1000)
    assert machines(PLAN, slow_disk, 1e6, 100, "disk").limit == "disk"


def test_the_share_of_partitions_falls_as_measured_and_is_at_least_one_partition():
    assert share(1e8, SEARCH) == SEARCH.probe_share
    falling = replace(SEARCH, probe_exponent=0.25)
    assert share(1e8, falling) == pytest.approx(SEARCH.probe_share / 10**0.5)
    assert share(1e6, replace(SEARCH, probe_share=1e-6)) == 1e-3
    assert share(100, falling) == 1.0


def test_a_build_needs_room_for_the_old_rows_and_for_the_kept_parts():
    found = scale_search.building_bytes(PLAN, SEARCH)
    assert found["kept parts: the vectors"] == 1e8 * 3584 * 4
    assert found["most"] > 1.9 * found["the table"]
    little = scale_search.building_bytes(PLAN, replace(SEARCH, rewritten_share=0.01))
    rows = little["spool: text, ids, hashes"] + little["kept parts: the vectors"]
    assert little["most"] == pytest.approx(2 * rows), "then the parts beside the rows are the peak"


def made_figures(rows: list[int], dimension: int = 128) -> dict:
    """As capacity.json, from known parameters: 3 ns a byte, 10 us a page, a share of 0.1 at a million, falling as the
    fourth root."""
    by_rows = {}
    for count in rows:
        needed = 0.1 * (count / 1e6) ** -0.25
        tried = [
            {
                "share": part * 4 / refine,
                "refine": refine,
                "cpu_ms": 2
                + 3e-6 * part * 4 / refine * count * (dimension / 8 + 8)
                + 0.01 * 20 * refine
                + 0.26e-6 * 4 * dimension * round(count**0.5),
                "recall_at_10": 0.98 + 0.01 * math.log2(part / needed),
            }
            for refine in (4, 16)
            for part in (needed / 4, needed / 2, needed * 2)
        ]
        by_rows[str(count)] = {"search": {"approximate": tried, "words": {"cpu_ms": 1 + 5e-6 * count}}}
    return {"goal": 0.98, "dimension": dimension, "by_rows": by_rows}


def test_the_parameters_behind_measurements_are_found_again():
    found = fitted(made_figures([1_000_000, 3_000_000, 10_000_000]))
    assert found.probe_share == pytest.approx(0.1, rel=0.01)
    assert found.probe_exponent == pytest.approx(0.25, rel=0.01)
    assert found.scan_ns_byte == pytest.approx(3, rel=0.01)
    assert found.words_ns_row == pytest.approx(5, rel=0.01)
    assert found.page_us == pytest.approx(10, rel=0.01)
    assert found.refine == 4
    assert found.fixed_ms == pytest.approx(3, rel=0.01)
    assert found.cores == SEARCH.cores


def test_the_formula_gives_what_it_was_fitted_to():
    figures = made_figures([1_000_000, 3_000_000, 10_000_000])
    found = comparisons(figures, fitted(figures))
    assert len(found) == 9
    assert all(abs(one.off) < 0.01 for one in found), found
    for one in figures["by_rows"]["3000000"]["search"]["approximate"]:
        one["cpu_ms"] *= 3
    worse = [one for one in comparisons(figures, fitted(figures)) if one.rows == 3_000_000]
    assert max(abs(one.off) for one in worse) > 0.1


def test_refining_more_is_assumed_only_where_less_does_not_reach_the_goal():
    figures = made_figures([1_000_000, 10_000_000])
    assert fitted(figures).refine == 4
    for one in figures["by_rows"]["10000000"]["search"]["approximate"]:
        one["recall_at_10"] -= 0.05 * (one["refine"] == 4)
    assert fitted(figures).refine == 16


def test_the_share_for_a_recall_is_between_two_that_were_measured():
    tried = [{"share": 0.1, "refine": 4, "recall_at_10": 0.9}, {"share": 0.4, "refine": 4, "recall_at_10": 1.0}]
    assert share_for(tried, 0.95) == pytest.approx(0.2)
    assert share_for(tried, 1.0) == pytest.approx(0.4)
    assert share_for(tried[:1], 0.98) is None
    assert share_for([*tried, {"share": 0.15, "refine": 16, "recall_at_10": 0.99}], 0.95) == pytest.approx(0.15)


@pytest.mark.nightly
def test_the_measurement_runs_and_its_results_fit(tmp_path):
    pytest.importorskip("lancedb")
    output = tmp_path / "found.json"
    command = [sys.executable, str(FOLDER / "capacity.py"), "--tiny", "--rows", "1500", "3000", "--queries", "10"]
    command += ["--work", str(tmp_path / "work"), "--json", str(output)]
    run(command, env=os.environ | {"PYTHONPATH": str(FOLDER.parent)}, seconds=600)
    figures = json.loads(output.read_text())["figures"]
    for found in figures["by_rows"].values():
        recalls = [one["recall_at_10"] for one in found["search"]["approximate"]]
        assert max(recalls) > 0.9
        assert found["search"]["exact"]["recall_at_10"] == 1.0
        assert found["build"]["kind"] == "IVF_RQ"
    assert fitted(figures).words_ns_row > 0
