"""Push and pull against a stand-in for the hub's API that takes what the real client takes, and with no network."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from search_r3 import InputError, SearchR3
from search_r3.cli import main
from search_r3.export import hub
from search_r3.export.merged_export import export_model
from search_r3.model.query_normalizer import QUERY_NORMALIZER_FILE

REPO = "someone/tiny-search"


class StandIn:
    """`HfApi` over a folder; a call that the real one would not take is a TypeError."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.created: list[dict[str, Any]] = []

    def create_repo(self, **given: Any) -> None:
        _taken("create_repo", given)
        self.created.append(given)
        (self.root / given["repo_id"]).mkdir(parents=True, exist_ok=True)

    def create_commit(self, **given: Any) -> Any:
        _taken("create_commit", given)
        for operation in given["operations"]:
            file = self.root / given["repo_id"] / operation.path_in_repo
            file.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as source:
                file.write_bytes(source.read())
        return SimpleNamespace(commit_url=f"https://hub.example/{given['repo_id']}/commit/1")

    def snapshot_download(self, **given: Any) -> str:
        _taken("snapshot_download", given)
        target = Path(given["local_dir"])
        (target / ".cache" / "huggingface").mkdir(parents=True)
        for file in sorted((self.root / given["repo_id"]).rglob("*")):
            name = file.relative_to(self.root / given["repo_id"])
            if file.is_file() and any(name.match(pattern) for pattern in given["allow_patterns"]):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / name)
        return str(target)


def _taken(name: str, given: dict[str, Any]) -> None:
    inspect.signature(getattr(HfApi, name)).bind(None, **given)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda *_, **__: stand_in)
    monkeypatch.chdir(tmp_path)
    return stand_in


