"""Tiny wheels and source archives, made by hand, and a retriever that needs no model."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

METADATA = """Metadata-Version: 2.4
Name: {name}
Version: {version}
License-Expression: MIT
Description-Content-Type: text/markdown

{readme}
"""
README = """# tidewater

Predicts when the water is high at a harbour, out of harmonic constants that are measured once and hold for decades.
It was written for pilots and is used by divers, bakers of sea salt and people who walk to islands.

## Installation

Install it from the package index with the usual command, and then check that it works by running the small example.
Nothing else is needed, neither a compiler nor a network, once the tables lie in their folder.

## Converting chart datums

Heights are given above a reference level, and every country has its own. Give both levels by name, and the offset is
looked up in a table of ports; where there is none, the nearest port within fifty kilometres is taken instead.

### Leap seconds and clocks

The moon does not care for civil time. All moments are therefore kept in universal time, and are only turned into the
local time of a harbour when they are printed, so that summer time never moves a high water by an hour.

## 1.4.0

Many things were fixed in this version, and a few were added, which are told here at great length for everybody.
Whoever comes from the version before needs to change nothing, and may remove the old tables.
"""
CODE = '''"""Harmonic constituents of the tide.

Each one is an angular speed, an amplitude and a phase. The names are Doodson's, and the speeds are in degrees an hour,
since that is what harbour offices print in their almanacs every single year.
"""

raise SystemExit("importing this would end the test")


class Harbour:
    """A harbour with its measured constituents and datum offset.

    Constituents are kept by name. Unknown names are refused when the harbour is made, so that a table with a misprint
    does not give water levels that look right and are wrong by a metre.
    """

    def next_high_water(self, moment, tolerance=60):
        """Search the next high water after a moment by bisection.

        The derivative changes its sign once between two hours, and is halved until the wanted tolerance is reached.
        """
        low, high = self._bracket(moment)
        while high - low > tolerance:
            middle = (low + high) / 2
            low, high = (middle, high) if self._rising(middle) else (low, middle)
        return (low + high) / 2

    def slack_duration(self, moment, speed=0.2):
        """Estimate how long slack current lasts around a turn of the tide.

        The current is taken for a sine between its two greatest values, as pilots do on paper.
        """
        greatest = max(abs(self._current(moment - 3)), abs(self._current(moment + 3)))
        share = min(1.0, speed / greatest)
        return 2 * share / self.angular_speed
'''
FILES = {"tidewater/__init__.py": "", "tidewater/harmonics.py": CODE}


def wheel(
    folder: Path,
    name: str = "tidewater",
    version: str = "2.0",
    files: Mapping[str, str] = FILES,
    readme: str = README,
    date: tuple[int, ...] = (2026, 5, 4, 12, 0, 0),
) -> Path:
    """A wheel whose members all have that date."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    metadata = METADATA.format(name=name, version=version, readme=readme)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, text in {**files, f"{name}-{version}.dist-info/METADATA": metadata}.items():
            archive.writestr(zipfile.ZipInfo(member, date), text)  # type: ignore[arg-type]
    return path


def sdist(folder: Path, name: str = "tidewater", version: str = "2.0", mtime: int = 1_780_000_000) -> Path:
    """A source archive with the same texts, and documentation in reStructuredText; 1,780,000,000 is in May 2026."""
    path = folder / f"{name}-{version}.tar.gz"
    root = f"{name}-{version}"
    files = {
        f"{root}/PKG-INFO": METADATA.format(name=name, version=version, readme=""),
        **{f"{root}/src/{member}": text for member, text in FILES.items()},
        f"{root}/docs/guide.rst": GUIDE,
        f"{root}/tests/test_it.py": CODE,
    }
    with tarfile.open(path, "w:gz") as archive:
        for member, text in files.items():
            add(archive, member, text.encode(), mtime)
    return path


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", mtime: int = 1_780_000_000, **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), mtime
    for key, value in fields.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


GUIDE = """
=====
Guide
=====

Storm surges in shallow bays
============================

Wind piles water up where the ground rises slowly. The :class:`Harbour` knows nothing of that, and its prediction must
be corrected by hand with what the weather service says about wind and pressure on that day.

Rivers
------

Short.
"""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def listing(path: Path, uploaded: str, **others: str) -> dict[str, Any]:
    """What a package index says of a file, and of others by name, as in PEP 691 and 700."""
    files = [{"filename": path.name, "hashes": {"sha256": sha256(path)}, "upload-time": f"{uploaded}T10:00:00.000000Z"}]
    files += [
        {"filename": name, "hashes": {"sha256": "0" * 64}, "upload-time": f"{day}T10:00:00Z"}
        for name, day in others.items()
    ]
    return {"files": files}


class Words:
    """Scores by the number of words in common; `blind` finds nothing at all."""

    zero_is_no_match = True

    def __init__(self, name: str, blind: bool = False) -> None:
        self.name, self.blind = name, blind
        self.identity = {"retriever": name}

    def prepare(self, documents: list[str], folder: Path, report: Any = None) -> None:
        self._documents = [set(text.lower().split()) for text in documents]

    def score(self, queries: list[str]) -> np.ndarray:
        rows = [[len(set(q.lower().split()) & d) * (not self.blind) for d in self._documents] for q in queries]
        return np.array(rows, dtype=np.float32)
