"""What SECURITY.md promises of the source: no pickle, no code of others, no unpacking, no shell; keys leak no time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file for folder in ("search_r3", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py"))
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas.read_pickle"}
CALLS = {
    "torch.load": "reads pickles; use safetensors",
    "os.system": "starts a shell",
    "os.popen": "starts a shell",
    "yaml.unsafe_load": "runs code",
    "yaml.full_load": "makes objects",
    "eval": "runs text",
    "exec": "runs text",
}
ENDS = {"extractall": "unpacks an archive", "extract": "unpacks an archive", "read_pickle": "reads a pickle"}
HARMLESS = ("TraceContextTextMapPropagator().extract",)
"""Calls that have such a name and do something else: OpenTelemetry reads a header."""
KEYWORDS = {"allow_pickle": False, "trust_remote_code": False, "shell": False, "use_safetensors": True}
"""Arguments that may be given only as this constant, if at all."""


def faults(source: str) -> Iterator[str]:
    """What of a module's text is forbidden, with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"line {node.lineno}: imports {name}" for name in names if name.split(".")[0] in PICKLES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS:
                yield f"line {node.lineno}: {name} {CALLS[name]}"
            if isinstance(node.func, ast.Attribute) and node.func.attr in ENDS and name not in HARMLESS:
                yield f"line {node.lineno}: {name} {ENDS[node.func.attr]}"
            for keyword in node.keywords:
                if keyword.arg in KEYWORDS and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is KEYWORDS[keyword.arg]
                ):
                    yield f"line {node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from joblib import load", "import torch\ntorch.load('a.pt')", "np.load(a, allow_pickle=True)",
        "AutoModel.from_pretrained(a, trust_remote_code=option)", "subprocess.run('ls', shell=True)", "eval(text)",
        "tarfile.open(a).extractall(b)", "yaml.unsafe_load(a)", "from_pretrained(a, use_safetensors=None)",
    ],
)  # fmt: skip
def test_the_search_finds_what_is_forbidden(text):
    assert list(faults(text))


@pytest.mark.parametrize("text", ["model.eval()", "np.load(a)", "np.load(a, allow_pickle=False)", "re.search(a, b)"])
def test_the_search_leaves_the_rest_alone(text):
    assert not list(faults(text))


def test_no_source_reads_pickles_runs_texts_or_unpacks_archives():
    assert len(FILES) > 100
    assert {
        str(file.relative_to(ROOT)): found
        for file in FILES
        if (found := list(faults(file.read_text(encoding="utf-8"))))
    } == {}


def test_yaml_is_read_by_a_safe_loader_wherever_it_is_read():
    found = {
        str(file.relative_to(ROOT)): ast.unparse(node)
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("yaml.load", "yaml.load_all")
    }
    assert found == {"search_r3/yaml_file.py": "yaml.load(text, loader)"}
    from search_r3.yaml_file import parse_yaml

    with pytest.raises(Exception, match="could not determine a constructor"):
        parse_yaml("!!python/object/apply:os.getcwd []")


def test_every_key_is_compared_whole_whichever_it_is(monkeypatch):
    pytest.importorskip("fastapi")
    from search_r3.server import keys
    from search_r3.server.errors import ApiError

    compared = []
    plain = keys.hmac.compare_digest
    monkeypatch.setattr(keys.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or plain(a, b))
    known = keys.Keys(["first", "second", "third"])
    for given, right in (("first", True), ("third", True), ("firsT", False), ("f", False)):
        compared.clear()
        if right:
            known.check(f"Bearer {given}")
        else:
            with pytest.raises(ApiError):
                known.check(f"Bearer {given}")
        assert len(compared) == 3
        assert {len(digest) for pair in compared for digest in pair} == {32}
