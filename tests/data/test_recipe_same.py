"""The same recipe gives the same bytes: under any hash seed and locale, from any place, in any order of the files."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import small_sources
from processes import run

RUN = """
import os, sys
sys.path.insert(0, os.path.abspath("packages"))
if sys.argv[1] == "backwards":  # a file system may list a folder in any order
    for module, name in ((os, "listdir"), (os, "scandir")):
        def turned(*given, real=getattr(os, name)):
            found = real(*given)
            entries = list(found)
            getattr(found, "close", lambda: None)()
            return Turned(reversed(entries))
        setattr(module, name, turned)
    class Turned(list):
        def __enter__(self): return iter(self)
        def __exit__(self, *_): return None
        def close(self): pass
from processes import run
from search_r3.data.recipe import build_pairs
build_pairs("recipe.yaml", "out.jsonl", "data")
"""


def build(root: Path, order: str, **environment: str) -> tuple[bytes, bytes]:
    """Build in a process of its own; returns the pairs' and the manifest's bytes."""
    run(
        [sys.executable, "-c", RUN, order],
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment,
    )
    return (root / "out.jsonl").read_bytes(), (root / "out.jsonl.manifest.json").read_bytes()


def test_hash_seed_locale_place_and_order_of_the_files_change_no_byte(tmp_path: Path) -> None:
    here = small_sources.make(tmp_path / "one")
    there = small_sources.make(tmp_path / "another/deep/place", backwards=True)
    first = build(here, "as it is", PYTHONHASHSEED="0", LC_ALL="C", TZ="UTC", OMP_NUM_THREADS="1")
    again = build(there, "backwards", PYTHONHASHSEED="4711", LC_ALL="C.UTF-8", TZ="Asia/Tokyo", OMP_NUM_THREADS="2")
    assert first == again
    ids = {json.loads(line)["id"].split(":")[0] for line in first[0].splitlines()}
    assert ids == {
        "title",
        "cloze",
        "query",
        "debian",
        "wordnet",
        "dictd",
        "man",
        "pydoc",
        "pairs",
        *(f"smallbox.{name}" for name in ("total", "Upper.mean", "Upper.same", "lower.best")),
    }
    assert str(tmp_path).encode() not in first[1]


def test_functions_are_the_same_wherever_a_package_lies(tmp_path: Path) -> None:
    import packaging

    found = []
    for place in ("site-packages", "elsewhere/tests/vendor/lib"):  # names that are passed over inside a package
        root = tmp_path / place
        shutil.copytree(Path(packaging.__file__).parent, root / "packages/packaging_copy")
        (root / "data").mkdir()
        source = "{kind: docstrings, packages: [packaging_copy], min_body_lines: 1}"
        (root / "recipe.yaml").write_text(f"sources: [{source}]")
        found.append(build(root, "as it is"))
    assert found[0] == found[1]
    assert found[0][0].count(b"\n") > 10


def test_the_manifest_says_sizes_hashes_and_licenses(tmp_path: Path) -> None:
    root = small_sources.make(tmp_path)
    manifest = json.loads(build(root, "as it is")[1])
    assert manifest["bytes"] == (root / "out.jsonl").stat().st_size
    *sources, missing = manifest["sources"]
    assert "inputs" not in missing
    assert "none.index does not exist" in missing["missing"]
    for source in sources:
        assert source["inputs"]["files"] >= 1
        assert source["inputs"]["bytes"] > 0
        assert len(source["inputs"]["sha256"]) == 64
        licenses = [package["license"] for package in source.get("packages_read", {}).values()] or [source["license"]]
        assert all(licenses)
    own = next(source for source in sources if source.get("name") == "quoted")
    summed = run(["sha256sum", root / "files/own.csv"]).stdout
    assert own["inputs"]["sha256"] == summed.split()[0]
    wordnet = next(source for source in sources if source["kind"] == "wordnet")
    listed = "cd files && sha256sum data.adj data.adv data.noun data.verb | sha256sum"
    summed = run(["sh", "-c", listed], cwd=root).stdout
    assert wordnet["inputs"]["sha256"] == summed.split()[0]
    assert manifest["sources"][0]["packages_read"]["smallbox"]["files"] == 3
    assert manifest["sources"][0]["packages_missing"] == ["no_such_package_here"]
