"""`import search_r3` and `search-r3 --help` stay quick. What makes them slow is loading a heavy library, so that is
what is tested; a stopwatch would only measure how busy the machine is."""

from __future__ import annotations

import json
import sys

import pytest
from processes import run

HEAVY = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "lancedb",
    "pyarrow",
    "numpy",
    "sentence_transformers",
)


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `code`."""
    script = f"{code}\nimport sys, json; print(); print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = run([sys.executable, "-c", script])
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy():
    loaded = modules_after("import search_r3; search_r3.InputError")
    assert "search_r3" in loaded
    assert not loaded & set(HEAVY)


def test_a_heavy_name_is_loaded_on_first_use():
    assert "torch" not in modules_after("import search_r3")
    assert "numpy" in modules_after("from search_r3 import SearchR3")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["search", "--help"], ["train", "sft", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]):
    code = f"from search_r3.cli import main\nassert main({arguments!r}) == 0"
    assert not modules_after(code) & set(HEAVY)


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import search_r3

    with pytest.raises(AttributeError, match="SearchR4"):
        _ = search_r3.SearchR4
