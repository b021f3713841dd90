"""The page says what the results say, escapes what it shows, loads nothing, and passes an accessibility check."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import search_r3
from search_r3.cli import main
from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.errors import InputError
from search_r3.evaluation.measures import MRR, NDCG, RECALL
from search_r3.evaluation.report.html_page import chosen_plots, render, sections, write_report
from search_r3.evaluation.report.load_results import TrainingRun, load_results
from search_r3.evaluation.rollouts.reasoning_rewards import EDGES, METRICS
from search_r3.evaluation.study.study import families
from search_r3.evaluation.suite import evaluate, evaluate_system, load_dataset, paths
from search_r3.evaluation.systems import SearchR3System

EVIL = '<script>alert("x")</script> & <b>bold</b>'
WORDS = ("aspirin", "bread", "moon", "python", "Paris", "tides", "yeast", "heart", "sea", "list", "mean", "file")
VOID = {"meta", "wbr", "br", "img", "link", "input", "hr"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """40 documents; 16 queries, one of which would be a script if it were not escaped; the same as a fixed part."""
    rng = np.random.default_rng(0)
    corpus = {f"d{i}": Document(f"d{i}", "", " ".join(rng.choice(WORDS, 5))) for i in range(40)}
    queries = {f"q{i}": " ".join(corpus[f"d{i}"].text.split()[:2]) for i in range(16)} | {"q3": f"heart {EVIL}"}
    folder = tmp_path_factory.mktemp("data")
    qrels = {qid: {f"d{qid[1:]}": 2, f"d{int(qid[1:]) + 20}": 1} for qid in queries}
    write_beir(folder / "topics", BeirDataset("topics", corpus, queries, qrels), "test")
    write_beir(folder / "other/en", BeirDataset("en", corpus, {"q1": queries["q1"]}, {"q1": qrels["q1"]}), "test")
    return folder


class Reasoner:
    """Queries on their own are embedded well; reasoning spoils every other one. It writes what would be markup."""

    contract_hash, dtype = "c" * 64, "float32"

    def encode_document(self, texts, **_):
        return np.stack([self._row(text) for text in texts])

    def encode_query(self, texts, **_):
        return self.encode_document(texts)

    def reason(self, texts, **_):
        from search_r3.model.searchr3 import Reasoned

        more = ["" if i % 2 else " moon sea" for i in range(len(texts))]
        return [
            Reasoned(f"<i>{m}</i>\x1b", self._row(t + m), i + 1, i == 0, [])
            for i, (t, m) in enumerate(zip(texts, more, strict=True))
        ]

    def _row(self, text):
        row = np.array([1e-3 + text.lower().split().count(word.lower()) for word in WORDS], dtype=np.float32)
        return row / np.linalg.norm(row)


@pytest.fixture(scope="module")
def results(root, tmp_path_factory):
    """Everything that a folder of results may hold."""
    output = tmp_path_factory.mktemp("all") / "results"
    evaluate(["topics", "other/en"], ["bm25"], output, data_root=root, use_cache=False)
    data = load_dataset("topics", None, root)
    for mode in ("off", "on"):
        evaluate_system(data, "test", SearchR3System(Reasoner(), "mine", mode, max_length=64), output, None)
    path = paths(output, "topics", "mine.on").metrics
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"commit": "abcdef0123-dirty", "hardware": "A <big> machine"}))
    write_json(output / "studies/topics/mine.json", made_up_study())
    write_json(output / "studies/topics/mine/auto.json", {"no": "study"})
    write_json(output / "studies/elsewhere/mine.json", made_up_study() | {"dataset": "elsewhere"})
    sides = [made_up_rollouts("mine-sft", 0), made_up_rollouts("mine-grpo", 3)]
    for side in sides:
        write_json(output / f"rollouts/topics.dev/{side['system']}.json", side)
    both = {"comparisons": {name: comparison(0.25, 0.001) for name in METRICS}, "before": sides[0], "after": sides[1]}
    sizes = {key: sides[0][key] for key in ("dataset", "num_queries", "num_documents")}
    write_json(output / "rollouts/topics.dev/mine-sft--mine-grpo.json", sizes | both)
    log = [{"step": i, "loss": 3 / i, "reward": 0.1, "terms": {"kl_reference": 0.01 * i, "mean_age": i}, "seconds": 1}
           for i in range(1, 61)]  # fmt: skip
    log.append({"step": 60, "dev": {"topics.dev.off": 0.5, "topics.dev.on": 0.75}, "seconds": 2})
    (output / "training/mine").mkdir(parents=True)
    (output / "training/mine/log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log) + '{"step": 6')
    about = {"command": "search-r3 train sft x.yaml", "commit": "1234567890", "hours": 1.5, "hardware": "CPU"}
    write_json(output / "training/mine/about.json", about)
    manifest = {"sources": [{"kind": "titles", "dataset": "topics", "count": 3}]}
    write_json(output / "training/mine/pairs.manifest.json", manifest)
    curve = {"steps": [0, 1, 2], "values": [0.0, 0.01, 0.03]}
    world = {"policies": {"selective": {"age": 2.5, "error": 0.0125}}, "curves": {"selective": {"error": curve}}}
    figures = {"simulated": {"600": world}, "goals": {"rows": 600, "error": {"found": 0.5, "goal": 0.02, "met": False}}}
    write_json(output / "benchmarks/environment.json", {"benchmark": "environment", "figures": figures})
    return output


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def comparison(difference: float, p: float) -> dict:
    return {"difference": difference, "low": difference - 0.1, "high": difference + 0.1, "p": p, "p_corrected": p,
            "wins": 9, "ties": 4, "losses": 3}  # fmt: skip


def made_up_study() -> dict:
    rng = np.random.default_rng(1)
    modes = ["off", "on", "empty", "shuffled", "bm25", "bm25+reasoning", "on-4", "auto"]
    scores = {mode: {f"q{i}": float(v) for i, v in enumerate(rng.random(16))} for mode in modes}
    scores["on"] = {qid: min(1.0, value + 0.3) for qid, value in scores["off"].items()}
    found = [{"id": "d1", "grade": 2, "text": EVIL}, {"id": "d2", "grade": None, "text": "x" * 240}]
    side = {NDCG: 0.25, "first_relevant": 1, "top": found}
    example = {"qid": "q3", "query": EVIL, "reasoning": "<u>why", "forced": True, "off": side, "on": side | {NDCG: 1.0}}
    shares = [0.0, 0.5, 1.0]
    timed = {"batch_1": {"median_ms": 12.5, "p95_ms": 20.0}, "batch_32": {"median_ms": 90.0, "p95_ms": 99.0}}

    def point(budget, mode):
        emitted, mean = 0.5 if budget else None, float(np.mean(list(scores[mode].values())))
        about = {"mean_tokens": float(budget or 0), "emission_rate": emitted, "latency": timed}
        return {"budget": budget, "mode": mode, "measures": {NDCG: mean}, **about}

    return {
        "dataset": "topics", "system": "mine", "num_queries": 16, "num_documents": 40, "remarks": ["one remark"],
        "modes": [{"mode": mode, "description": f"what {mode} is", "system": f"mine.{mode}", "mean_tokens": 1.5,
                   "measures": {NDCG: float(np.mean(list(scores[mode].values()))), MRR: 0.5, RECALL: 1.0}}
                  for mode in modes],
        "families": families(scores),
        "queries": list(scores["off"]),
        "per_query": {mode: list(of.values()) for mode, of in scores.items()},
        "examples": {"best": [example], "worst": []},
        "adaptive": {"summary": "40% of the queries reason, for +0.29 of +0.30; rule fitted on dev", "gain_of_on": 0.3,
                     "target": 0.95, "tokens_needed": 0.45, "share_needed": 0.4, "share_of_gain": 0.97,
                     "share_of_tokens": 0.41, "share_of_queries": 0.4,
                     "curve": {"shares": shares, "quality": shares, "best": shares, "random": shares}},
        "budgets": [point(None, "off"), point(0, "empty"), point(4, "on-4"), point(32, "on")],
        "hardware": "CPU", "commit": "a" * 40, "settings": {"format": 1, "split": "test", "budget": 32, "seed": 0},
    }  # fmt: skip


def made_up_rollouts(system: str, shift: int) -> dict:
    counts = [0] * (len(EDGES) - 1)
    counts[10 + shift], counts[20 + shift] = 30, 70
    return {
        "dataset": "topics.dev", "system": system, "num_queries": 20, "num_documents": 40,
        "figures": {name: {"mean": 0.5, "share_above_half": 0.1 * shift} for name in METRICS},
        "histograms": {"edges": list(EDGES), "counts": dict.fromkeys(METRICS, counts)},
        "emission_rate": {"sampled": 0.9, "greedy": 1.0}, "mean_tokens": {"sampled": 8.0, "greedy": 7.0},
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(results, root, tmp_path_factory):
    place = tmp_path_factory.mktemp("page")
    written = write_report(results, place / "report.html", plots=place / "images", data_root=root)
    return written[0].read_text(), written


class Reader(HTMLParser):
    """Ids, links, tags left open, and the text of every section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text: dict[str, str] = {}
        self.section = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.elements.append((tag, given))
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.section = given["id"] if tag == "section" else self.section
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text[self.section] = self.text.get(self.section, "") + data


