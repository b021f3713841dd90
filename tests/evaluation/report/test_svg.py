"""Plots are well-formed, described, without colors of their own, and stand where their numbers say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search_r3.evaluation.report.axes import Scale, log_ticks, nice_ticks, number, padded, tick_labels
from search_r3.evaluation.report.interval_plots import GRAY, Mark, Row, difference_mark, interval_plot
from search_r3.evaluation.report.plot_parts import WIDTH, Plot
from search_r3.evaluation.report.svg import Series, gain_plot, histogram, line_plot, scatter
from search_r3.training_curves import spread

PLOT = Plot("a plot/1", 'A <b> & "title"', "What it <shows>", "x", "y")
SVG = "{http://www.w3.org/2000/svg}"


def compared(difference: float, p: float) -> dict[str, float]:
    return {"difference": difference, "low": difference - 0.05, "high": difference + 0.1, "p_corrected": p}


DRAWN = {
    "line": lambda: line_plot(
        PLOT, [Series("off <i>", [(0, 0.5), (1, 0.7)]), Series("on", [(0, 0.4), (1, 0.9)], 1)],
        level=("base", 0.6), mark=("here", (1, 0.9)),
    ),
    "labels": lambda: line_plot(PLOT, [Series("a", [(0, 1), (9, 2)]), Series("b", [(0, 1), (9, 2)], 1)],
                                direct_labels=True),
    "ribbon": lambda: line_plot(PLOT, [Series("", [(0, 0.5), (1, 0.7)], ribbon=[(0.4, 0.6), (0.5, 0.9)])]),
    "means": lambda: interval_plot(PLOT, [Row("scifact (300)"), Row("x & y", [Mark(0.5, 0.4, 0.6)]),
                                          Row("bm25", [Mark(0.1)], GRAY)], around_zero=False),
    "forest": lambda: interval_plot(PLOT, [Row("mean", [Mark(0.1, 0, 0.2), Mark(-0.1, -0.2, 0, "s1", 1)], "strong"),
                                           Row("few", [Mark(0.2, 0, 0.3, GRAY), Mark(0.1, shape=1)], GRAY)],
                                    ["BM25", "MiniLM"]),
    "intervals": lambda: interval_plot(PLOT, [Row("on", [difference_mark(compared(0.1, 0.01), 0.05)]),
                                              Row("no", [difference_mark(compared(-0.1, 0.2), 0.05)])]),
    "histogram": lambda: histogram(PLOT, [0, 0.5, 1], [("before", [0.75, 0.25]), ("after", [0.5, 0.5])]),
    "gains": lambda: gain_plot(PLOT, [0.5, 0.0, -0.25, 0.0]),
    "scatter": lambda: scatter(PLOT, [("a", 10, 0.5), ("b", 1000, 0.6)], log_x=True),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_a_plot_is_well_formed_described_and_within_its_frame(name):
    text = DRAWN[name]()
    root = ET.fromstring(text)
    assert root.get("role") == "img"
    ids = root.get("aria-labelledby").split()
    found = {element.get("id"): element.text for element in root.iter() if element.get("id")}
    assert [found[one] for one in ids] == [
        PLOT.title,
        PLOT.description,
    ]  # the text itself: it was escaped, and only once
    assert not re.search(r'fill="#|stroke="#|style=', text)  # colors are the style sheet's, light and dark
    width, height = (float(value) for value in root.get("viewBox").split()[2:])
    assert width == WIDTH
    for element in root.iter(f"{SVG}text"):
        assert 0 <= float(element.get("x")) <= width
        assert 0 <= float(element.get("y")) <= height
    assert text == DRAWN[name]()


def test_points_stand_where_the_axis_described():
    text = line_plot(PLOT, [Series("a", [(0, 0.0), (10, 1.0)])], y_range=(0, 1))
    root = ET.fromstring(text)
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]
    ticks = {
        t.text: (float(t.get("x")), float(t.get("y"))) for t in root.iter(f"{SVG}text") if "tick" in t.get("class")
    }
    assert dots[0][1] == pytest.approx(ticks["0.0" if "0.0" in ticks else "0.00"][1] - 4)
    assert dots[1][1] == pytest.approx(next(y for text, (_, y) in ticks.items() if float(text) == 1) - 4)
    assert dots[0][0] < dots[1][0]


def test_gains_are_sorted_and_split_at_zero():
    text = gain_plot(PLOT, [-0.5, 0.25, 0.0, 1.0])
    up = re.search(r'class="area up" d="([^"]+)"', text).group(1)
    down = re.search(r'class="area down" d="([^"]+)"', text).group(1)
    zero = float(re.match(r"M[\d.]+ ([\d.]+)", up).group(1))
    heights = [zero - float(y) for y in re.findall(r"V([\d.]+)H", up)]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] == pytest.approx(4 * heights[1], rel=0.02)
    assert [zero - float(y) for y in re.findall(r"V([\d.]+)H", down)] == pytest.approx([-heights[0] / 2], rel=0.02)


def test_only_a_sure_difference_is_filled():
    text = DRAWN["intervals"]()
    assert 'class="dot up"' in text
    assert 'class="dot unsure"' in text
    assert "+0.100" in text
    assert "−0.100" in text


def test_a_value_without_an_interval_is_hollow_and_says_so():
    text = DRAWN["means"]()
    assert text.count('class="range') == 1
    assert "bm25: 0.1000, not tested" in text


def test_series_differ_by_shape_and_few_queries_are_gray():
    text = DRAWN["forest"]()
    assert text.count("<circle") == 3  # two rows and the legend
    assert text.count("<rect") == 3
    assert text.count('class="range gray"') == 1
    assert 'class="row muted"' in text
    assert "few, MiniLM: +0.1000, not tested" in text


def test_labels_at_the_ends_of_lines_do_not_overlap():
    assert spread([50, 50, 51], 12, 0, 100) == [50, 62, 74]
    assert spread([99, 10, 98], 12, 0, 100) == [100, 10, 88]
    root = ET.fromstring(DRAWN["labels"]())
    ys = [float(t.get("y")) for t in root.iter(f"{SVG}text") if t.text in ("a", "b")]
    assert abs(ys[0] - ys[1]) > 11.8


def test_a_ribbon_spans_its_intervals():
    text = DRAWN["ribbon"]()
    xs, ys = zip(
        *re.findall(r"([\d.]+) ([\d.]+)", re.search(r'class="ribbon s0" d="([^"]+)Z"', text).group(1)), strict=True
    )
    assert len(set(xs)) == 2
    assert min(map(float, ys)) < float(re.search(r'class="line s0" d="M[\d.]+ ([\d.]+)', text).group(1))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: line_plot(PLOT, []),
        lambda: interval_plot(PLOT, []),
        lambda: interval_plot(PLOT, [Row("a heading")]),
        lambda: histogram(PLOT, [0, 1], [("a", [0.5, 0.5])]),
        lambda: gain_plot(PLOT, []),
        lambda: scatter(PLOT, []),
    ],
)
def test_nothing_to_draw_is_an_error(draw):
    with pytest.raises(ValueError, match="A <b>"):
        draw()


def test_what_xml_cannot_hold_is_left_out():
    text = line_plot(Plot("p", "a\x00b\x1bc", "d\x08"), [Series("", [(0, 1), (1, 1)])])
    assert ET.fromstring(text).find(f"{SVG}title").text == "abc"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_on_the_axis(low, span):
    high = low + span
    if high == low:
        return
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 10
    room = 1e-6 * max(span, abs(low) * 1e-6)
    assert all(low - room <= tick <= high + room for tick in ticks)
    assert ticks == sorted(ticks)


def test_ticks_and_their_labels():
    assert nice_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert nice_ticks(0, 3, whole=True) == [0, 1, 2, 3]
    assert log_ticks(0.5, 200) == [1, 10, 100]
    assert log_ticks(3, 30) == [5, 10, 20]
    assert tick_labels([0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert tick_labels([0, 1000, 2000]) == ["0", "1,000", "2,000"]
    assert tick_labels([-0.5, 0.0, 0.5]) == ["−0.5", "0.0", "0.5"]
    assert tick_labels([0, 0.000002]) == ["0", "2e−6"]
    assert [number(-0.0001), number(0.5, 1, sign=True), number(-0.5, 1, sign=True)] == ["0.000", "+0.5", "−0.5"]
    with pytest.raises(ValueError, match="no axis"):
        nice_ticks(1, float("nan"))
    with pytest.raises(ValueError, match="logarithmic"):
        log_ticks(0, 1)


def test_scales_keep_what_is_off_them_at_their_ends():
    scale = Scale(0, 10, 100, 200)
    assert [scale(value) for value in (-5, 0, 5, 10, 15)] == [100, 100, 150, 200, 200]
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)
    assert Scale(2, 2, 0, 10)(2) == 5
    assert padded([0.2, 0.8], zero=True)[0] == 0
    assert padded([3.0]) == pytest.approx((2.82, 3.18))
