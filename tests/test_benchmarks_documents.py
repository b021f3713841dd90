"""The benchmark of embedding documents: systems by text, every one timed on the same tokens, the first against all."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from benchmark_scripts import benchmark_script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with benchmark_script("documents", monkeypatch) as module:
        yield module


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8", ("int8", "int8", "auto", None)),
        ("torch:bfloat16", ("torch:bfloat16", "torch", "bfloat16", None)),
        ("before=int8@build/before", ("before", "int8", "auto", "build/before")),
        ("old one=torch:float32@/a/b:c", ("old one", "torch", "float32", "/a/b:c")),
        ("llama.cpp", ("llama.cpp", "llama.cpp", "auto", None)),
    ],
)
def test_a_system_has_a_name_an_engine_a_dtype_and_a_checkout(
    script: ModuleType, text: str, expected: tuple[str, str, str, str | None]
) -> None:
    spec = script.spec_of(text, "model", 1)
    assert (spec.name, spec.engine, spec.dtype, spec.checkout) == expected


def test_every_system_embeds_the_same_tokens_in_turns(
    script: ModuleType, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    command = ["documents.py", "torch:float32", "half=torch:bfloat16", "--model", tiny_model, "--tokens", "8", "20"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--total", "64", "--rounds", "3", "--json", str(out)])
    script.main()
    figures = json.loads(out.read_text())["figures"]
    assert set(figures["tokens_per_second"]) == {"torch:float32", "half"}
    assert all(speeds.keys() == {"8", "20"} for speeds in figures["tokens_per_second"].values())
    assert figures["first_is_times_as_fast_as"]["half"]["20"]["rounds"] == 3
    assert figures["loaded"]["half"]["resident"] > 0
    assert figures["loaded"]["half"]["first_document_seconds"] >= figures["loaded"]["half"]["load_seconds"]


def test_two_systems_of_one_name_are_refused(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["documents.py", "int8", "int8"])
    with pytest.raises(SystemExit, match="one name"):
        script.main()
