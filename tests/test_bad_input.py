"""Bad input through the real command line: one line on stderr that says what is wrong and what to do, exit code 2.

Nothing is mocked but what a test cannot have for real: a full disk, and missing permissions (tests may run as root,
whom permissions do not bind).
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from search_r3.cli import main

DOCUMENTS = [
    {"id": "bread", "text": "Bread needs flour, water and yeast.", "year": 2020},
    {"id": "train", "text": "The train to Vienna leaves at nine.", "year": 2021},
]


@dataclass
class Place:
    """Where a case puts its files, and the models that it may use."""

    folder: Path
    model: Path
    other_model: Path
    make_model: Callable[..., Path]
    patch: pytest.MonkeyPatch

    def file(self, name: str, content: str | bytes | list[dict]) -> str:
        """Write a file (a list becomes JSON lines); returns its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def documents(self, content: str | bytes | list[dict] = "") -> list[str]:
        """The command that indexes a JSONL file with this content."""
        path = self.file("documents.jsonl", content or DOCUMENTS)
        return ["index", path, "--into", str(self.folder / "made"), "--model", str(self.model)]

    def index(self) -> str:
        """A good index, made by `model`."""
        assert main(self.documents()) == 0
        return str(self.folder / "made")

    def beir(self, qrels: str = "query-id\tcorpus-id\tscore\nq1\tbread\t1\n") -> list[str]:
        """The command that evaluates BM25 on a small BEIR folder with these judgements."""
        rows = [{"_id": d["id"], "text": d["text"]} for d in DOCUMENTS]
        self.file("data/tiny/corpus.jsonl", rows)
        self.file("data/tiny/queries.jsonl", [{"_id": "q1", "text": "what goes into bread"}])
        self.file("data/tiny/qrels/test.tsv", qrels)
        place = ["--data", str(self.folder / "data"), "--output", str(self.folder / "results")]
        return ["evaluate", "--dataset", "tiny", "--system", "bm25", *place]

    def recipe(self, text: str = "") -> list[str]:
        """The command that trains by a recipe: a good one, then `text`."""
        pairs = [{"id": str(i), "query": f"question {i}", "positive": f"answer {i}"} for i in range(4)]
        lines = (
            f"pairs: [{self.file('pairs.jsonl', pairs)}]\noutput: {self.folder / 'run'}\nbase: {self.model}\ndev: []\n"
        )
        return ["train", "sft", self.file("recipe.yaml", lines + text)]

    def copy(self, model: Path) -> Path:
        """A model folder that may be damaged."""
        return Path(shutil.copytree(model, self.folder / "copy"))


Case = Callable[[Place], list[str]]
CASES: dict[str, tuple[Case, list[str]]] = {}


def case(*expected: str) -> Callable[[Case], Case]:
    """Register a case; each of `expected` must be in its one line."""

    def register(function: Case) -> Case:
        CASES[function.__name__] = function, list(expected)
        return function

    return register


# ------------------------------------------------------------------------------------------------------- the documents


@case("nowhere.jsonl", "No such file")
def no_such_file(place):
    return ["index", str(place.folder / "nowhere.jsonl"), "--model", str(place.model)]


@case("line 2", "not valid JSON", "complete JSON object")
def broken_json_line(place):
    return place.documents('{"id": "a", "text": "fine"}\n{"id": "b", "text": \n')


@case("line 2", '"text"', "empty")
def empty_text(place):
    return place.documents([DOCUMENTS[0], {"id": "b", "text": "  "}])


@case("line 2", '"text"', "string", "number")
def text_of_the_wrong_type(place):
    return place.documents([DOCUMENTS[0], {"id": "b", "text": 7}])


@case("line 2", '"bread"', "already used on line 1")
def duplicate_id(place):
    return place.documents([DOCUMENTS[0], DOCUMENTS[0]])


@case("line 1", "UTF-8", "0xff")
def bad_utf8(place):
    return place.documents(b'{"id": "a", "text": "caf\xff"}\n')


@case("nothing to index")
def empty_folder(place):
    (place.folder / "empty").mkdir()
    return ["index", str(place.folder / "empty"), "--into", str(place.folder / "made"), "--model", str(place.model)]


@case("permission")
def folder_without_read_permission(place):
    command = ["index", str(place.folder / "locked"), "--model", str(place.model)]
    (place.folder / "locked").mkdir()
    really = os.access
    place.patch.setattr(os, "access", lambda path, *a, **k: Path(path).name != "locked" and really(path, *a, **k))
    return command


@case("documents.jsonl", "permission")
def file_without_read_permission(place):
    command = place.documents()
    really = builtins.open

    def refuse(file, *args, **kwargs):
        if str(file).endswith("documents.jsonl"):
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return really(file, *args, **kwargs)

    place.patch.setattr(builtins, "open", refuse)
    return command