@pytest.fixture(scope="module")
def exported_once(tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "exported"
    export_model(SearchR3.from_pretrained(tiny_adapter, device="cpu"), out, "sentence-transformers")
    return out


@pytest.fixture
def exported(exported_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported_once, tmp_path / "exported")


def test_what_is_pushed_is_pulled_and_embeds_the_same(exported: Path, api: StandIn, capsys):
    strangers = {"notes.txt": "x", "optimizer.pt": "x", "train.py": "x", ".git/config.json": "{}", ".secret.json": "{}"}
    for name, text in strangers.items():
        (exported / name).parent.mkdir(exist_ok=True)
        (exported / name).write_text(text)
    assert main(["push", str(exported), REPO, "--json"]) == 0
    reported = json.loads(capsys.readouterr().out)
    arrived = {p.relative_to(api.root / REPO).as_posix() for p in (api.root / REPO).rglob("*") if p.is_file()}
    assert arrived == set(reported["files"])
    assert {"model.safetensors", "search_r3.json", "golden.safetensors", "README.md", "modules.json"} <= arrived
    assert {Path(name).suffix for name in arrived} == {".safetensors", ".json", ".md"}
    assert reported["left_out"] == ["notes.txt", "optimizer.pt", "train.py"]
    assert not arrived & set(strangers)
    assert reported["address"] == f"https://hub.example/{REPO}/commit/1"
    assert [repo["private"] for repo in api.created] == [True]
    (api.root / REPO / "run_me.py").write_text("raise SystemExit")
    assert main(["pull", REPO]) == 0
    assert "tiny-search" in capsys.readouterr().out
    assert not list(Path("tiny-search").rglob("*.py"))
    assert not Path("tiny-search/.cache").exists()
    again = SearchR3.from_pretrained("tiny-search", device="cpu")
    assert again.contract_hash == reported["contract_hash"]
    assert again.check_golden() < 1e-5


def test_a_dry_run_sends_nothing(exported: Path, api: StandIn, capsys):
    assert main(["push", str(exported), REPO, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "nothing sent" in shown.out
    assert "model.safetensors" in shown.err
    assert not api.created


def test_an_adapter_is_pushed_only_if_others_can_find_its_base(tiny_adapter: Path, tmp_path: Path, api: StandIn):
    with pytest.raises(InputError, match="only this machine knows; export the model merged"):
        hub.plan_push(tiny_adapter, REPO)
    copy = shutil.copytree(tiny_adapter, tmp_path / "copy")
    record = json.loads((copy / "search_r3.json").read_text())
    record["contract"]["base"] = "smollm2-135m"
    (copy / "search_r3.json").write_text(json.dumps(record))
    plan = hub.plan_push(copy, REPO)
    assert plan.kind == "adapter"
    assert set(plan.files) == {p.name for p in tiny_adapter.iterdir()}


@pytest.mark.parametrize("missing", ["search_r3.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_checkpoint_is_neither_pushed_nor_pulled(exported: Path, api: StandIn, missing: str):
    api.root.mkdir()
    shutil.copytree(exported, api.root / REPO)
    (api.root / REPO / missing).unlink()
    (exported / missing).unlink()
    with pytest.raises(InputError, match=missing.replace("model.", "model.*")):
        hub.plan_push(exported, REPO)
    with pytest.raises(InputError, match=f"{REPO} .*{missing.replace('model.', 'model.*')}"):
        hub.pull(REPO, api=api)
    assert not Path("tiny-search").exists()
    assert not list(Path().glob(".*.tmp*"))


def test_damaged_weights_are_not_pulled(exported: Path, api: StandIn):
    shutil.copytree(exported, api.root / REPO)
    file = api.root / REPO / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"oops")
    with pytest.raises(InputError, match=f"{REPO}: the weights do not match its contract"):
        hub.pull(REPO, api=api)
    assert not Path("tiny-search").exists()


def test_a_folder_that_is_there_is_not_replaced(exported: Path, api: StandIn):
    shutil.copytree(exported, api.root / REPO)
    with pytest.raises(InputError, match="exported exists already"):
        hub.pull(REPO, exported, api=api)


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "../x/y", "a/", "someone/ti ny"])
def test_a_name_that_is_none_is_reported(name: str, tmp_path: Path, capsys):
    assert main(["pull", name, str(tmp_path / "out")]) == 2
    assert "is not the name of a repository; expected OWNER/NAME" in capsys.readouterr().err


def test_a_hub_that_is_switched_off_is_reported(exported: Path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["push", str(exported), REPO]) == 2
    assert f"cannot push to {REPO}: the hub is switched off by HF_HUB_OFFLINE" in capsys.readouterr().err


def test_no_network_is_told_in_one_line(exported: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    unreachable = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9", token="none")
    with pytest.raises(InputError, match=r"cannot push to .*: the hub cannot be reached \(.*\); check the network"):
        hub.push(hub.plan_push(exported, REPO), api=unreachable)
    with pytest.raises(InputError, match=r"cannot pull .*check the network"):
        hub.pull(REPO, tmp_path / "pulled", api=unreachable)
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize(
    ("status", "reported"),
    [(401, "log in with `hf auth login`"), (403, "HF_TOKEN"), (404, "check the name"), (503, "answered 503")],
)
def test_what_the_hub_refuses_is_reported(exported: Path, api: StandIn, monkeypatch, status: int, reported: str):
    class RefusedError(OSError):
        response = SimpleNamespace(status_code=status)

    def refuse(**_: Any) -> None:
        raise RefusedError("the hub said no\nin two lines")

    monkeypatch.setattr(api, "create_repo", refuse)
    with pytest.raises(InputError, match=reported) as caught:
        hub.push(hub.plan_push(exported, REPO), api=api)
    assert "the hub said no" in str(caught.value)


def test_a_checkpoint_without_its_query_normalizer_is_neither_pushed_nor_pulled(
    normalizing: SearchR3, tmp_path: Path
) -> None:
    folder, hub_root = tmp_path / "tiny", StandIn(tmp_path / "hub")
    export_model(normalizing, folder)
    assert QUERY_NORMALIZER_FILE in hub.plan_push(folder, REPO).files
    hub.push(hub.plan_push(folder, REPO), api=hub_root)
    pulled = hub.pull(REPO, tmp_path / "pulled", api=hub_root)
    assert SearchR3.from_pretrained(pulled, device="cpu").contract_hash == normalizing.contract_hash
    for lost in (folder, hub_root.root / REPO):
        (lost / QUERY_NORMALIZER_FILE).unlink()
    with pytest.raises(InputError, match=QUERY_NORMALIZER_FILE):
        hub.plan_push(folder, REPO)
    with pytest.raises(InputError, match=f"{REPO}/{QUERY_NORMALIZER_FILE}"):
        hub.pull(REPO, tmp_path / "again", api=hub_root)
    assert not (tmp_path / "again").exists()
