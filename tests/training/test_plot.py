from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from search_r3.errors import InputError
from search_r3.training.plot import Run, plot_runs
from search_r3.training_curves import PANELS

TERMS = ("infonce", "triplet", "sft", "kl", "distillation", "infonce_query", "infonce_reasoning", "accuracy_query",
         "accuracy_reasoning", "rows_reasoning", "reward", "dcg_scaled", "dcg", "direct", "dcg_scaled_high", "dcg_high",
         "emission", "distinct", "zero_variance", "length", "entropy", "policy", "contrastive", "kl_reference",
         "clip_low", "clip_high", "mean_age", "staleness_error", "gain")  # fmt: skip
ENDINGS = ("off", "on", "emission", "tokens", "distinct", "uniformity", "alignment", "reward", "reward_direct", "gain",
           "given", "shuffled")  # fmt: skip


def write_log(folder: Path, records: list[dict]) -> Path:
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    record = {"step": step, "loss": 3.0 / step, "terms": dict.fromkeys(TERMS, 1.0 / step), "lr": 1e-4 * step,
              "grad_norm": 2.0 + step, "tokens": 900.0, "tokens_per_second": 4000.0 + step,
              "memory_gib": 1.5 + step}  # fmt: skip
    return record | changes


def full_log(steps: int = 50, pools: tuple[str, ...] = ("cosqa", "scifact.dev")) -> list[dict[str, Any]]:
    dev = {f"{pool}.{ending}": 0.25 * (i + 1) for i, pool in enumerate(pools) for ending in ENDINGS}
    dev |= {"ndcg@10.off": 0.4, "ndcg@10.on": 0.3, "emission": 0.9, "distinct": 0.8}
    return [{"step": 0, "dev": dev}, *(step_record(step) for step in range(1, steps + 1)), {"step": steps, "dev": dev}]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The matplotlib figures that were written."""
    from matplotlib.figure import Figure

    figures = []
    real = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **more: (figures.append(self), real(self, *args, **more))
    )
    return figures


def panels(figure: Any) -> dict[str, Any]:
    return {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_visible()}


def labels(axis: Any) -> list[str]:
    return [line.get_label() for line in axis.get_lines() if not line.get_label().startswith("_")]


def test_a_run_is_drawn_while_it_has_little_to_show(tmp_path: Path, drawn: list[Any]) -> None:
    run = write_log(
        tmp_path / "run", [{"step": 1, "loss": 2.0, "terms": {"infonce": 2.0}, "lr": 0.1, "grad_norm": 1.0}]
    )
    assert plot_runs([run]) == run / "curves.png"
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(panels(drawn[0])) == ["loss and its terms", "gradient norm", "learning rate"]  # no empty panel


@pytest.mark.slow
def test_every_metric_of_a_run_has_its_place(tmp_path: Path, drawn: list[Any]) -> None:
    plot_runs([write_log(tmp_path / "run", full_log())])
    shown = panels(drawn[0])
    assert len(shown) == len(PANELS) + 1  # dev nDCG@10 twice: its mean, and by data set
    assert list(shown)[:3] == ["reward of rollouts", "dev nDCG@10", "KL to stage 1"]
    assert labels(shown["dev nDCG@10"]) == ["direct", "with reasoning"]
    direct, reasoned = shown["dev nDCG@10"].texts
    assert (direct.get_text(), reasoned.get_text()) == ("direct", "with reasoning")
    assert direct.xy[1] > reasoned.xy[1] + 0.7  # beside the ends of their lines, which are 0.4 and 0.3
    assert labels(shown["loss and its terms"]) == [
        "loss", "InfoNCE", "triplet", "cross-entropy", "KL to the base", "KL to the teacher"
    ]  # fmt: skip
    assert labels(shown["in-batch accuracy"]) == ["direct", "reasoning"]
    quality = shown["dev nDCG@10 (dashed: reasoning on)"]
    assert labels(quality) == ["mean", "cosqa", "scifact"]
    assert [list(line.get_ydata()) for line in quality.get_lines()] == [
        [0.4, 0.4], [0.25, 0.25], [0.5, 0.5], [0.3, 0.3], [0.25, 0.25], [0.5, 0.5]
    ]  # fmt: skip
    assert shown["dev reasoning that ends (dashed: distinct)"].get_lines()[0].get_ydata()[0] == 0.9
    assert shown["dev uniformity (lower: more even)"].get_lines()[0].get_ydata()[0] == pytest.approx(0.375)
    rate = shown["learning rate, in 1e-3"].get_lines()[0].get_ydata()
    assert rate[0] == pytest.approx(0.1)
    assert rate[-1] == pytest.approx(5.0)
    assert {axis.get_xlim() for axis in shown.values()} == {(-1.0, 51.0)}


def test_the_best_step_the_resumes_and_the_constants_are_said(tmp_path: Path, drawn: list[Any]) -> None:
    dev = [{"step": n, "dev": {"ndcg@10.off": value, "ndcg@10.off_se": 0.01}}
           for n, value in ((0, 0.4), (10, 0.6), (20, 0.5))]  # fmt: skip
    steps = [step_record(n, terms={"clip_low": 0.0}, memory_gib=3.0 if n <= 12 else 2.0) for n in range(1, 21)]
    plot_runs([write_log(tmp_path / "run", [*dev, *steps])])
    title = drawn[0].get_suptitle()
    assert "best dev nDCG@10 direct 0.600 after step 10" in title
    assert "resumed after step 12" in title
    assert "constant: " in title
    assert "share of tokens clipped, below 0" in title
    shown = panels(drawn[0])
    assert "share of tokens clipped" not in shown
    assert list(shown)[:2] == ["loss and its terms", "dev nDCG@10, 95% intervals"]
    quality = shown["dev nDCG@10, 95% intervals"]
    (ribbon,) = quality.collections
    assert ribbon.get_paths()[0].vertices[:, 1].min() == pytest.approx(0.4 - 1.96 * 0.01)
    at = [line.get_xdata()[0] for line in quality.get_lines()]
    assert at.count(10) == 2  # the line and the ring
    assert at.count(12) == 1


def test_two_evaluations_are_not_joined_as_if_they_were_a_trend(tmp_path: Path, drawn: list[Any]) -> None:
    plot_runs([write_log(tmp_path / "run", full_log(pools=("cosqa",)))])
    quality = panels(drawn[0])["dev nDCG@10"].get_lines()
    assert [line.get_linestyle() for line in quality if not line.get_label().startswith("_")] == ["None", "None"]


def test_a_picture_can_be_dark(tmp_path: Path, drawn: list[Any]) -> None:
    run = write_log(tmp_path / "run", [step_record(1), step_record(2)])
    for dark in (False, True):
        plot_runs([run], dark=dark)
    light, night = (figure.get_facecolor()[:3] for figure in drawn)
    assert sum(light) > 2.9
    assert sum(night) < 0.5


def test_each_term_of_the_loss_has_its_own_curve(tmp_path: Path, drawn: list[Any]) -> None:
    terms = next(panel for panel in PANELS if "infonce" in panel.metrics).metrics
    steps = [{"step": n, **{name: n + i for i, name in enumerate(terms)}} for n in (1, 2)]
    plot_runs([write_log(tmp_path / "run", steps)])
    shown = panels(drawn[0])["loss and its terms"]
    assert labels(shown) == list(terms.values())
    assert len({(line.get_color(), line.get_linestyle()) for line in shown.get_lines()}) == len(terms)


@pytest.mark.nightly
@pytest.mark.slow
def test_no_word_lies_on_another_or_outside_the_page(tmp_path: Path, drawn: list[Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    plot_runs([write_log(tmp_path / "run", full_log(pools=("cosqa", "scifact", "hotpotqa", "cranfield")))])
    plot_runs([write_log(tmp_path / f"a-longer-name-{i}", full_log()) for i in range(9)])
    for figure in drawn:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        boxes = [(axis.get_title(loc="left"), axis._left_title.get_window_extent(renderer)) for axis in figure.axes]
        boxes += [
            ("legend", legend.get_window_extent(renderer)) for axis in figure.axes if (legend := axis.get_legend())
        ]
        boxes += [("runs", legend.get_window_extent(renderer)) for legend in figure.legends]
        boxes += [("panel", axis.get_window_extent(renderer)) for axis in figure.axes if axis.get_visible()]
        boxes = [(name, box) for name, box in boxes if name]
        for i, (name, box) in enumerate(boxes):
            assert box.x0 > -1, name
            assert box.x1 < figure.bbox.x1 + 1, name
            for other, its in boxes[i + 1 :]:
                across = min(box.x1, its.x1) - max(box.x0, its.x0)
                along = min(box.y1, its.y1) - max(box.y0, its.y0)
                assert across < 1 or along < 1, (name, other)


def test_several_runs_are_compared_by_their_folders_names(tmp_path: Path, drawn: list[Any]) -> None:
    one = write_log(tmp_path / "runs" / "teacher", full_log())
    other = write_log(tmp_path / "runs" / "plain", [step_record(1, terms={"infonce": 0.5})])
    assert plot_runs([one, other / "log.jsonl"]) == tmp_path.resolve() / "runs" / "compare.png"
    shown = panels(drawn[0])
    assert labels(shown["InfoNCE"]) == ["teacher", "plain"]
    assert labels(shown["KL to the teacher"]) == ["teacher"]
    assert labels(shown["dev nDCG@10, off"]) == ["teacher"]
    assert list(shown["dev nDCG@10, off"].get_lines()[0].get_ydata()) == [0.4, 0.4]  # the mean over the pools
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["teacher", "plain"]
    colours = {line.get_label(): line.get_color() for line in shown["InfoNCE"].get_lines()}
    assert shown["KL to the teacher"].get_lines()[0].get_color() == colours["teacher"] != colours["plain"]


def test_runs_of_one_name_are_told_apart_and_a_run_given_twice_is_one(tmp_path: Path, drawn: list[Any]) -> None:
    runs = [write_log(tmp_path / name / "run", [step_record(1)]) for name in ("a", "b")]
    plot_runs([*runs, runs[0]], tmp_path / "both.svg")
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a/run", "b/run"]
    assert b"<svg" in (tmp_path / "both.svg").read_bytes()


def test_the_mean_over_pools_is_taken_where_none_was_logged() -> None:
    run = Run("run", [], [{"step": 3, "dev": {"a.uniformity": -1.0, "b.uniformity": -2.0}}])
    assert run.dev_metrics("uniformity") == {"mean": [(3, -1.5)], "a": [(3, -1.0)], "b": [(3, -2.0)]}
    assert Run("run", [], [{"step": 3, "dev": {"a.off": 0.5, "ndcg@10.off": 0.5}}]).dev_metrics("off") == {
        "a": [(3, 0.5)]
    }


@pytest.mark.parametrize(("text", "message"), [("{\n", "line 1"), ("", "no step yet"), ('{"loss": 1}\n', "line 1")])
def test_a_broken_log_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        plot_runs([tmp_path])


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        plot_runs([tmp_path / "nothing"])
    run = write_log(tmp_path / "run", [step_record(1)])
    with pytest.raises(InputError, match=r"'\.txt' is not an image format; try \.png"):
        plot_runs([run], tmp_path / "curves.txt")
    with pytest.raises(InputError, match="0 runs"):
        plot_runs([])