def test_every_section_is_there_and_filled(page):
    reader = Reader(page[0])
    assert reader.open == []
    names = ["answers", "results", "reasoning", "studies", "gains", "examples", "rewards", "training", "environment",
             "measured"]  # fmt: skip
    assert [link for link in reader.links if link != "#main"] == [f"#{name}" for name in names]
    assert len(set(reader.ids)) == len(reader.ids)
    assert set(names) <= set(reader.ids)
    assert "To create it:" not in page[0]
    said = {name: " ".join(reader.text[name].split()) for name in names}
    for name, words in {
        "answers": ["Which model is best?", "Does reasoning help?", "Against the direct embedding, its own reasoning",
                    "What does it cost?", "12 ms direct and 12 ms with reasoning on topics", "mine, direct, against"],
        "measured": ["A <big> machine", "abcdef0+", "bm25, mine.off, mine.on", "topics"],
        "results": ["Documents were cut at 64 tokens for mine.off, mine.on.", "Few queries", "topics: training "
                    "pairs were made from it (titles)", "Recall@10", "uncommitted changes"],
        "studies": ["Every mode against off, topics", "what shuffled is", "Quality by budget", "Latency by budget",
                    "95% of the gain needs 45% of the tokens", "half the tokens is met", "one remark"],
        "rewards": ["mine-sft and mine-grpo", "90% of the samples emit", "+0.2500 ▲", "30%"],
        "training": ["60 steps in 1.50 hours", "KL to stage 1", "Mean age of documents", "Dev nDCG@10",
                     "Loss and its terms"],
        "environment": ["Simulated: 600 rows", "missed", "0.0125"],
        "examples": ["<u>why", "cut off at the budget", "x…", "elsewhere: mine, 1 won"],
    }.items():  # fmt: skip
        for word in words:
            assert word in said[name], (name, word)


