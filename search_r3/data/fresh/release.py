"""The release of a package that a source contains: name, version, license, release date and the evidence for it.

The package index records the upload time and SHA-256 of every file (PEP 691, PEP 700); pip's configuration gives its
URL. Without an index only the archive's own dates are available, which its author could choose.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from email import message_from_bytes
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from search_r3.data.fresh.archives import METADATA, Contents, is_archive, read_archive, read_folder, safe_name
from search_r3.data.fresh.fresh_config import Source, parse_date
from search_r3.errors import InputError

INDEX_TYPE = "application/vnd.pypi.simple.v1+json"
MAX_ANSWER = 30_000_000
"""Maximum size in bytes of the index's response about one package."""
TIMEOUT = 20.0
"""Timeout of a request to the index, in seconds."""
EVIDENCE = {
    "index": "the package index lists this exact file with its upload time",
    "index, by version": "the package index lists this version's upload; the files at hand were not compared with it",
    "declared": "stated in the recipe, for the file with this SHA-256 if one is given",
    "archive": "the newest date of a file in the archive, which its author could choose",
    "unknown": "not known",
}
"""Evidence for a date, strongest first."""
Lookup = Callable[[str], "dict[str, Any] | None"]
"""Package name -> the index's response (PEP 691 JSON), or None if it is not available."""


@dataclass(frozen=True)
class Release:
    """One package as read.

    Attributes:
        name, version, license, summary: from its metadata; a folder without metadata has its own name, no version and
            the license "unknown".
        description: the README in the metadata; Markdown if `markdown`, else reStructuredText.
        kind: "wheel", "sdist", "folder" or "installed".
        file: the archive's name, without its folder.
        released: the day on which this version appeared, or None.
        evidence: a key of `EVIDENCE`.
        first_released: the day of the package's first upload, or None if the index was not queried.
        contents: its files.
    """

    name: str
    version: str
    kind: str
    file: str
    license: str
    summary: str
    description: str
    markdown: bool
    contents: Contents
    released: date | None = None
    evidence: str = "unknown"
    first_released: date | None = None


def read_release(source: Source, lookup: Lookup) -> Release:
    """Read a package and find out when it was released.

    Raises:
        InputError: there is no such archive, folder or installed package; the archive is damaged or unsafe, or its
            SHA-256 is not the expected one; or the date given differs from the index's.
    """
    release = read_source(source.path)
    found = release.contents.sha256
    if source.sha256 is not None and source.sha256 != found:
        raise InputError(f"{source.path} has the SHA-256 {found}, expected {source.sha256}; download the right file")
    if source.license:
        release = replace(release, license=source.license)
    return _dated(release, source, lookup(release.name) if release.version else None)