@case("is a file", "folder")
def index_into_a_file(place):
    command = place.documents()
    place.file("made", "something else")
    return command


@case("thesis.txt", "new folder")
def index_into_a_folder_of_other_things(place):
    command = place.documents()
    place.file("made/thesis.txt", "years of work")
    return command


# -------------------------------------------------------------------------------------------------------- the searches


@case("does not exist")
def search_in_no_folder(place):
    return ["search", str(place.folder / "nowhere"), "bread"]


@case("not a search-r3 index")
def search_in_what_is_not_an_index(place):
    place.file("notes/a.txt", "hello")
    return ["search", str(place.folder / "notes"), "bread"]


@case("tiny-llama-base", "other-llama-base", "cannot be compared", "new index")
def an_index_of_another_checkpoint(place):
    return ["search", place.index(), "bread", "--model", str(place.other_model)]


@case("--model", "gone-base")
def an_index_whose_model_is_gone(place):
    place.model = Path(shutil.copytree(place.model, place.folder / "gone"))
    index = place.index()
    shutil.rmtree(place.model)
    return ["search", index, "bread"]


@case("1,000,000 characters", "shorten")
def a_query_of_one_megabyte(place):
    command = ["search", place.index(), "-", "--model", str(place.model)]
    place.patch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"bread " * 166_666 + b"loaf")))
    return command


@case("query is empty")
def an_empty_query(place):
    return ["search", place.index(), "   ", "--model", str(place.model)]


@case("--k", "search --help")
def negative_k(place):
    return ["search", place.index(), "bread", "-k", "-1"]


@case("--budget")
def negative_budget(place):
    return ["search", place.index(), "bread", "--budget", "-5"]


@case("--mode", "hybrid")
def unknown_search_mode(place):
    return ["search", place.index(), "bread", "--mode", "magic"]


@case("colour", "year (integer)")
def a_filter_on_an_unknown_column(place):
    return ["search", place.index(), "bread", "--where", "colour = 'red'"]


@case("filter", "year (integer)")
def a_filter_that_does_not_parse(place):
    return ["search", place.index(), "bread", "--where", "year >"]


# ---------------------------------------------------------------------------------------------------------- the models


@case("smolm2-135m", "did you mean 'smollm2-135m'")
def unknown_model_name(place):
    return [*place.documents(), "--model", "smolm2-135m"]


@case("copy", "model.safetensors")
def a_model_without_weights(place):
    copy = place.copy(place.model)
    (copy / "model.safetensors").unlink()
    return [*place.documents(), "--model", str(copy)]


@case("copy")
def a_model_with_truncated_weights(place):
    weights = place.copy(place.model) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return [*place.documents(), "--model", str(weights.parent)]


@case("chat template", "instruction-tuned")
def a_model_without_a_chat_template(place):
    return [*place.documents(), "--model", str(place.make_model(place.folder / "plain", chat_template=False))]


@case("NaN", "nothing of this batch was written")
def a_model_whose_embeddings_are_nan(place):
    from safetensors.torch import load_file, save_file

    weights = place.copy(place.model) / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, weights, {"format": "pt"})
    return [*place.documents(), "--model", str(weights.parent)]


def adapter(place: Place, base: Path, base_weights: str = "") -> Path:
    """A folder that says it is an adapter of `base`."""
    from dataclasses import replace

    import torch

    from search_r3.model.checkpoint import load_base, write_record

    contract = load_base(place.model, dtype=torch.float32).contract
    folder = place.folder / "adapter"
    folder.mkdir()
    changed = replace(
        contract, base=str(base), base_weights=base_weights or contract.base_weights, adapter_weights="0" * 64
    )
    write_record(folder, "adapter", changed)
    return folder


@case("was trained on", "weights", "get the base that it was trained on")
def an_adapter_whose_base_has_other_weights(place):
    return [*place.documents(), "--model", str(adapter(place, place.other_model))]


@case("no adapter_model.safetensors")
def an_adapter_without_its_file(place):
    return [*place.documents(), "--model", str(adapter(place, place.model))]


@case("search_r3.json", "damaged")
def a_damaged_contract(place):
    folder = adapter(place, place.model)
    (folder / "search_r3.json").write_text("{")
    return [*place.documents(), "--model", str(folder)]


@case("is a file", "folder")
def a_model_that_is_a_file(place):
    return [*place.documents(), "--model", place.file("model.bin", "x")]


@case("cannot use device 'warp'")
def unknown_device(place):
    return [*place.documents(), "--device", "warp"]


@case("golden vectors")
def checking_a_model_without_golden_vectors(place):
    return ["models", "--check", str(place.model)]


