"""An index under evaluation: its searches are measured, whichever backend stores it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from search_r3.cli import main
from search_r3.evaluation.measures import NDCG
from search_r3.evaluation.runs import read_run
from search_r3.hybrid_fusion import HybridFusion
from search_r3.index import SourceDocument, build_index, update_documents
from search_r3.index.maintenance import keep_fusion

pytestmark = pytest.mark.filterwarnings("ignore:.*documents have an empty")


@pytest.fixture(params=["lance", "numpy", "milvus"])
def place(request: pytest.FixtureRequest, data_root: Path, tiny_model: Path, tmp_path: Path) -> str:
    """An index of the data set "tiny"."""
    found = str(tmp_path / "tiny.index")
    if request.param == "milvus":
        pytest.importorskip("pymilvus", reason="pymilvus is not installed: pip install 'search-r3[milvus]'")
        pytest.importorskip("milvus_lite", reason="Milvus Lite is not installed: pip install 'search-r3[milvus]'")
        found = f"milvus://{tmp_path}/lite.db/tiny"
    options = ["--model", str(tiny_model), "--dtype", "float32", "--engine", "torch"]
    options += ["--backend", "numpy"] if request.param == "numpy" else []
    lines = (data_root / "tiny" / "corpus.jsonl").read_text().splitlines()
    corpus = tmp_path / "corpus.jsonl"  # an empty document is in no index
    corpus.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["text"]))
    assert main(["index", str(corpus), "--into", found, *options]) == 0
    return found


@pytest.fixture
def evaluated(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Evaluate systems on the data set "tiny"; returns the records."""
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))

    def run(*options: str) -> list[dict]:
        capsys.readouterr()
        command = ["evaluate", "--dataset", "tiny", "--data", str(data_root), "--output", str(tmp_path / "results")]
        assert main([*command, *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_an_index_searched_by_meaning_measures_what_its_model_does(place, evaluated, tiny_model, tmp_path) -> None:
    vectors, model = evaluated("--system", f"index.vector:{place}", "--system", f"m={tiny_model}", "--mode", "off")
    assert vectors["system"].endswith("-vector.off")
    assert vectors["measures"] == pytest.approx(model["measures"])
    assert vectors["contract_hash"] == model["contract_hash"]
    runs = [read_run(tmp_path / f"results/runs/tiny/{one['system']}.trec.gz") for one in (vectors, model)]
    for query, scores in runs[1].items():
        assert runs[0][query] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("place", ["milvus"], indirect=True)
def test_words_modes_and_a_tuned_fusion_count(place, evaluated) -> None:
    (text,) = evaluated("--system", f"words=index.text:{place}", "--mode", "off", "--mode", "on")
    assert (text["system"], text["contract_hash"]) == ("words", None)
    assert text["measures"][NDCG] > 0.5
    off, on = evaluated("--system", f"both=index:{place}", "--mode", "off", "--mode", "on", "--budget", "4")
    assert (off["system"], on["system"]) == ("both.off", "both.on")
    assert on["reasoning"]["budget"] == 4
    again = evaluated("--system", f"both=index:{place}", "--mode", "off")[0]
    assert again["run_sha256"] == off["run_sha256"]
    keep_fusion(place, HybridFusion("rsf", 0.0))
    (tuned,) = evaluated("--system", f"both=index:{place}", "--mode", "off")
    assert tuned["settings"]["identity"]["fusion"]["method"] == "rsf"


@pytest.mark.parametrize("place", ["lance"], indirect=True)
def test_what_is_wrong_with_an_index_is_one_line(place, data_root, tiny, tmp_path, capsys) -> None:
    build_index(tmp_path / "less.index", [SourceDocument("d1", "", "text")], tiny)
    update_documents(place, [SourceDocument("more", "", "text")], tiny)
    for spec, mode, line in (
        (f"index:{tmp_path}/none", "off", "none"),
        (f"index:{tmp_path}/less.index", "off", 'lacks 2 documents, such as "d2"'),
        (f"index:{place}", "off", 'also holds 1 documents, such as "more"'),
        (f"index:{place}", "read", "an index is not evaluated in mode read; choose from: off, on, latent"),
        ("index:milvus://nowhere", "off", "give a server and the name of a collection"),
    ):
        command = ["evaluate", "--dataset", "tiny", "--data", str(data_root), "--output", str(tmp_path / "results")]
        assert main([*command, "--system", spec, "--mode", mode]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert line in error
