"""What a build did, and what it would have removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from search_r3.index.source_document import Skipped
from search_r3.index.table.duplicates import Differing

LARGE_SHARE, FEW_DOCUMENTS = 0.1, 3


@dataclass(frozen=True)
class Removal:
    """What a run would remove: chunks and documents that the source no longer has, `of` so many chunks that it had."""

    chunks: int
    documents: int
    of: int

    @property
    def large(self) -> bool:
        """More than a tenth of the source, and more than three documents."""
        return self.documents > FEW_DOCUMENTS and self.chunks > LARGE_SHARE * self.of

    def __str__(self) -> str:
        return f"{self.documents:,} documents ({self.chunks:,} of the source's {self.of:,} chunks)"


@dataclass
class IndexReport:
    """What a build did, in chunks: a long document is several. `embedded` counts texts that went through the model.

    Attributes:
        truncated: embedded texts that had more tokens than the limit, so that their end was not embedded. Chunks are
            cut to fit, so this happens only where the encoder cannot count tokens (`search_r3.index.encoder_protocol`).
        duplicates_removed: rows that were removed as another of the same id and source is equal, or became equal when
            the run wrote the document again.
        differing: what is left of ids whose rows differ: of documents that the run did not bring or had to leave out.
        approximate: what `ApproximateIndex` says of the approximate index, if there is one.
        full_text_rebuilt: an earlier version had left words out of the full-text index, so it was built again.
        source: the name of the source that the documents belong to.
        conflicts: documents left out because another source has their ids, with what can be done.
        kept: what the source no longer has and was kept nevertheless, as `may_prune` did not allow its removal.
        unknown: documents of an index of format 1 that no run has brought again: they are kept.
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


@contextmanager
def progress_line(enabled: bool) -> Iterator[Callable[[IndexReport], None]]:
    """A line of progress on stderr, updated by each call with the report."""
    if not enabled:
        yield lambda report: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading")
        yield lambda report: bar.update(
            task, description=f"{report.documents:,} documents read, {report.embedded:,} chunks embedded"
        )
