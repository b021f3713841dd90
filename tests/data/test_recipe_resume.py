"""A build that is killed goes on, and its result is byte for byte that of one that was not."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import small_sources
from filelock import FileLock
from processes import run

from search_r3.data import build_cache
from search_r3.data.recipe import build_pairs
from search_r3.data.sources import registry
from search_r3.data.sources.data_source import DataSource
from search_r3.errors import InputError

RUN = """
import os, signal, sys
from search_r3 import files
from search_r3.data.recipe import build_pairs

event, count, output = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def die_at(*_):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)

if event == "sync":      # everything is written to the scratch file, nothing renamed
    files._sync = die_at
elif event == "replace":  # the rename is done, what follows is not
    replace = os.replace
    os.replace = lambda *names: (replace(*names), die_at())
build_pairs("recipe.yaml", output, "data", report=die_at if event == "progress" else None)
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small_sources.make(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "packages"), *filter(None, sys.path)]))
    return tmp_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """What a build that nobody kills writes: pairs and manifest."""
    root = small_sources.make(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "packages"))
        patch.chdir(root)
        assert finished_before(build()) == 0
        return written()


def build(output: str = "out.jsonl", **options) -> list[str]:
    """Build, and return what the progress said."""
    said: list[str] = []
    build_pairs("recipe.yaml", output, "data", report=said.append, **options)
    return said


def written(name: str = "out.jsonl") -> tuple[bytes, bytes]:
    manifest = Path(f"{name}.manifest.json").read_bytes().replace(f'"{name}"'.encode(), b'"out.jsonl"')
    return Path(name).read_bytes(), manifest


def finished_before(said: list[str]) -> int:
    return sum("finished before" in line for line in said)


@pytest.mark.parametrize(
    ("event", "count", "finished"),
    [
        ("progress", 1, 0),  # before the first source is done
        ("progress", 3, 1),
        ("progress", 14, 7),
        ("progress", 27, 12),  # cleaning
        ("progress", 28, 12),  # writing
        ("sync", 1, 0),
        ("sync", 7, 6),
        ("sync", 13, 12),  # the first step of cleaning
        ("sync", 15, 12),  # the output
        ("replace", 14, 12),  # between the steps of cleaning
        ("replace", 16, 12),  # the output is there, its manifest is not
    ],
)
def test_a_build_that_is_killed_goes_on_to_the_same_bytes(
    root: Path, whole: tuple[bytes, bytes], event: str, count: int, finished: int
) -> None:
    killed = run([sys.executable, "-c", RUN, event, str(count), "out.jsonl"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert Path("out.jsonl.partial").is_dir()
    assert Path("out.jsonl").exists() == ((event, count) == ("replace", 16))
    assert not Path("out.jsonl.manifest.json").exists()
    assert finished_before(build()) == finished
    assert written() == whole
    assert sorted(path.name for path in root.iterdir() if "out" in path.name) == [
        "out.jsonl",
        "out.jsonl.manifest.json",
    ]


def kill_before_cleaning() -> None:
    killed = run([sys.executable, "-c", RUN, "progress", "27", "out.jsonl"], check=False)
    assert killed.returncode == -signal.SIGKILL


def test_the_steps_of_cleaning_are_kept_too(
    root: Path, whole: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = run([sys.executable, "-c", RUN, "sync", "15", "out.jsonl"], check=False)
    assert killed.returncode == -signal.SIGKILL
    monkeypatch.setattr("search_r3.data.mining.decontamination.decontaminate", None)
    monkeypatch.setattr("search_r3.data.mining.decontamination.deduplicate", None)
    build()
    assert written() == whole


@pytest.mark.parametrize("change", ["seed", "setting", "input", "program", "damage", "another package"])
def test_what_has_changed_is_built_anew(root: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    kill_before_cleaning()
    options: dict[str, int] = {}
    expected = 11
    if change == "seed":
        options, expected = {"seed": 4}, 0
    elif change == "setting":
        recipe = Path("recipe.yaml").read_text(encoding="utf-8")
        Path("recipe.yaml").write_text(
            recipe.replace("dataset: toy}\n", "dataset: toy, per_document: 2}\n", 2).replace(
                "titles, dataset: toy, per_document: 2", "titles, dataset: toy"
            ),
            encoding="utf-8",
        )
    elif change == "input":
        own = Path("files/own.tsv")
        own.write_bytes(own.read_bytes().replace(b"right two", b"RIGHT two"))
        os.utime(own, ns=(10**18, 10**18))
    elif change == "program":
        monkeypatch.setattr(build_cache, "_program", lambda: "another")
        expected = 0
    elif change == "damage":
        part = next(Path("out.jsonl.partial").glob("wordnet-*"))
        part.write_bytes(part.read_bytes()[:-100])
    else:
        Path("packages/smallbox/more.py").write_text(small_sources.FUNCTION.format(name="x", what="x", number=9))
    said = build(**options)
    assert finished_before(said) == expected
    build("whole.jsonl", **options)
    assert written() == written("whole.jsonl")


def test_what_was_refused_continues_when_it_is_fixed(root: Path) -> None:
    own = Path("files/own.csv")
    sound = own.read_bytes()
    own.write_bytes(sound + b"caf\xe9,x\n")
    with pytest.raises(InputError, match=r"own\.csv, line 6: not UTF-8"):
        build()
    own.write_bytes(sound)
    assert finished_before(build()) == 10


def test_a_file_that_changes_while_it_is_read_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = registry.SOURCES["titles"]

    def build_and_touch(*given):
        built = kind.build(*given)
        os.utime("data/toy/corpus.jsonl", ns=(1, 1))
        return built

    monkeypatch.setitem(registry.SOURCES, "titles", DataSource(build_and_touch, kind.reads, kind.keys, kind.needed))
    with pytest.raises(InputError, match=r"source 2 \(titles\): its files changed while they were read"):
        build()


def test_a_part_is_stale_when_any_module_that_made_it_has_changed() -> None:
    names = {file.relative_to(Path(build_cache.__file__).parent).as_posix() for file in build_cache.source_files()}
    made_by = {f"sources/{name}.py" for name in ("beir_pairs", "debian", "docstrings", "manuals", "roff", "pair_files")}
    assert names >= made_by | {"recipe.py", "pairs.py", "io/jsonl.py", "io/line_reader.py", "mining/decontamination.py"}
    assert not any(name.startswith(("synthesis", "fresh")) for name in names)


def test_two_builds_of_one_output_do_not_meet(root: Path) -> None:
    Path("out.jsonl.partial").mkdir()
    with FileLock("out.jsonl.partial/lock"), pytest.raises(InputError, match="being built by another process"):
        build()
    build()
    assert Path("out.jsonl").exists()


def test_what_others_put_into_the_folder_stays(root: Path) -> None:
    Path("out.jsonl.partial").mkdir()
    Path("out.jsonl.partial/notes.txt").write_text("mine")
    build()
    assert [path.name for path in Path("out.jsonl.partial").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("output", ["files", "recipe.yaml/out.jsonl"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(root: Path, output: str) -> None:
    with pytest.raises(InputError, match=r"is a folder|cannot write"):
        build(output)
