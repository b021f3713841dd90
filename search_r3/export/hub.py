"""Push checkpoints to the Hugging Face Hub and pull them: only safetensors, JSON and Markdown files.

Files are listed and checked against their contract before a push; a pulled checkpoint is verified against its contract
before it is moved into place. The client is huggingface_hub's `HfApi`.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.export.merged_export import check_target
from search_r3.files import atomic_path
from search_r3.model.checkpoint import (
    ADAPTER_FILE,
    ADAPTER_KINDS,
    CONTRACT_FILE,
    read_query_normalizer,
    read_query_projection,
    read_record,
)
from search_r3.model.contract import Contract
from search_r3.model.resolve import BUNDLED, PACKAGED, weights_sha256

SUFFIXES = (".safetensors", ".json", ".md")
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NEEDED = {
    "merged": ("config.json", "tokenizer.json", "tokenizer_config.json"),
    **dict.fromkeys(ADAPTER_KINDS, ("adapter_config.json",)),
}


@dataclass(frozen=True)
class Upload:
    """The contents of a push: `files` (relative paths, with sizes in bytes), without `left_out`."""

    folder: Path
    repo: str
    kind: str
    contract_hash: str
    files: dict[str, int]
    left_out: list[str]


def plan_push(folder: str | Path, repo: str) -> Upload:
    """What `push` would send to the repository `repo` ("owner/name"); nothing is sent.

    Raises:
        InputError: `folder` has no checkpoint with a contract, the checkpoint is damaged or incomplete, other machines
            could not load it, or `repo` is not a name.
    """
    folder = Path(folder)
    _check_name(repo)
    kind, contract = _checked(folder)
    loaded = {"base": contract.base} if kind in ADAPTER_KINDS else {}
    if kind == "query_adapter":
        loaded["documents' model"] = str((read_record(folder) or {}).get("documents", {}).get("source"))
    for what, name in loaded.items():
        if name not in (*BUNDLED, *PACKAGED) and not NAME.fullmatch(name):
            raise InputError(
                f"the {what} of {folder.name} is {name!r}, which only this machine knows; export the model merged "
                "(search-r3 export) and push that"
            )
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not _hidden(p.relative_to(folder)))
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {name: path.stat().st_size for name, path in names.items() if name.endswith(SUFFIXES)}
    left_out = [name for name in names if name not in files]
    if "chat_template.jinja" in left_out:
        raise InputError(
            f"{folder} keeps its chat template in a .jinja file, which is not pushed; run `search-r3 export "
            f"{folder} NEW_FOLDER` and push that"
        )
    return Upload(folder, repo, kind, contract.hash, files, left_out)


def push(plan: Upload, *, private: bool = True, message: str | None = None, api: Any = None) -> str:
    """Send what `plan_push` listed, in one commit; returns its address.

    The token is huggingface_hub's: `hf auth login`, or the variable HF_TOKEN.

    Args:
        private: make a new repository private.
        message: the commit message.
        api: a huggingface_hub `HfApi`; a new one by default.

    Raises:
        InputError: there is no network, the token is missing or invalid, or it does not permit writing there.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi() if api is None else api
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(plan.folder / name)) for name in plan.files]
    try:
        api.create_repo(repo_id=plan.repo, repo_type="model", private=private, exist_ok=True)
        done = api.create_commit(
            repo_id=plan.repo,
            operations=added,
            commit_message=message or f"Search-R3 checkpoint of contract {plan.contract_hash[:12]}",
            repo_type="model",
        )
    except (AttributeError, TypeError):  # a bug in this module
        raise
    except Exception as error:  # the client raises many types
        raise InputError(_explained(error, f"cannot push to {plan.repo}")) from error
    return str(getattr(done, "commit_url", plan.repo))


def pull(repo: str, out: str | Path | None = None, *, revision: str | None = None, api: Any = None) -> Path:
    """Fetch a checkpoint into the new folder `out` (by default the repository's name, here); returns the folder.

    Raises:
        InputError: there is no network, the repository does not exist or cannot be read, it is not a Search-R3
            checkpoint, or its weights do not match its contract. Nothing is left behind then.
    """
    from huggingface_hub import HfApi

    _check_name(repo)
    out = Path(repo.split("/")[1] if out is None else out)
    check_target(out)
    api = HfApi() if api is None else api
    with atomic_path(out) as scratch:
        scratch.mkdir()
        try:
            api.snapshot_download(
                repo_id=repo, revision=revision, local_dir=str(scratch), allow_patterns=[f"*{s}" for s in SUFFIXES]
            )
        except (AttributeError, TypeError):  # a bug in this module
            raise
        except Exception as error:  # the client raises many types
            raise InputError(_explained(error, f"cannot pull {repo}")) from error
        shutil.rmtree(scratch / ".cache", ignore_errors=True)  # the client's metadata
        try:
            _checked(scratch)
        except InputError as error:
            raise InputError(str(error).replace(str(scratch), repo)) from error
    return out


def _checked(folder: Path) -> tuple[str, Contract]:
    """Check that the checkpoint is complete and has its contract's weights; returns its kind and contract."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a checkpoint's (an adapter, or what search-r3 export wrote)")
    record = read_record(folder)
    if record is None:
        raise InputError(f"{folder} has no {CONTRACT_FILE}; give an adapter's folder or what `search-r3 export` wrote")
    kind, contract = str(record["kind"]), Contract.from_dict(record["contract"], str(folder / CONTRACT_FILE))
    if kind not in NEEDED:
        raise InputError(f"{folder / CONTRACT_FILE} says kind {kind!r}; expected one of: {', '.join(NEEDED)}")
    if missing := [name for name in NEEDED[kind] if not (folder / name).is_file()]:
        raise InputError(f"{folder} lacks {', '.join(missing)}; a checkpoint of kind {kind} has it, so export it again")
    adapter = kind in ADAPTER_KINDS
    digest = weights_sha256(folder, ADAPTER_FILE) if adapter else weights_sha256(folder)
    if digest != ((contract.query_weights or contract.adapter_weights) if adapter else record.get("weights")):
        raise InputError(f"{folder}: the weights do not match its contract; download or export it again")
    read_query_normalizer(folder, contract)
    read_query_projection(folder, contract)
    return kind, contract


def _check_name(repo: str) -> None:
    if not NAME.fullmatch(repo):
        raise InputError(f"{repo!r} is not the name of a repository; expected OWNER/NAME")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _explained(error: Exception, what: str) -> str:
    """One line: what failed, what the hub or the network reported, and what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{what}: the hub is switched off by HF_HUB_OFFLINE; unset that variable"
    if isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
        return f"{what}: {said}; log in with `hf auth login`, or set HF_TOKEN to a token that may do this"
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError) or status == 404:
        return f"{what}: {said}; check the name, and that you are logged in if it is private"
    if status is not None:
        return f"{what}: the hub answered {status}: {said}; try again later"
    return f"{what}: the hub cannot be reached ({said}); check the network, and HF_ENDPOINT if you set it"
