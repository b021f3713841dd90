"""The manifest of a fresh set: every package with its date and license, and what each filter dropped.

Filtering by a retriever favors that retriever, so the counts are given for each member of the committee.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from search_r3.data.fresh.fresh_config import KINDS, FreshConfig
from search_r3.data.fresh.passages import Passage
from search_r3.data.fresh.release import EVIDENCE, Release
from search_r3.data.synthesis.writers import Writer

DEPTHS = (1, 10)
"""Ranks at which the committee's hits are reported, besides the recipe's own `top`."""
BY_RULE = "headings and docstrings, by rule"


def describe(
    head: dict[str, Any],
    config: FreshConfig,
    releases: Sequence[Release],
    passages: Sequence[Passage],
    questions: Mapping[str, str],
    kept: Sequence[str],
    ranks: Mapping[str, Sequence[int | None]],
    members: Mapping[str, Any],
    dropped: Mapping[str, Counter[str]],
    writer: Writer | None,
) -> tuple[dict[str, Any], str]:
    """The contents of (manifest.json, SOURCE.txt), without local paths or times of day.

    Args:
        head: comes first in the manifest.
        questions: document id -> question, all that the committee checked; `kept`: ids of those in the set.
        ranks: retriever -> rank of each question's document, in the order of `questions`.
        members: retriever -> everything that determines its scores.
        dropped: package -> reason -> count.
    """
    by_id = {one.id: one for one in passages}
    packages = []
    for release in releases:
        own = [one for one in passages if one.package == release.name]
        asked = [by_id[one] for one in kept if by_id[one].package == release.name]
        packages.append(
            {
                "name": release.name,
                "version": release.version or None,
                "kind": release.kind,
                "file": release.file or None,
                "sha256": release.contents.sha256,
                "license": release.license,
                "released": release.released.isoformat() if release.released else None,
                "date_from": release.evidence,
                "first_released": release.first_released.isoformat() if release.first_released else None,
                "documents": _by_kind(own),
                "questions": _by_kind(asked),
                "dropped": {reason: count for reason, count in sorted(dropped[release.name].items()) if count},
                "files_not_read": dict(sorted(release.contents.passed_over.items())),
            }
        )
    settings = {key: value for key, value in asdict(config).items() if key != "packages"}
    total = sum(dropped.values(), Counter())
    manifest = {
        **head,
        "documents": len(passages),
        "questions": len(kept),
        "questions_by_kind": _by_kind([by_id[one] for one in kept]),
        "questions_from": dict(writer.identity) if writer else BY_RULE,
        "released_after": config.released_after,
        "dates": dict(sorted(Counter(release.evidence for release in releases).items())),
        "round_trip": _round_trip(config, list(questions), set(kept), ranks, members),
        "dropped": {reason: count for reason, count in sorted(total.items()) if count},
        "settings": settings,
        "packages": packages,
    }
    return manifest, _note(manifest, releases)


def _by_kind(passages: Sequence[Passage]) -> dict[str, int]:
    counts = Counter(one.kind for one in passages)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def _round_trip(
    config: FreshConfig,
    asked: list[str],
    kept: set[str],
    ranks: Mapping[str, Sequence[int | None]],
    members: Mapping[str, Any],
) -> dict[str, Any]:
    """How many questions each member finds, and how many only it finds: those show how much the filter favors it."""
    found = {
        name: {one for one, place in zip(asked, places, strict=True) if place is not None and place <= config.top}
        for name, places in ranks.items()
    }
    everything = set().union(*found.values())
    by_member = {}
    for name, places in ranks.items():
        others = set().union(*(hits for other, hits in found.items() if other != name))
        depths = {k: {o for o, p in zip(asked, places, strict=True) if p is not None and p <= k} for k in DEPTHS}
        by_member[name] = {
            "found_before_the_filter": {
                **{str(k): len(hits) for k, hits in depths.items()},
                str(config.top): len(found[name]),
            },
            "found_by_it_alone": len(found[name] - others),
            "kept": len(kept),
            "kept_that_it_finds": len(kept & found[name]),
            "kept_that_it_alone_finds": len(kept & (found[name] - others)),
            "identity": members[name],
        }
    return {
        "rule": f"kept if any of the committee ranks the document among the first {config.top}",
        "checked": len(asked),
        "found_by_any": len(everything),
        "found_by_all": len(set.intersection(*found.values())) if found else 0,
        "found_by_none": len(asked) - len(everything),
        "committee": by_member,
    }


def _note(manifest: dict[str, Any], releases: Sequence[Release]) -> str:
    trip = manifest["round_trip"]
    lines = [
        f"{manifest['questions']} questions over {manifest['documents']} documents out of {len(releases)} packages,",
        "made by search-r3 data fresh; manifest.json has the settings and every count.",
        "",
        f"Every package was released on or after {manifest['released_after']}, as far as its date is known:",
    ]
    lines += [f"  {count} by {evidence}: {EVIDENCE[evidence]}" for evidence, count in manifest["dates"].items()]
    by = "an LLM" if manifest["questions_from"] != BY_RULE else manifest["questions_from"]
    lines += [
        "A text may be older than its release, and may repeat what older texts say.",
        "",
        f"Questions: from {by}. One document is judged relevant to each; others may answer it too and are not judged.",
        f"Filter: {trip['rule']}; of {trip['checked']} questions {trip['found_by_none']} were dropped by it.",
        "It favors the committee. Questions of this set that only one member finds: "
        + ", ".join(f"{name} {counts['kept_that_it_alone_finds']}" for name, counts in trip["committee"].items())
        + ".",
        "",
        "Packages (name, version, released, license):",
    ]
    lines += [f"  {one.name} {one.version or '?'}  {one.released or 'unknown'}  {one.license}" for one in releases]
    return "\n".join(lines) + "\n"
