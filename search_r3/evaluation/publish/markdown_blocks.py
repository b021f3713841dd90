"""Tables in Markdown files, regenerated from the results: the text between two markers is never edited by hand.

A block begins with a line `<!-- table: KIND key=value ... -->` and ends with `<!-- /table -->`; KIND is one of KINDS.
Model cards are generated as a whole. `regenerate_all` generates both, from the run files if the data are available (see
`recompute`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.evaluation.measures import MEASURES, NDCG
from search_r3.evaluation.publish.model_card import card, study_files
from search_r3.evaluation.publish.recompute import Check, Rebuilder
from search_r3.evaluation.publish.tables import results_markdown, summary_markdown
from search_r3.evaluation.study.study_table import PARTS, study_markdown
from search_r3.evaluation.variant_system import variants_markdown
from search_r3.files import atomic_write_text
from search_r3.hints import refuse_unknown
from search_r3.model.checkpoint import CONTRACT_FILE

BEGIN = re.compile(r"^<!-- table: (.*?) *-->$", re.MULTILINE)
END = re.compile(r"^<!-- /table -->$", re.MULTILINE)
PAGES = ("README.md", "docs/results.md")
"""Files in a checkout that contain tables."""


@dataclass(frozen=True)
class Regenerated:
    """A file's current text, and its text generated from the results."""

    path: Path
    old: str
    new: str

    @property
    def changed(self) -> bool:
        """Whether the two differ."""
        return self.old != self.new

    def diff(self) -> str:
        """A unified diff from the current to the generated text; "" if they are equal."""
        lines = self.old.splitlines(), self.new.splitlines()
        return "\n".join(difflib.unified_diff(*lines, str(self.path), "from the results", lineterm="", n=1))


@dataclass
class Regeneration:
    """The result of `regenerate_all`: all files, and the problems (see `recompute.Check`)."""

    files: list[Regenerated] = field(default_factory=list)
    check: Check = field(default_factory=Check)

    @property
    def changed(self) -> list[Regenerated]:
        """The files that differ from the results."""
        return [file for file in self.files if file.changed]

    def write(self) -> None:
        """Write the files that differ, each atomically."""
        for file in self.changed:
            atomic_write_text(file.path, file.new)


def regenerate_all(
    files: Sequence[str | Path] | None = None,
    output: str | Path = "results",
    models: str | Path | None = "models",
    data_root: str | Path | None = None,
) -> Regeneration:
    """Regenerate the blocks of `files` and the cards of all adapters, without writing them.

    Args:
        files: Markdown files with blocks; by default those of PAGES that exist in the working folder.
        output: the folder of results.
        models: the folder of adapters; `output`/training/NAME documents the training of NAME. None skips the cards.
        data_root: where the data sets are.

    Raises:
        InputError: a file cannot be read or has no block, a block is of an unknown kind, or there are no results.
    """
    results = Rebuilder(output, data_root)
    if files is None:
        files = [page for page in PAGES if Path(page).is_file()] or PAGES[:1]
    regeneration = Regeneration([regenerate(file, results) for file in files], results.check)
    for adapter in sorted(path.parent for path in Path(models).glob(f"*/{CONTRACT_FILE}")) if models else ():
        kept = Path(output) / "training" / adapter.name
        if not kept.is_dir():
            results.check.problems.append(
                f"{adapter}: no kept run in {kept}; create it: search-r3 card {adapter} --run {kept} --keep RUN"
            )
            continue
        target = adapter / "README.md"
        old = _read(target) if target.is_file() else ""
        studies = [
            results.study(path.parent.relative_to(Path(output) / "studies").as_posix(), adapter.name)
            for path in study_files(output, adapter.name)
        ]
        regeneration.files.append(Regenerated(target, old, card(adapter, kept, output, results.records(), studies)))
    return regeneration