def test_scrolled_tables_are_no_landmarks(page):
    """Two studies have tables of the same caption, and landmarks must have different names."""
    assert page[0].count('<div class="scroll" role="group"') == page[0].count('<div class="scroll"') > 5


def test_figures_and_verdicts_are_those_of_the_runs(results, root, page):
    found = load_results(results, None, root)
    assert found.baseline == "bm25"
    text = re.sub(r"<wbr>", "", page[0])
    for record in found.records:
        assert f"{record['measures'][NDCG]:.3f}" in text
    looked = found.by_dataset["topics"]
    for system in ("bm25", "mine.off", "mine.on"):
        measures = json.loads(paths(results, "topics", system).metrics.read_text())["measures"]
        assert np.mean(list(looked.scores[system].values())) == pytest.approx(measures[NDCG])
    row = found.pairs[0]
    off, on = (list(looked.scores[f"mine.{mode}"].values()) for mode in ("off", "on"))
    assert row["gains"] == pytest.approx(np.subtract(on, off))
    assert f"{row['wins']} / {row['ties']} / {row['losses']}" in text
    assert row["losses"] > 0
    assert set(found.tests) == {("topics", "mine.off"), ("topics", "mine.on")}
    other = load_results(results, "mine.off", root)
    assert other.tests["topics", "bm25"]["difference"] == pytest.approx(
        -found.tests["topics", "mine.off"]["difference"]
    )
    best = max(found.records, key=lambda r: r["measures"][NDCG] if r["dataset"] == "topics" else -1)
    assert f'<span class="best">{best["measures"][NDCG]:.3f}</span>' in page[0]


def test_a_verdict_needs_a_corrected_p_below_the_level(results, root):
    found = load_results(results, None, root)
    for p, marks in ((0.049, 1), (0.05, 0)):
        found.tests = {("topics", "mine.off"): comparison(-0.2, p)}
        table = next(s for s in sections(found) if s.name == "results").blocks[0]
        verdicts = [cell.verdict for row in table.rows for cell in row[1:] if cell.verdict]
        assert verdicts == ["down"] * marks + ["untested"]  # the second system has no test


def test_the_verdict_on_reasoning_names_the_models_where_there_are_several(results, root):
    found = load_results(results, None, root)
    row = found.pairs[0] | {"p_corrected": 0.01, "difference": -0.1}
    found.pairs = [row | {"model": "r3-sft"}, row | {"model": "r3-grpo"}]
    verdict = next(s for s in sections(found) if s.name == "reasoning").blocks[0].text
    assert "2 show a significant loss: topics (sft), topics (grpo) (p < 0.05 after correction)." in verdict


