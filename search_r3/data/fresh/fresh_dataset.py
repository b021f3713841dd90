"""`search-r3 data fresh`: turn recently released packages into a BEIR folder with questions, a manifest and a
SOURCE.txt.

Questions pass a round-trip filter as in Promptagator (Dai et al. 2022, arXiv 2209.11755), but by a committee, since a
single retriever's filter would favor that retriever. Documents whose question was dropped remain as distractors.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from search_r3.data.beir import BeirDataset, Document, stable_order, write_beir
from search_r3.data.build_cache import BuildCache
from search_r3.data.fresh.fresh_config import KINDS, FreshConfig, Source, parse_date
from search_r3.data.fresh.llm_questions import written_questions
from search_r3.data.fresh.manifest import describe
from search_r3.data.fresh.passages import Passage, read_passages
from search_r3.data.fresh.questions import draft_questions
from search_r3.data.fresh.release import Lookup, Release, read_release, read_source
from search_r3.data.mining.decontamination import DeduplicateSettings, Dropped, deduplicate
from search_r3.data.mining.scorers import Scorer
from search_r3.data.mining.word_overlap import normalize
from search_r3.data.pairs import TrainingPair
from search_r3.data.synthesis.roundtrip import RoundTrip
from search_r3.data.synthesis.writers import Budget, Writer
from search_r3.errors import InputError
from search_r3.files import atomic_path, atomic_write_text, sha256_of

FORMAT = "search-r3 data fresh, 1"
"""Written to every manifest; increased when the same inputs would give a different set."""
PROGRAM = (
    "mining/decontamination",
    "mining/word_overlap",
    "sources/docstrings",
    "sources/querystyle",
    "sources/records",
    "synthesis/roundtrip",
)
"""Other modules of `search_r3.data` that determine the set; when one changes, a finished set is outdated."""
SPLIT = "test"
BLOCK = 128
"""Questions ranked in one batch."""
ReportLine = Callable[[str], None]
OpenScorer = Callable[[str], Scorer]
Ranks = dict[str, list[int | None]]
"""Retriever -> rank (from 1) of each question's own document; None if the two have nothing in common."""


def build_fresh(
    config: FreshConfig,
    into: str | Path,
    *,
    lookup: Lookup,
    open_scorer: OpenScorer,
    writer: Writer | None = None,
    budget: Budget | None = None,
    force: bool = False,
    report: ReportLine | None = None,
) -> dict[str, Any]:
    """Make the data set `into`: corpus.jsonl, queries.jsonl, qrels/test.tsv, SOURCE.txt and manifest.json.

    The folder is written atomically. Intermediate results of the retrievers and the writer are kept in INTO.partial, so
    an interrupted run resumes; a finished data set with the same inputs is not built again. The same inputs and seed
    give the same bytes, except for questions written by an LLM.

    Args:
        lookup: queries the package index (see `release.index_lookup`).
        open_scorer: opens a retriever of the committee by its name.
        writer: an LLM that writes the questions; None makes them from headings and docstrings.
        budget: spending limit of the writer.
        force: replace a data set that was made with other settings.

    Returns:
        The manifest.

    Raises:
        InputError: a package is missing, damaged, unsafe, too old or of unknown date; `into` exists and is not such a
            data set; the writer fails; or no question is left.
    """
    report = report or (lambda line: None)
    into = Path(into)
    _check_place(into)
    releases = _read_releases(config, lookup, report)
    run = _run_key(config, releases, writer)
    finished = _finished(into)
    # Newer Python versions parse newer syntax, so the set of documents can depend on the version.
    made = {"format": FORMAT, "program": program(), "python": ".".join(platform.python_version_tuple()[:2]), "run": run}
    if finished is not None and all(finished.get(key) == value for key, value in made.items()):
        return finished
    if finished is not None and not force:
        raise InputError(
            f"{into} already exists and was made from other inputs, or by another version of this program; name "
            "another folder, or use --force"
        )
    dropped: dict[str, Counter[str]] = defaultdict(Counter)
    passages = _corpus(config, releases, dropped)
    report(f"{len(passages):,} documents of {len(releases)} packages")
    with BuildCache(into) as cache:
        scratch = cache.folder / run[:16]
        if writer is None:
            questions = draft_questions(passages, config.seed, config.named_share, dropped)
        else:
            questions = written_questions(passages, config, writer, budget, scratch, dropped, report)
        report(f"{len(questions):,} questions to be checked by {', '.join(config.committee)}")
        ranks, members = _ranks(config, passages, questions, open_scorer, scratch, report)
        kept = _chosen(config, passages, questions, ranks, dropped)
        if not kept:
            reasons = sum(dropped.values(), Counter())
            common = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(4))
            raise InputError(f"no question is left ({common}); give packages with more documentation, or increase top")
        dataset = BeirDataset(
            into.name,
            {one.id: Document(one.id, one.title, one.text) for one in passages},
            {f"q{number}": questions[identity] for number, identity in enumerate(kept, start=1)},
            {f"q{number}": {identity: 1} for number, identity in enumerate(kept, start=1)},
        )
        manifest, note = describe(made, config, releases, passages, questions, kept, ranks, members, dropped, writer)
        _write(into, dataset, manifest, note)
        shutil.rmtree(scratch, ignore_errors=True)
    return _finished(into) or manifest


