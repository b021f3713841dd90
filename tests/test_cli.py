"""The command line's own promises: every help teaches, JSON is JSON, and an interruption is a line."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from pathlib import Path

import pytest
import typer
from processes import run

from search_r3 import __version__
from search_r3.cli import commands, main, search
from search_r3.cli.grouped_help import GROUPS
from search_r3.cli.options import Reasoning

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ["demo", "train sft", "data build", "data reason", "data mine"]
COMMANDS += [
    "train grpo",
    "train average",
    "study",
    "data embed-teacher",
    "data select",
    "data read",
    "data synthesize",
    "rollouts",
]
COMMANDS += [
    "plot",
    "card",
    "index",
    "search",
    "evaluate",
    "tables",
    "models",
    "serve",
    "encode",
    "report",
    "data fresh",
]
COMMANDS += ["export", "push", "pull", "mcp", "delete", "compact", "adapt", "backup", "restore", "mteb"]
DOCUMENTS = [
    {"id": "bread", "title": "Baking", "text": "Bread needs flour, water and yeast.", "lang": "en"},
    {"id": "zug", "text": "Der Zug nach Wien fährt um neun.", "lang": "de"},
    {"id": "train", "text": "The train to Vienna leaves at nine.", "lang": "en"},
]


@pytest.fixture
def made(tmp_path: Path, tiny_model: Path, monkeypatch, capsys) -> Path:
    """An index of three documents, made through the command line; the working folder is its parent."""
    monkeypatch.chdir(tmp_path)
    Path("documents.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS), encoding="utf-8")
    assert main(["index", "documents.jsonl", "--model", str(tiny_model)]) == 0
    capsys.readouterr()
    return tmp_path / "documents.index"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_says_what_it_does_and_shows_an_example_and_what_comes_next(command: str, capsys):
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example:  search-r3 {command}" in text
    assert "Next:" in text
    options = [line for line in text.splitlines() if line.startswith("  --")]
    assert all(len(line.split()) > 1 for line in options)


def test_the_first_help_lists_every_command(capsys):
    assert main([]) == 0
    bare = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    for command in COMMANDS:
        assert f"\n  {command.split()[0]} " in bare


def test_the_first_help_has_every_command_once_in_a_group(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    headings = [text.index(f"\n{heading}:\n") for heading in GROUPS]
    assert headings == sorted(headings)
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(typer.main.get_command(commands.app).commands)
    assert "..." not in text[headings[0] :]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"search-r3 {__version__}\n"


def test_index_reports_json_and_embeds_only_what_changed(made, tiny_model, capsys):
    command = ["index", "documents.jsonl", "--model", str(tiny_model), "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["index"], report["unchanged"], report["embedded"]) == ("documents.index", 3, 0)
    Path("documents.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS[:2]), encoding="utf-8")
    assert main([*command, "--keep"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 0
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == 1


def test_search_prints_json_with_the_reasoning_and_the_hits(made, tiny_model, capsys):
    command = ["search", str(made), "train to Vienna", "--model", str(tiny_model), "--json", "-k", "2", "--budget", "4"]
    assert main([*command, "--mode", "hybrid"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hits"][0]["id"] == "train"
    assert len(found["hits"]) == 2
    assert found["reasoning"]["num_tokens"] <= 4
    assert main([*command, "--no-reasoning", "--where", "lang = 'de'"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [hit["id"] for hit in found["hits"]] == ["zug"]
    assert found["reasoning"] is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], Reasoning.on),
        (["--reasoning"], Reasoning.on),
        (["--no-reasoning"], Reasoning.off),
        (["--reasoning", "off"], Reasoning.off),
        (["--reasoning=auto"], Reasoning.auto),
        (["--no-reasoning", "--reasoning", "auto"], Reasoning.auto),
    ],
)
def test_reasoning_is_on_off_or_auto_and_may_be_said_as_a_flag(words: list[str], expected: Reasoning):
    command = typer.main.get_command(commands.app).commands["search"]
    for line in (["an.index", *words, "query"], ["an.index", "query", *words]):
        context = command.make_context("search", line)
        assert Reasoning(context.params["reasoning"]) is expected  # typer 0.15 makes it one later
        assert context.params["query"] == "query"


def test_reasoning_auto_needs_a_model_with_a_rule(made, tiny_model, capsys):
    command = ["search", str(made), "train to Vienna", "--model", str(tiny_model), "--reasoning"]
    assert main([*command, "auto"]) == 2
    assert "has none; choose on or off, or fit a rule with search-r3 study" in capsys.readouterr().err
    assert main([*command[:-1], "--reasoning=maybe"]) == 2
    assert "'maybe' is not one of 'on', 'off', 'auto'" in capsys.readouterr().err


def test_search_by_words_needs_no_model_and_prints_a_page(made, monkeypatch, capsys):
    monkeypatch.setattr(search, "load", lambda *a: pytest.fail("a model was loaded"))
    assert main(["search", str(made), "flour", "--mode", "text"]) == 0
    page = capsys.readouterr().out
    assert "1. Baking" in page
    assert "Bread needs flour" in page
    assert "\x1b" not in page  # no colours into a file
    assert re.search(r"1\. Baking  documents.jsonl  words \d\.\d\n", page)
    assert "cosine" not in page
    assert "model" not in page


def test_a_search_that_finds_nothing_says_what_to_try_and_exits_1(made, capsys):
    missing = ["search", str(made), "xylophone", "--mode", "text"]
    assert main(missing) == 1
    assert "nothing found: no chunk has these words; try --mode hybrid" in capsys.readouterr().out
    assert main([*missing, "--where", "lang = 'en'"]) == 1
    assert "no chunk among those that --where selects has these words; check --where" in capsys.readouterr().out
    assert main([*missing, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hits"] == []


def test_a_query_can_come_from_standard_input(made, tmp_path):
    command = [sys.executable, "-m", "search_r3", "search", str(made), "-", "--mode", "text", "--json"]
    done = run(command, given="fährt".encode())
    assert [hit["id"] for hit in json.loads(done.stdout)["hits"]] == ["zug"]


def test_evaluate_prints_its_records_and_rewrites_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "tiny"
    (folder / "qrels").mkdir(parents=True)
    rows = [{"_id": d["id"], "text": d["text"]} for d in DOCUMENTS]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "flour and yeast"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tbread\t1\n")
    Path("README.md").write_text("before\n<!-- table: results -->\n<!-- /table -->\nafter\n")
    command = ["evaluate", "--dataset", "tiny", "--system", "bm25", "--data", "data", "--table", "--json"]
    assert main(command) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["measures"]["nDCG@10"] == 1.0
    readme = Path("README.md").read_text()
    assert "| tiny | 1.000 |" in readme
    assert readme.endswith("after\n")
    assert main(["evaluate", "--table"]) == 0
    assert main(["tables", "--check", "--data", "data"]) == 0
    assert Path("README.md").read_text() == readme


def test_data_build_prints_its_manifest(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sources:\n- {kind: docstrings, packages: [search_r3], min_body_lines: 1}\n")
    assert main(["data", "build", str(recipe), str(tmp_path / "pairs.jsonl"), "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["count"] == len((tmp_path / "pairs.jsonl").read_text().splitlines())


def test_models_lists_bases_and_adapters_with_their_contracts(tmp_path, tiny_model, monkeypatch, capsys):
    from search_r3.model import model_info, resolve

    (tmp_path / "search-r3-tiny-sft").mkdir()
    record = {
        "kind": "adapter",
        "contract": {"base": "tiny", "base_weights": "", "dimension": 32},
        "contract_hash": "f" * 64,
    }
    (tmp_path / "search-r3-tiny-sft" / "search_r3.json").write_text(json.dumps(record))
    (tmp_path / "search-r3-tiny-sft" / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "search-r3-tiny-sft" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    monkeypatch.setattr(resolve, "adapters_dirs", lambda: [tmp_path])
    for module in (resolve, model_info):
        monkeypatch.setattr(module, "BUNDLED", {})
    assert main(["models", "--json"]) == 0
    (adapter,) = [m for m in json.loads(capsys.readouterr().out) if m["kind"] == "adapter"]
    assert (adapter["bytes"], adapter["license"], adapter["contract_hash"]) == (1000, "apache-2.0", "f" * 64)
    assert main(["models"]) == 0
    assert "search-r3-tiny-sft" in capsys.readouterr().out


def test_models_check_compares_golden_vectors_and_exits_1_where_they_differ(tmp_path, tiny_model, capsys):
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from search_r3 import SearchR3

    SearchR3.from_pretrained(tiny_model).save_pretrained(tmp_path / "merged")
    assert main(["models", "--check", str(tmp_path / "merged"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    golden = load_file(tmp_path / "merged" / "golden.safetensors")
    save_file(
        {side: np.roll(rows, 1, axis=0) for side, rows in golden.items()}, tmp_path / "merged" / "golden.safetensors"
    )
    assert main(["models", "--check", str(tmp_path / "merged")]) == 1
    assert "NOT as saved" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_training_passes_the_recipe_on_and_says_what_to_do_next(stage, monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr(
        f"search_r3.training.{stage}.{stage}_task.train_{stage}", lambda *a: calls.append(a) or tmp_path / "adapter"
    )
    command = ["train", stage, "a.yaml", "--set", "loop.steps=2", "--set", "loop.seed=1", "--no-resume"]
    assert main(command) == 0
    assert calls == [(Path("a.yaml"), ["loop.steps=2", "loop.seed=1"], False)]
    assert "search-r3 evaluate" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")  # of several processes only the first speaks
    assert main(command) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.bin"),
            2,
            "x.bin: no space left on device; free some space",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x.bin"), 2, "correct the permissions"),
    ],
)
def test_what_the_machine_does_to_us_is_one_line(error, code, words, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("search_r3.data.recipe.build_pairs", fail)
    assert main(["data", "build", "a", "b"]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert words in err


def test_a_reader_that_goes_away_is_no_error(made):
    """`search-r3 search ... | head -0`: nothing on stderr."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "search_r3", "search", str(made), "train", "--mode", "text", "--json"]
    done = run(command, stdout=write, check=False)
    os.close(write)
    assert done.stderr == ""


