"""What stands between the markers of a Markdown file is what the run files give, and cannot drift from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.evaluation.measures import NDCG
from search_r3.evaluation.publish.markdown_blocks import PAGES, Rebuilder, regenerate, regenerate_all
from search_r3.evaluation.publish.tables import load_records, results_markdown, summary_markdown
from search_r3.evaluation.runs import read_run, write_run

pytestmark = pytest.mark.filterwarnings("ignore:.*documents have an empty")
BEGIN, END = "<!-- table: results -->", "<!-- /table -->"


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    return path


@pytest.fixture
def make(readme, results, data_root):
    """Make the README's blocks again; `write=True` writes them."""

    def run(write=False, root=data_root):
        made = regenerate_all([readme], results, None, root)
        if write:
            made.write()
        return made

    return run


def test_a_block_is_replaced_and_then_is_as_it_should_be(make, readme, results):
    made = make(write=True)
    assert [file.path for file in made.changed] == [readme]
    assert "-old" in made.files[0].diff().splitlines()
    again = make()
    assert (again.changed, again.files[0].diff()) == ([], "")
    assert (again.check.problems, again.check.unchecked) == ([], [])
    table = results_markdown(load_records(results))
    assert readme.read_text() == f"# Title\n\n{BEGIN}\n{table}\n{END}\n\nThe end.\n"


def test_an_edited_figure_is_found(make, readme):
    make(write=True)
    text = readme.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| tiny"))
    readme.write_text(text.replace(row, row.replace("0.", "9."), 1))
    difference = make().files[0].diff()
    assert f"-{row.replace('0.', '9.')}" in difference.splitlines()
    assert f"+{row}" in difference.splitlines()


def test_figures_come_from_the_run_not_from_the_metrics_file(make, readme, results):
    make(write=True)
    path = results / "metrics/tiny/bm25.json"
    record = json.loads(path.read_text())
    record["measures"][NDCG] += 0.1
    path.write_text(json.dumps(record))
    made = make()
    assert made.changed == []
    assert [problem.split(" is ")[0] for problem in made.check.problems] == [f"tiny bm25: {NDCG}"]


def test_a_changed_or_missing_run_is_found(make, results):
    make(write=True)
    path = results / "runs/tiny/bm25.trec.gz"
    run = read_run(path)
    write_run(path, {qid: {"d3": 1.0, **scores, "d1": 99.0} for qid, scores in run.items()}, "bm25")
    made = make()
    assert made.changed
    assert any("tiny bm25" in problem for problem in made.check.problems)
    path.unlink()
    assert any("is missing" in problem for problem in make().check.problems)


def test_without_the_data_the_metrics_files_are_taken_and_named(make, data_root, tmp_path):
    make(write=True)
    made = make(root=tmp_path / "nowhere")
    assert (made.changed, made.check.problems) == ([], [])
    assert "tiny bm25" in made.check.unchecked
    with open(data_root / "tiny/qrels/test.tsv", "a") as judgments:
        judgments.write("q3\td2\t1\n")
    assert "tiny bm25 (measured on different data)" in make().check.unchecked


def test_a_block_can_hold_some_systems_data_sets_and_measures(readme, results, data_root):
    marker = "<!-- table: results datasets=tiny systems=bm25,*-sft.* measures=MRR@10 -->"
    readme.write_text(f"{marker}\n{END}\nbetween\n{BEGIN}\n{END}\n")
    first, second = regenerate(readme, Rebuilder(results, data_root)).new.split("between")
    assert "| | bm25 | search-r3-x-sft.off | search-r3-x-sft.on |" in first
    assert "MRR@10" in first
    assert "nested/en" not in first
    assert NDCG not in first
    assert "| nested/en |" in second


def test_a_summary_is_one_table_that_says_what_the_systems_are(readme, results, data_root):
    readme.write_text(f"<!-- table: summary datasets=tiny systems=bm25,*-sft.* -->\n{END}\n")
    lines = regenerate(readme, Rebuilder(results, data_root)).new.splitlines()
    assert lines[1] == "| | BM25 | stage 1, direct | stage 1, with reasoning |"
    assert lines[3].startswith("| tiny | ")
    assert lines[4] == END
    records = load_records(results)
    twins = [{**record, "system": record["system"].replace("-x-", "-y-")} for record in records]
    assert "| search-r3-x-sft.off |" in summary_markdown([*records, *twins])


def test_the_pages_that_are_there_are_made_again(results, data_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"cannot read README\.md"):
        regenerate_all(None, results, None, data_root)
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        (tmp_path / page).write_text(f"{BEGIN}\n{END}\n")
        assert regenerate_all(None, results, None, data_root).files[-1].path == Path(page)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no markers", "has no line <!-- table: results -->"),
        (f"{BEGIN}\n", "line 1: this table has no line <!-- /table --> after it"),
        (f"a\n{BEGIN}\n{BEGIN}\n{END}\n", "line 2: this table has no line"),
        (f"<!-- table: resutls -->\n{END}\n", 'line 1: unknown table "resutls"; did you mean "results"'),
        (f"<!-- table: results dataset=tiny -->\n{END}\n", 'unknown key "dataset"; did you mean "datasets"'),
        (f"<!-- table: results datasets= -->\n{END}\n", "expected datasets=VALUE"),
        (f"<!-- table: results systems=bm52 -->\n{END}\n", "systems=bm52 matches none of: bm25"),
        (f"<!-- table: results measures=NDCG -->\n{END}\n", 'unknown measure "NDCG"; did you mean "nDCG@10"'),
        (f"<!-- table: summary measure=NDCG -->\n{END}\n", 'unknown measure "NDCG"; did you mean "nDCG@10"'),
        (f"<!-- table: study dataset=tiny -->\n{END}\n", "needs system=NAME"),
        (f"<!-- table: study dataset=tiny system=x -->\n{END}\n", "is not a study"),
    ],
)
def test_a_wrong_marker_is_named_with_its_line(text, said, readme, results, data_root):
    readme.write_text(text)
    with pytest.raises(InputError) as raised:
        regenerate(readme, Rebuilder(results, data_root))
    assert said in str(raised.value)


def test_cards_are_made_too_and_an_adapter_without_a_kept_run_is_named(adapter, kept_run, results, readme, data_root):
    models = adapter.parent
    shutil.copytree(kept_run, results / "training" / adapter.name)
    made = regenerate_all([readme], results, models, data_root)
    card = next(file for file in made.changed if file.path == adapter / "README.md")
    assert f"`results/training/{adapter.name}`" in card.new  # wherever the results lie here
    made.write()
    assert regenerate_all([readme], results, models, data_root).changed == []
    shutil.copytree(adapter, models / "other")
    problems = regenerate_all([readme], results, models, data_root).check.problems
    assert len(problems) == 1
    assert "search-r3 card" in problems[0]


def test_the_command_writes_or_with_check_shows_what_differs(readme, results, data_root, monkeypatch, capsys):
    monkeypatch.chdir(readme.parent)
    command = ["tables", "--output", str(results), "--data", str(data_root), "--no-cards"]
    before = readme.read_text()
    assert main([*command, "--check"]) == 1
    assert "-old" in capsys.readouterr().out.splitlines()
    assert readme.read_text() == before
    assert main(command) == 0
    assert "README.md: rewritten" in capsys.readouterr().out
    assert main([*command, "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "changed": [],
        "unchanged": ["README.md"],
        "problems": [],
        "unchecked": [],
    }
    (results / "runs/tiny/bm25.trec.gz").unlink()
    assert main([*command, "--check"]) == 1
    assert "problem: tiny bm25: its run file" in capsys.readouterr().err