# ------------------------------------------------------------------------------------------------------------ releases


def _read_releases(config: FreshConfig, lookup: Lookup, report: ReportLine) -> list[Release]:
    after = parse_date(config.released_after, "released_after")
    releases: list[Release] = []
    for source in config.packages:
        release = read_release(source, lookup)
        called = f"{release.name} {release.version}".strip()
        if release.released is None and not config.allow_unknown_date:
            raise InputError(
                f"{source.path}: its release date is not known; give a wheel or source archive of the package "
                'index, write "released" in the recipe, or allow it with --allow-unknown-date'
            )
        if release.released is not None and release.released < after:
            raise InputError(
                f"{source.path} was released on {release.released} ({release.evidence}), before {after}; a model may "
                "have seen it: use a newer release, or change --released-after"
            )
        if any(other.name == release.name for other in releases):
            raise InputError(f"{source.path}: the package {release.name} is listed twice; remove one")
        report(f"{called}: released {release.released or 'at an unknown time'} ({release.evidence})")
        releases.append(release)
    return releases


def _run_key(config: FreshConfig, releases: Sequence[Release], writer: Writer | None) -> str:
    settings = {key: value for key, value in asdict(config).items() if key != "packages"}
    packages = [[one.name, one.version, one.license, one.contents.sha256] for one in releases]
    skipped = [[list(one.skip), list(one.older)] for one in config.packages]
    values = [FORMAT, settings, packages, skipped, dict(writer.identity) if writer else None]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def program() -> str:
    """SHA-256 of the modules that determine the documents and questions, 16 hex digits."""
    here = Path(__file__).parent
    files = [*sorted(here.glob("*.py")), *(here.parent / f"{name}.py" for name in PROGRAM)]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------------- corpus


def _corpus(config: FreshConfig, releases: Sequence[Release], dropped: dict[str, Counter[str]]) -> list[Passage]:
    """The documents of all packages without old ones and duplicates, at most `documents_per_package` of each."""
    found: list[Passage] = []
    for source, release in zip(config.packages, releases, strict=True):
        passages = read_passages(release, config, dropped[release.name], source.skip)
        old = _old_texts(source, config)
        fresh = [one for one in passages if normalize(one.text) not in old]
        dropped[release.name]["document that an older package has"] += len(passages) - len(fresh)
        found += fresh
    if not found:
        raise InputError("no document of the packages has enough words; give others, or lower min_words")
    pairs = [TrainingPair(one.id, "", one.text, source=one.package) for one in found]
    copies = Dropped()
    unique = {pair.id for pair in deduplicate(pairs, DeduplicateSettings(config.near, "positive"), copies)}
    for package, reasons in copies.by_source.items():
        dropped[package].update({f"document, {reason}": count for reason, count in reasons.items()})
    kept: list[Passage] = []
    for release in releases:
        own = [one for one in found if one.package == release.name and one.id in unique]
        few = set(stable_order((one.id for one in own), config.seed)[: config.documents_per_package])
        dropped[release.name]["document over the package's number"] += len(own) - len(few)
        kept += [one for one in own if one.id in few]
    return kept