def test_a_win_below_the_shown_documents_says_where_the_relevant_one_stands(results, root):
    found = load_results(results, None, root)
    row = found.by_dataset["topics"].examples["mine"]["worst"][0]
    assert row["relevant"]["on"] == row["on"]["first_relevant"]
    assert "Relevant, rank" not in render_with(found, row | {"relevant": row["relevant"] | {"off": 1, "on": 3}})
    html = render_with(found, row | {"relevant": row["relevant"] | {"off": 12, "on": None}})
    assert "Relevant, rank 12 without and not found with reasoning: " in html


def render_with(found, row) -> str:
    found.by_dataset["topics"].examples["mine"] = {"best": [], "worst": [row]}
    return render(found)


def test_the_training_plot_shows_the_reward_if_it_was_logged(results, root):
    found = load_results(results, None, root)
    dev = [{"step": step, "dev": {"topics.dev.off": 0.5 + step / 10}} for step in (0, 1, 2, 3)]
    steps = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    for logged, title in ((steps, "Dev nDCG@10"), ([s | {"reward": s["loss"]} for s in steps], "Reward of rollouts")):
        found.runs = [TrainingRun("mine", logged, dev, {})]
        assert f">{title}</title>" in chosen_plots(found)["training"]


def test_the_answers_are_open_and_everything_else_is_folded(page):
    html = page[0]
    first, _, rest = html.partition('<section id="results"')
    assert "<details" not in first.partition("<main")[2]
    assert rest.count('<details class="section">') == 9
    assert html.index('id="measured"') > html.index('id="environment"')


def test_what_others_wrote_is_text_and_nothing_is_loaded(page):
    html = page[0]
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; &lt;b&gt;bold" in html
    assert "&lt;i&gt;" in html or "&lt;u&gt;why" in html
    assert "\x1b" not in html
    reader = Reader(html)
    assert [tag for tag, _ in reader.elements].count("script") == 1
    assert not any("src" in given or tag in ("link", "iframe", "img") for tag, given in reader.elements)
    assert all(link.startswith("#") for link in reader.links)
    outside = html.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|url\(", outside)


def test_the_same_results_give_the_same_bytes_and_no_path_of_the_machine(results, root, page, tmp_path):
    again = write_report(results, tmp_path / "x.html", plots=tmp_path, data_root=root)
    assert again[0].read_text() == page[0]
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in page[1]]
    assert str(results) not in page[0]
    assert str(root) not in page[0]


def test_plots_are_files_with_their_own_light_and_dark(page):
    names = [path.stem for path in page[1][1:]]
    assert names == [
        "forest",
        "systems",
        "reasoning",
        "controls",
        "budget",
        "latency",
        "adaptive",
        "rewards",
        "training",
    ]
    for path in page[1][1:]:
        text = path.read_text()
        assert ET.fromstring(text).tag.endswith("svg")
        assert "prefers-color-scheme:dark" in text
        styled = set(re.findall(r"var\((--\w+)\)", text))
        assert styled <= set(re.findall(r"(--\w+):", text))


def test_what_is_not_there_says_how_to_make_it(tmp_path):
    (tmp_path / "results").mkdir()
    html = write_report(tmp_path / "results")[0].read_text()
    for command in ("search-r3 evaluate", "search-r3 study", "search-r3 rollouts", "search-r3 card",
                    "python benchmarks/environment.py"):  # fmt: skip
        assert f"<code>{command}" in html
    assert html.count('class="missing"') == len(sections(load_results(tmp_path / "results")))


def test_without_the_data_the_means_stand_and_the_page_says_so(results, tmp_path):
    found = load_results(results, None, tmp_path)
    assert found.tests == {}
    assert found.pairs == []
    html = render(found)
    assert "topics: data set not available" in html
    assert "<strong>Not tested.</strong>" in html
    assert f"{found.records[0]['measures'][NDCG]:.3f}" in html
    assert "Query by query" in html
    assert 'class="area up"' in html  # a study keeps its scores


