"""Reports of a build: what it did, and what it would remove."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from search_r3.index.backends.lance.duplicates import Differing
from search_r3.index.source_document import Skipped

LARGE_SHARE, FEW_DOCUMENTS = 0.1, 3


@dataclass(frozen=True)
class Removal:
    """What a run would remove: chunks and documents that the source no longer has, of the `of` chunks it had."""

    chunks: int
    documents: int
    of: int

    @property
    def large(self) -> bool:
        """Whether it is more than a tenth of the source and more than three documents."""
        return self.documents > FEW_DOCUMENTS and self.chunks > LARGE_SHARE * self.of

    def __str__(self) -> str:
        return f"{self.documents:,} documents ({self.chunks:,} of the source's {self.of:,} chunks)"


@dataclass
class IndexReport:
    """What a build did, counted in chunks: a long document has several. `embedded` counts texts the model embedded.

    Attributes:
        truncated: embedded texts that had more tokens than the limit and lost their end. Chunks are cut to fit, so this
            happens only if the encoder cannot count tokens (`search_r3.index.encoder_protocol`).
        duplicates_removed: rows that were removed because an equal row has the same id and source, or became equal when
            the run rewrote the document.
        differing: ids whose rows still differ: of documents that were not part of the run or had to be left out.
        approximate: the approximate index as `ApproximateIndex` describes it, if there is one.
        full_text_rebuilt: the full-text index of an earlier version, which left out words, was rebuilt.
        source: the name of the source that the documents belong to.
        conflicts: documents left out because another source has their ids, with a remedy.
        kept: what the source no longer has but was kept because `may_prune` did not allow its removal.
        unknown: documents of an index of format 1 that no run has read since; they are kept.
    """

    documents: int = 0
    added: int = 0
    updated: int = 0
    unchanged: int = 0
    removed: int = 0
    embedded: int = 0
    truncated: int = 0
    duplicates_removed: int = 0
    differing: Differing | None = None
    skipped: list[Skipped] = field(default_factory=list)
    seconds: float = 0.0
    approximate: dict[str, Any] | None = None
    full_text_rebuilt: bool = False
    source: str = ""
    conflicts: list[Skipped] = field(default_factory=list)
    kept: Removal | None = None
    unknown: int = 0

    @property
    def chunks(self) -> int:
        return self.added + self.updated + self.unchanged