# ------------------------------------------------------------------------------------------------------ the evaluation


@case("test.tsv", "line 2", '"butter"', "corpus.jsonl")
def a_judgement_of_no_document(place):
    return place.beir("query-id\tcorpus-id\tscore\nq1\tbutter\t1\n")


@case("test.tsv", "line 2", "3 columns")
def a_judgement_with_a_column_missing(place):
    return place.beir("query-id\tcorpus-id\tscore\nq1\tbread\n")


@case("tinny", 'did you mean "tiny"')
def unknown_data_set(place):
    return [*place.beir(), "--dataset", "tinny"]


@case("no split 'train'", "test")
def unknown_split(place):
    return [*place.beir(), "--split", "train"]


@case("unknown mode 'maybe'", "off, on")
def unknown_evaluation_mode(place):
    return [*place.beir(), "--mode", "maybe"]


@case("no model 'bm26'", "folder or a hub id")
def unknown_system(place):
    return ["bm26" if word == "bm25" else word for word in place.beir()]


@case("--dataset", "tiny")
def evaluating_on_nothing(place):
    place.beir()
    return ["evaluate", "--data", str(place.folder / "data")]


@case("disk is full", "free some space")
def a_full_disk(place):
    command = place.beir()

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    place.patch.setattr("search_r3.files._sync", full)
    return command


# -------------------------------------------------------------------------------------------------------- the training


@case("recipe.yaml", "temprature", "temperature")
def unknown_config_key(place):
    return place.recipe("temprature: 0.1\n")


@case("recipe.yaml", "steps", "many")
def a_config_value_of_the_wrong_type(place):
    return place.recipe("loop: {steps: many}\n")


@case("temperature", "above 0")
def a_config_value_out_of_range(place):
    return place.recipe("temperature: -1\n")


@case("recipe.yaml", "YAML")
def broken_yaml(place):
    return place.recipe("loop: [1, 2\n")


@case("--set loop.steps", "section.key=value")
def an_override_without_a_value(place):
    return [*place.recipe(), "--set", "loop.steps"]


@case("loop.stepps", "steps")
def an_override_of_an_unknown_key(place):
    return [*place.recipe(), "--set", "loop.stepps=3"]


@case("nowhere.yaml")
def no_such_recipe(place):
    return ["train", "sft", str(place.folder / "nowhere.yaml")]


@case("gone.jsonl", "does not exist")
def pairs_that_are_not_there(place):
    return [*place.recipe(), "--set", f"pairs=[{place.folder / 'gone.jsonl'}]"]


@case("4 pairs", "global_batch_size")
def too_few_pairs(place):
    return place.recipe("global_batch_size: 64\n")


@case("source 1", "titels", 'did you mean "titles"')
def unknown_kind_of_source(place):
    recipe = place.file("build.yaml", "sources:\n- {kind: titels, dataset: tiny}\n")
    return ["data", "build", recipe, str(place.folder / "out.jsonl")]


@case("line 1", '"positive"', "missing")
def pairs_without_a_positive(place):
    pairs = place.file("pairs.jsonl", [{"id": "1", "query": "what"}])
    return ["data", "reason", pairs, str(place.folder / "out.jsonl"), "--model", str(place.model)]


# ---------------------------------------------------------------------------------------------------- the command line


@case("serch", "search", "--help")
def unknown_command(place):
    return ["serch"]


@case("--colour", "search --help")
def unknown_option(place):
    return ["search", "a", "b", "--colour", "red"]


@case("query", "search --help")
def missing_argument(place):
    return ["search", "a"]


@case("train --help")
def a_group_without_its_command(place):
    return ["train"]


LANCEDB_WARNING = re.compile(r"^\[[^\]\n]* WARN +lance[^\n]*\n", re.MULTILINE)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_one_clear_line_and_exit_code_2(
    name: str, tmp_path: Path, tiny_model: Path, other_tiny_model: Path, make_tiny_model, monkeypatch, capfd
):
    make, expected = CASES[name]
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        command = make(Place(tmp_path, tiny_model, other_tiny_model, make_tiny_model, patch))
        capfd.readouterr()
        code = main(command)
    out, err = capfd.readouterr()
    err = LANCEDB_WARNING.sub("", err)  # written by threads that an earlier test of failing storage left behind
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for words in expected:
        assert words.lower() in err.lower()
    assert code == 2
    assert out == ""
    assert len(err) < 600


def test_there_are_at_least_twenty_kinds():
    assert len(CASES) >= 20


def test_a_bug_of_ours_is_not_passed_off_as_bad_input(monkeypatch, tmp_path):
    """Only what the user can fix becomes one line; anything else keeps its traceback."""
    monkeypatch.setattr("search_r3.data.recipe.build_pairs", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["data", "build", "a", "b"])