def read_source(path: str) -> Release:
    """The package at a path, or the installed distribution of that name; its date is not looked up.

    Raises:
        InputError: as `read_release`.
    """
    place = Path(path)
    if is_archive(place):
        contents = read_archive(place)
        kind = "wheel" if place.suffix == ".whl" else "sdist"
        return _described(contents, kind, place.name, place.name.split("-")[0])
    if place.is_dir():
        return _described(read_folder(place), "folder", place.resolve().name, place.resolve().name)
    if place.exists() or not re.fullmatch(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", path):
        raise InputError(f"{path} is not a wheel, source archive (.tar.gz, .zip), folder or installed package")
    try:
        distribution = importlib.metadata.distribution(path)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(f"{path}: no such file or folder, and no package of that name is installed") from error
    root = Path(str(distribution.locate_file("")))
    names = sorted(str(one) for one in distribution.files or [] if safe_name(str(one)) is not None)
    return _described(read_folder(root, names), "installed", "", path)


def _described(contents: Contents, kind: str, file: str, fallback: str) -> Release:
    metadata = _metadata(contents)
    body = metadata.get_payload(decode=True)
    described = metadata.get("Description") or (body.decode("utf-8", "replace") if isinstance(body, bytes) else "")
    return Release(
        name=str(metadata.get("Name") or fallback).strip(),
        version=str(metadata.get("Version") or "").strip(),
        kind=kind,
        file=file,
        license=_license(metadata),
        summary=str(metadata.get("Summary") or "").strip(),
        description=str(described).strip(),
        markdown="rst" not in str(metadata.get("Description-Content-Type") or "text/markdown"),
        contents=contents,
    )


def _metadata(contents: Contents) -> Message:
    """The metadata file nearest to the root; a package may contain those of others further down."""
    files = [name for name in contents.files if PurePosixPath(name).name in METADATA]
    if not files:
        return Message()
    return message_from_bytes(contents.files[min(files, key=lambda name: (name.count("/"), name))])


def _license(metadata: Message) -> str:
    for key in ("License-Expression", "License"):
        lines = str(metadata.get(key) or "").strip().splitlines()
        if lines and lines[0].strip().upper() not in ("", "UNKNOWN"):
            return lines[0].strip()[:80]
    named = [str(one) for one in metadata.get_all("Classifier", []) if str(one).startswith("License ::")]
    return named[-1].split("::")[-1].strip() if named else "unknown"


# -------------------------------------------------------------------------------------------------------------- dates


def _dated(release: Release, source: Source, answer: dict[str, Any] | None) -> Release:
    declared = parse_date(source.released, "released") if source.released else None
    uploads = _uploads(answer)
    first = min((when for _, _, when in uploads), default=None)
    of_file = [when for _, sha256, when in uploads if sha256 == release.contents.sha256]
    of_version = [when for name, _, when in uploads if _is_version(name, release)]
    if release.kind in ("wheel", "sdist") and of_file:
        found, evidence = min(of_file), "index"
    elif release.kind not in ("wheel", "sdist") and of_version:
        found, evidence = min(of_version), "index, by version"
    elif declared:
        return replace(release, released=declared, evidence="declared", first_released=first)
    elif release.contents.newest and datetime(1981, 1, 1, tzinfo=UTC) < release.contents.newest <= datetime.now(UTC):
        # 1980 is the date in a zip without dates, and a date in the future proves nothing
        found, evidence = release.contents.newest.date(), "archive"
    else:
        return replace(release, first_released=first)
    if declared and declared != found and evidence.startswith("index"):
        raise InputError(f"{source.path} was released on {found}, as the index says, not on {declared}; fix the recipe")
    return replace(release, released=found, evidence=evidence, first_released=first)


def _uploads(answer: dict[str, Any] | None) -> list[tuple[str, str, date]]:
    """(file name, SHA-256, day of upload) of every file that the index lists."""
    found = []
    for one in (answer or {}).get("files", []):
        try:
            when = datetime.fromisoformat(one["upload-time"].replace("Z", "+00:00")).date()
            found.append((one["filename"], one["hashes"].get("sha256", ""), when))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # upload times are optional
    return found


def normalized_name(name: str) -> str:
    """A distribution's normalized name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_version(file: str, release: Release) -> bool:
    stem = re.sub(r"\.(tar\.\w+|tgz|zip|whl)$", "", file)
    beginning = f"{normalized_name(release.name)}-{release.version}".lower()
    plain = normalized_name(stem[: len(release.name)]) + stem[len(release.name) :].lower()
    return plain == beginning or plain.startswith(beginning + "-")


def index_lookup(report: Callable[[str], None] | None = None) -> Lookup:
    """Queries the package index that pip is configured with, once for each package, until the first failure."""
    base: list[str | None] = []
    known: dict[str, dict[str, Any] | None] = {}

    def look_up(name: str) -> dict[str, Any] | None:
        if not base:
            base.append(index_url())
        key = normalized_name(name)
        if key not in known and base[0]:
            try:
                known[key] = _ask(f"{base[0].rstrip('/')}/{key}/")
            except urllib.error.HTTPError as error:
                known[key] = None
                if error.code != 404:
                    base[0] = None
                    _tell_unreachable(str(error.code), report)
            except (OSError, ValueError) as error:
                base[0] = None
                _tell_unreachable(str(getattr(error, "reason", error)), report)
        return known.get(key)

    return look_up


def _tell_unreachable(why: str, report: Callable[[str], None] | None) -> None:
    if report:
        report(f"the package index cannot be reached ({why}); using the dates of the recipe and the archives")


def index_url() -> str | None:
    """The index that pip would use, from the environment, pip's configuration or its default; None if pip is not
    available."""
    if os.environ.get("PIP_INDEX_URL"):
        return os.environ["PIP_INDEX_URL"]
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    if said.returncode == 0 and said.stdout.strip():
        return said.stdout.strip().splitlines()[-1]
    try:
        from pip._internal.models.index import PyPI  # the only place where pip defines its default
    except ImportError:
        return None
    return str(PyPI.simple_url)


def _ask(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    if parts.scheme != "https" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError("it is not an https URL")
    context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE"))
    request = urllib.request.Request(url, headers={"Accept": INDEX_TYPE})
    with urllib.request.urlopen(request, timeout=TIMEOUT, context=context) as answer:
        raw = answer.read(MAX_ANSWER + 1)
    value = json.loads(raw) if len(raw) <= MAX_ANSWER else None
    if not isinstance(value, dict):
        raise ValueError("its response is not the JSON of PEP 691")
    return value