def test_a_warning_is_one_line(monkeypatch, capsys):
    import warnings

    def warn(*_):
        warnings.warn("two documents\nare empty", stacklevel=1)
        return {"sources": [], "count": 0}

    monkeypatch.setattr("search_r3.data.recipe.build_pairs", warn)
    assert main(["data", "build", "a", "b"]) == 0
    assert capsys.readouterr().err == "warning: two documents are empty\n"


def test_a_query_is_read_within_the_limit_that_is_given(made: Path, capsys) -> None:
    command = ["search", str(made), "the train to Vienna leaves at nine", "--no-reasoning", "--json"]
    assert main(command) == 0
    usage = json.loads(capsys.readouterr().out)["usage"]
    assert usage["prompt_tokens"] > 3
    assert usage["truncated_texts"] == 0
    assert main([*command, "--max-tokens", "3"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["usage"] == {"prompt_tokens": 3, "truncated_texts": 1}
    assert "only its first 3 tokens were read" in said.err
    assert main([*command, "--max-tokens", "3", "--too-long", "error"]) == 2
    assert "the text has over 3 tokens, the limit" in capsys.readouterr().err
    assert main([*command, "--max-tokens", "100000"]) == 2
    assert "--max-tokens is 100,000, but the context of" in capsys.readouterr().err


def test_chunks_longer_than_the_context_are_refused(tmp_path: Path, tiny_model: Path, capsys) -> None:
    (tmp_path / "a.md").write_text("text")
    command = ["index", str(tmp_path), "--into", str(tmp_path / "new"), "--model", str(tiny_model)]
    assert main([*command, "--max-length", "100000"]) == 2
    assert "--max-length is 100,000, but the context of" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_index_remembers_where_its_model_stands(made: Path, capsys) -> None:
    assert main(["search", str(made), "bread", "--no-reasoning", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hits"]


@pytest.mark.parametrize(
    ("query", "quoted"),
    [
        ("-v option", "'-v option'"),
        ("-v", "-v"),
        ("-hello world", "'-hello world'"),
        ("-hello", "-hello"),
        ("--json is what", "'--json is what'"),
        ("-k option", "'-k option'"),
        ("-1 degrees", "'-1 degrees'"),
        ("-k\tv", "'-k\tv'"),
    ],
)
def test_a_query_that_begins_with_a_dash_is_told_where_it_may_stand(capsys, query, quoted):
    assert main(["search", "no-index-here", query]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    expected = f"put text that begins with a dash after --: search-r3 search ... -- {quoted}"
    assert " ".join(expected.split()) in said
    assert main(["search", "no-index-here", "--", query]) == 2
    assert "no-index-here does not exist" in capsys.readouterr().err  # what it says to do is understood


@pytest.mark.parametrize(
    "arguments",
    [
        ["search", "x", "y", "--colour", "red"],
        ["search", "x", "y", "--mode", "magic"],
        ["search", "x", "--where=a > 1"],
    ],
)
def test_other_mistakes_are_not_told_of_the_dash(capsys, arguments):
    assert main(arguments) == 2
    assert "behind --" not in capsys.readouterr().err
