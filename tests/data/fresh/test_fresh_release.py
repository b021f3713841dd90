"""When a package was released, and how we know: the index by hash, the recipe, the archive's dates, or not at all."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import fresh_packages as made
import pytest

from search_r3.data.fresh.fresh_config import FreshConfig, Source, read_config
from search_r3.data.fresh.release import index_lookup, read_release
from search_r3.errors import InputError


def dated(source: Source, answer=None):
    release = read_release(source, lambda name: answer)
    return str(release.released), release.evidence, release.first_released and str(release.first_released)


def test_the_index_knows_the_file_by_its_hash(tmp_path):
    path = made.wheel(tmp_path)
    answer = made.listing(path, "2026-03-01", **{"tidewater-0.1.tar.gz": "2024-07-08"})
    assert dated(Source(str(path)), answer) == ("2026-03-01", "index", "2024-07-08")
    answer["files"][0]["hashes"]["sha256"] = "1" * 64  # another file of that name: the index says nothing of ours
    assert dated(Source(str(path)), answer) == ("2026-05-04", "archive", "2024-07-08")


def test_without_an_index_the_recipe_counts_and_then_the_archive(tmp_path):
    path = made.wheel(tmp_path)
    assert dated(Source(str(path), released="2026-02-03")) == ("2026-02-03", "declared", None)
    assert dated(Source(str(path))) == ("2026-05-04", "archive", None)
    undated = made.wheel(tmp_path, version="2.1", date=(1980, 1, 1, 0, 0, 0))
    assert dated(Source(str(undated))) == ("None", "unknown", None)
    future = made.wheel(tmp_path, version="2.2", date=(2100, 1, 1, 0, 0, 0))
    assert dated(Source(str(future)))[1] == "unknown"
    assert dated(Source(str(made.sdist(tmp_path))))[1] == "archive"


def test_a_recipe_that_contradicts_the_index_is_refused(tmp_path):
    path = made.wheel(tmp_path)
    with pytest.raises(InputError, match=r"2025-12-31.*not on 2026-02-03"):
        dated(Source(str(path), released="2026-02-03"), made.listing(path, "2025-12-31"))
    with pytest.raises(InputError, match="SHA-256"):
        dated(Source(str(path), sha256="a" * 64))


def test_a_folders_times_are_no_evidence_and_an_installed_version_has_the_indexs(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "README.md").write_text(made.README)
    assert dated(Source(str(folder))) == ("None", "unknown", None)
    assert dated(Source(str(folder), released="2026-09-09"))[1] == "declared"
    import filelock

    answer = {
        "files": [
            {"filename": f"filelock-{filelock.__version__}.tar.gz", "hashes": {}, "upload-time": "2026-01-05T00:00:00Z"}
        ]
    }
    release = read_release(Source("filelock"), lambda name: answer)
    assert (release.kind, release.version) == ("installed", filelock.__version__)
    assert (str(release.released), release.evidence) == ("2026-01-05", "index, by version")


@pytest.mark.parametrize("name", ["no-such-package-anywhere", "no/such/folder", "../x", "file.txt"])
def test_a_source_that_is_nowhere_is_named(tmp_path, name):
    with pytest.raises(InputError, match=r"folder or installed package|no package of that name"):
        read_release(Source(name), lambda _: None)


@pytest.fixture
def index():
    asked: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Accept"]))
            found = self.path == "/simple/tide-water/"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"files": []}).encode() if found else b"")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/simple", asked
    server.shutdown()
    server.server_close()


def test_the_index_is_pips_own_and_is_asked_once_a_package(index, monkeypatch):
    url, asked = index
    monkeypatch.setenv("PIP_INDEX_URL", url)
    look_up = index_lookup()
    assert look_up("Tide_Water") == look_up("tide.water") == {"files": []}
    assert look_up("unknown") is None
    assert look_up("tide-water") == {"files": []}
    assert asked == [(f"/simple/{name}/", "application/vnd.pypi.simple.v1+json") for name in ("tide-water", "unknown")]


def test_an_index_that_is_away_is_told_once(monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    said: list[str] = []
    look_up = index_lookup(said.append)
    assert look_up("one") is look_up("two") is None
    assert len(said) == 1
    assert "index cannot be reached" in said[0]
    monkeypatch.setenv("PIP_INDEX_URL", "http://example.invalid/simple")  # plain http is not trusted with dates
    look_up = index_lookup(said.append)
    assert look_up("one") is None
    assert "https" in said[1]


def test_recipes_are_strict(tmp_path):
    recipe = tmp_path / "fresh.yaml"

    def read(text: str) -> FreshConfig:
        recipe.write_text(text)
        return read_config([str(recipe)])

    config = read("released_after: 2026-02-01\ntop: 7\npackages:\n  - a-1.whl\n  - {path: b, older: [c]}\n")
    assert (config.released_after, config.top, config.packages[1].older) == ("2026-02-01", 7, ("c",))
    assert read_config([str(recipe)], {"top": 9, "seed": None}).top == 9
    for text, said in [
        ("packages: []", "no package"),
        ("packages: [a]\nreleased_afer: 2026-01-01", "did you mean released_after"),
        ("packages: [a]\nreleased_after: soon", "soon"),
        ("packages: [a]\ntop: many", "top must be a whole number"),
        ("packages: [a]\nallow_unknown_date: 1", "allow_unknown_date must be true or false"),
        ("packages: [{sha256: x}]", "path"),
        ("packages: [{path: a, sha256: x}]", "64 hex digits"),
        ("packages: [{path: a, released: 2026-13-01}]", "month"),
        ("packages: [{path: a, released: spring}]", "spring"),
        ("packages: [a]\ncommittee: [bm25, bm25]", "committee"),
        ("packages: [a", "not valid YAML"),
        ("[]", "mapping"),
    ]:
        with pytest.raises(InputError, match="(?s)" + said):
            read(text)
    with pytest.raises(InputError, match="one or the other"):
        read_config([str(recipe), "a.whl"])