def test_runs_on_other_data_are_shown_but_not_tested(results, root, tmp_path):
    shutil.copytree(results, tmp_path / "r")
    path = paths(tmp_path / "r", "topics", "mine.on").metrics
    record = json.loads(path.read_text())
    record["settings"]["data_hash"] = "other"
    path.write_text(json.dumps(record))
    path = paths(tmp_path / "r", "topics", "mine.off").metrics
    path.write_text(path.read_text().replace(f'"{NDCG}": 0', f'"{NDCG}": 1'))
    paths(tmp_path / "r", "other/en", "bm25").run.unlink()
    found = load_results(tmp_path / "r", None, root)
    assert set(found.by_dataset["topics"].scores) == {"bm25", "mine.off"}
    html = render(found)
    assert "topics mine.on: measured on different data" in html
    assert re.search(r"topics mine.off: the metrics file says 1[\d.]*, its run file 0", html)
    assert "other/en bm25: its run file is missing" in html


def test_bad_requests_are_one_line(results, root, tmp_path, capsys):
    page = str(tmp_path / "x.html")
    for arguments, summary in (
        (["--output", str(tmp_path / "none")], "none is not a results folder; create one: search-r3 evaluate"),
        (["--output", str(results), "--baseline", "bm52"], "no results of the baseline 'bm52'; systems in"),
    ):
        assert main(["report", page, *arguments, "--data", str(root)]) == 2
        error = capsys.readouterr().err
        assert summary in error
        assert error.count("\n") == 1
    assert not Path(page).exists()
    shutil.copytree(results, tmp_path / "r")
    (tmp_path / "r/studies/topics/mine.json").write_text("{")
    assert main(["report", page, "--output", str(tmp_path / "r"), "--data", str(root)]) == 2
    assert "mine.json is not a study" in capsys.readouterr().err
    (tmp_path / "r/studies/topics/mine.json").unlink()
    shutil.rmtree(tmp_path / "r/studies/topics/mine")
    log = tmp_path / "r/training/mine/log.jsonl"
    log.write_text("no json\n" + log.read_text())
    with pytest.raises(InputError, match=r"log.jsonl, line 1: not a record"):
        load_results(tmp_path / "r", None, root)


def test_the_command_names_what_it_wrote(results, root, tmp_path, capsys):
    assert main(["report", str(tmp_path / "a.html"), "--output", str(results), "--data", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": str(tmp_path / "a.html"), "plots": []}
    assert main(["report", "--help"]) == 0
    assert "Example:  search-r3 report" in capsys.readouterr().out


def test_templates_come_along_in_a_wheel():
    package = Path(search_r3.__file__).parent
    settings = tomllib.loads((package.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    kept = {file for where in (package / "evaluation/report",) for g in settings["*"] for file in where.glob(g)}
    here = {file for file in (package / "evaluation/report").rglob("*") if file.suffix in (".j2", ".css", ".js")}
    assert here
    assert here <= kept


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colors_can_be_told_from_their_ground(theme):
    """WCAG 2.2: text needs a contrast of 4.5, what a plot draws 3; axe does not look into a plot."""
    text = (Path(search_r3.__file__).parent / "evaluation/report/templates/colors.j2").read_text()
    part = re.search(r"macro %s\(\).*?endmacro" % theme, text, re.DOTALL).group()  # noqa: UP031
    colors = {name: luminance(value) for name, value in re.findall(r"--(\w+):(#\w+);", part)}
    for name, value in colors.items():
        least = {"ink": 4.5, "muted": 4.5, "link": 4.5, "up": 4.5, "down": 4.5}.get(name, 3 if name[0] == "s" else 1)
        for ground in ("ground", "raised") if least == 4.5 else ("ground",):
            high, low = max(value, colors[ground]), min(value, colors[ground])
            assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


def luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_page_is_accessible_and_fits_its_screen(browser, page, barriers):
    shown = browser.new_page(viewport={"width": 360, "height": 900}, color_scheme="light")
    shown.set_default_timeout(120_000)
    problems: list[str] = []
    shown.on("console", lambda message: problems.append(message.text))
    shown.on("pageerror", lambda error: problems.append(str(error)))
    shown.on("request", lambda request: problems.append(request.url) if request.url[:5] != "file:" else None)
    shown.goto(page[1][0].resolve().as_uri())
    shown.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    for width in (320, 768, 1280, 360):
        shown.set_viewport_size({"width": width, "height": 900})
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert barriers(shown) == []
    ground = "getComputedStyle(document.body).backgroundColor"
    light = shown.evaluate(ground)
    shown.click("#theme")
    dark = shown.evaluate(ground)
    assert dark != light
    shown.emulate_media(color_scheme="dark")
    assert shown.evaluate(ground) == dark
    shown.set_viewport_size({"width": 1280, "height": 900})
    assert barriers(shown) == []
    shown.click("#theme")  # what a reader chooses stays, whatever the system prefers
    assert shown.evaluate(ground) == light
    assert problems == []
    shown.close()