def _old_texts(source: Source, config: FreshConfig) -> set[str]:
    return {normalize(one.text) for path in source.older for one in read_passages(read_source(path), config, Counter())}


# ----------------------------------------------------------------------------------------------------------- questions


def _ranks(
    config: FreshConfig,
    passages: Sequence[Passage],
    questions: dict[str, str],
    open_scorer: OpenScorer,
    scratch: Path,
    report: ReportLine,
) -> tuple[Ranks, dict[str, Any]]:
    """The rank of each question's document by each member of the committee, and the members' identities."""
    row = {one.id: number for number, one in enumerate(passages)}
    texts = [Document(one.id, one.title, one.text).full_text for one in passages]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    asked = list(questions)
    ranks: Ranks = {}
    members: dict[str, Any] = {}
    for name in config.committee:
        scorer = open_scorer(name)
        folder = scratch / hashlib.sha256(f"{name} {digest}".encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        trip = RoundTrip(scorer, texts, folder, lambda what, done, total: report(f"{done:,} of {total:,} {what}"))
        found: list[int | None] = []
        for start in range(0, len(asked), BLOCK):
            block = asked[start : start + BLOCK]
            found += trip.ranks([questions[one] for one in block], [row[one] for one in block])
        ranks[name] = found
        members[name] = dict(scorer.identity)
    return ranks, members


def _chosen(
    config: FreshConfig,
    passages: Sequence[Passage],
    questions: dict[str, str],
    ranks: Ranks,
    dropped: dict[str, Counter[str]],
) -> list[str]:
    """Ids of the documents whose question is kept, in corpus order: those found by any member of the committee, at most
    `questions_per_package` of each package, alternating between kinds."""
    by_id = {one.id: one for one in passages}
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for number, identity in enumerate(questions):
        places = [ranks[name][number] for name in config.committee]
        package = by_id[identity].package
        if any(place is not None and place <= config.top for place in places):
            found[package][by_id[identity].kind].append(identity)
        else:
            dropped[package]["question that no retriever answers"] += 1
    kept: set[str] = set()
    for package, by_kind in found.items():
        queues = [stable_order(by_kind[kind], config.seed) for kind in KINDS if by_kind.get(kind)]
        longest = max(map(len, queues))
        turns = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
        kept.update(turns[: config.questions_per_package])
        dropped[package]["question over the package's number"] += max(0, len(turns) - config.questions_per_package)
    return [one.id for one in passages if one.id in kept]


# -------------------------------------------------------------------------------------------------------------- output


def _check_place(into: Path) -> None:
    if into.is_file():
        raise InputError(f"{into} is a file; name the folder to write, such as build/fresh")
    if into.is_dir() and any(into.iterdir()) and _finished(into) is None:
        raise InputError(f"{into} has other files, and was not made by this command; name an empty or a new folder")


def _finished(into: Path) -> dict[str, Any] | None:
    """The manifest of a data set that this command made."""
    try:
        manifest = json.loads((into / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    made = isinstance(manifest, dict) and str(manifest.get("format", "")).startswith(FORMAT.partition(",")[0])
    return manifest if made else None


def _write(into: Path, dataset: BeirDataset, manifest: dict[str, Any], note: str) -> None:
    with atomic_path(into) as folder:
        write_beir(folder, dataset, SPLIT)
        names = ("corpus.jsonl", "queries.jsonl", f"qrels/{SPLIT}.tsv")
        sums = {name: sha256_of(folder / name) for name in names}
        atomic_write_text(folder / "SOURCE.txt", note)
        full = {**manifest, "sha256": sums}
        atomic_write_text(folder / "manifest.json", json.dumps(full, indent=2, ensure_ascii=False) + "\n")