def regenerate(file: str | Path, results: Rebuilder) -> Regenerated:
    """One Markdown file with its blocks regenerated.

    Raises:
        InputError: the file cannot be read or has no block, or a block is of an unknown kind or has no end.
    """
    path = Path(file)
    old = _read(path)
    new, position = [], 0
    for begin in BEGIN.finditer(old):
        line = old.count("\n", 0, begin.start()) + 1
        where = f"{path}, line {line}"
        end = END.search(old, begin.end())
        following = BEGIN.search(old, begin.end())
        if end is None or (following is not None and following.start() < end.start()):
            raise InputError(f"{where}: this table has no line <!-- /table --> after it; add one")
        new += [old[position : begin.end()], f"\n{_make(begin[1], where, results).strip()}\n"]
        position = end.start()
    if not new:
        raise InputError(f"{path} has no line <!-- table: results -->; add one, with <!-- /table --> below it")
    return Regenerated(path, old, "".join([*new, old[position:]]))


def _make(header: str, where: str, results: Rebuilder) -> str:
    """The content of the block that begins with `<!-- table: HEADER -->`."""
    kind, *pairs = header.split()
    refuse_unknown([kind], tuple(KINDS), where, "table")
    make, keys = KINDS[kind]
    given = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        refuse_unknown([key], keys, where)
        if not equals or not value:
            raise InputError(f"{where}: {pair!r} in the table's marker; expected {key}=VALUE, without spaces")
        given[key] = value
    try:
        return make(given, results)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _results(given: Mapping[str, str], results: Rebuilder) -> str:
    """The tables of measures, for all systems and data sets or for those that match (`systems=bm25,*-sft.*`)."""
    measures = given["measures"].split(",") if "measures" in given else list(MEASURES)
    refuse_unknown(measures, MEASURES, "measures", "measure")
    return results_markdown(_chosen(given, results.records()), measures)


def _summary(given: Mapping[str, str], results: Rebuilder) -> str:
    """One small table of one measure, nDCG@10 by default."""
    measure = given.get("measure", NDCG)
    refuse_unknown([measure], MEASURES, "measure", "measure")
    return summary_markdown(_chosen(given, results.records()), measure)


def _variants(given: Mapping[str, str], results: Rebuilder) -> str:
    """One table of nDCG@10 with changed queries, one row per data set and system; original queries first."""
    systems = [{**record, "system": record["queries_of"]} for record in results.variants()]
    if not systems:
        raise InputError("no results of changed queries; run: search-r3 evaluate --queries upper ...")
    return variants_markdown([*results.records(), *_chosen(given, systems)])


def _chosen(given: Mapping[str, str], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for key, name in (("datasets", "dataset"), ("systems", "system")):
        if key in given:
            patterns = given[key].split(",")
            for pattern in patterns:
                if not any(fnmatchcase(record[name], pattern) for record in records):
                    known = ", ".join(dict.fromkeys(record[name] for record in records))
                    raise InputError(f"{key}={pattern} matches none of: {known}")
            records = [r for r in records if any(fnmatchcase(r[name], pattern) for pattern in patterns)]
    return records


def _study(given: Mapping[str, str], results: Rebuilder) -> str:
    """One study, or only the given `parts` and `modes` of it."""
    for key in ("dataset", "system"):
        if key not in given:
            raise InputError(f"a study table needs {key}=NAME, as in dataset=cosqa system=NAME parts=modes")
    study = results.study(given["dataset"], given["system"])
    parts = given["parts"].split(",") if "parts" in given else list(PARTS)
    refuse_unknown(parts, PARTS, "parts", "part")
    if "modes" in given:
        modes = given["modes"].split(",")
        refuse_unknown(modes, [mode["mode"] for mode in study["modes"]], "modes", "mode")
        study = {**study, "modes": [mode for mode in study["modes"] if mode["mode"] in modes]}
    return study_markdown(study, parts)


KINDS: dict[str, tuple[Callable[[Mapping[str, str], Rebuilder], str], tuple[str, ...]]] = {
    "results": (_results, ("datasets", "systems", "measures")),
    "summary": (_summary, ("datasets", "systems", "measure")),
    "queries": (_variants, ("datasets", "systems")),
    "study": (_study, ("dataset", "system", "parts", "modes")),
}
"""Kind of table -> the function that generates it, and the keys allowed in its marker."""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
