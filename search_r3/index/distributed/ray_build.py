"""`build_index` with its embedding done by many processes: spool the diff, encode them with Ray Data, commit once.

Reading, comparing with what is there, hashing, checking and finishing are the local build's own functions; only what
lies between (its stages) is another. A worker that dies is replaced, and its parts are done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from search_r3.errors import InputError
from search_r3.index.backends.backend_registry import choose_backend
from search_r3.index.backends.lance.approximate import APPROXIMATE_FROM
from search_r3.index.build.build_report import IndexReport, Removal
from search_r3.index.build.build_run import BuildRun
from search_r3.index.build.embedding import BATCH_TOKENS
from search_r3.index.distributed.cluster import Cluster, cause_of, joined
from search_r3.index.distributed.ray_worker import Described, EncodeRows, Job, describe
from search_r3.index.distributed.spool import Spooled, drop_spool, spool_uri, write_spool
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage.location import Place, for_writing, options_of, place_of, storage_errors
from search_r3.index.storage.locking import WriteLock, writing

TASK_ROWS = 65_536
"""Rows of one task, the most that is encoded again when a worker dies; fewer where the corpus is small."""
TASKS_A_WORKER = 4
"""At least, so that no worker waits long for the last one."""


def build_distributed(
    path: str | Path,
    documents: Iterable[SourceDocument],
    load: Callable[[], Encoder],
    cluster: Cluster,
    *,
    batch_size: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    max_length: int | None = None,
    prune: bool = True,
    part_rows: int | None = None,
    file_rows: int | None = None,
    approximate_from: int | None = APPROXIMATE_FROM,
    source: str | None = None,
    take_over: bool = False,
    may_prune: Callable[[Removal], bool] | None = None,
    types: Mapping[str, str] | None = None,
) -> IndexReport:
    """Make the index at `path`, or bring it up to date with `documents`, with the workers of a Ray cluster.

    Ids, hashes and vectors are those of `build_index` (vectors to the rounding of another batch), and all new and
    changed rows become visible in one commit: before it, a reader sees the old index. What the corpus no longer has is
    removed after it.

    Args:
        path: a folder that all machines share, or a place on object storage (`location.Remote`, or its URI).
        documents: what to index; only this process reads it.
        load: gives a worker its model; `ModelSource("name")`, or any picklable function.
        cluster: where the workers are.
        batch_size, batch_tokens, max_length, prune, approximate_from: as in `build_index`.
        source, take_over, may_prune, types: as in `build_index`.
        part_rows: rows of one task, the most that is done again when a worker dies; by default at most 65,536.
        file_rows: rows of one file of the table; by default as many as make half a gigabyte.

    Raises:
        InputError: as `build_index`; besides, the cluster cannot be had, the workers' models differ, or the folder is
            not the same on all machines. Nothing is committed then.
    """
    started = time.perf_counter()
    for name, value in (("part_rows", part_rows), ("file_rows", file_rows), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    report = IndexReport()
    place = for_writing(place_of(path))
    choose_backend(place).require("distributed", "builds by Ray")
    with storage_errors(place), writing(place, make=True) as lock, joined(cluster) as each:
        model = _described(load, each)
        build = BuildRun(
            place, lock, cast(Encoder, model), None, report
        )  # it asks what the model is, and embeds nothing
        diff = build.begin(documents, source, take_over, types, max_length, prune)
        try:
            spooled = write_spool(place, diff, documents, part_rows)
            if spooled.rows or spooled.replaced:
                build.touch()
                build.add_columns(spooled.columns, spooled.widened)
                build.table.checkout_latest()
                since = build.table.version
                job = Job(
                    load, replace(model, count_tokens=None), build.table.schema, max_length, batch_tokens, batch_size
                )
                _encode_and_commit(place, lock, spooled, job, cluster, each, (part_rows, file_rows), since)
                build.table.checkout_latest()
            _tell(report, spooled)
            build.finish(diff, prune, may_prune, approximate_from, ())
        finally:
            diff.close()
            with suppress(OSError, RuntimeError, ValueError):  # if it stays, the next run removes it
                drop_spool(place_of(path))
    report.skipped = list(getattr(documents, "skipped", []))
    report.seconds = time.perf_counter() - started
    return report


def _described(load: Callable[[], Encoder], each: dict[str, Any]) -> Described:
    """What a worker says of the model: the driver needs neither its weights nor a GPU."""
    import ray

    task = ray.remote(max_calls=1, **each)(describe)  # its process ends, and gives its memory back
    try:
        return ray.get(task.remote(load))
    except ray.exceptions.RayError as error:
        raise cause_of(error) from None


def _encode_and_commit(
    place: Place,
    lock: WriteLock,
    spooled: Spooled,
    job: Job,
    cluster: Cluster,
    each: dict[str, Any],
    sizes: tuple[int | None, int | None],
    since: int,
) -> None:
    """`sizes`: rows of a task and of a file, where they are given; `since`: the table's version before."""
    from search_r3.index.distributed.commit import Fragments, check_fragments, commit_fragments, rows_per_file

    fragments: list[Any] = []
    if spooled.rows:
        task_rows, file_rows = sizes
        sink = Fragments(place, job.schema, file_rows or rows_per_file(job.model.dimension))
        tasks = max(TASKS_A_WORKER * cluster.workers, -(-spooled.rows // (task_rows or TASK_ROWS)))
        _encode(place, job, cluster, each, sink, tasks)
        fragments = sink.fragments
    check_fragments(place, fragments, spooled.rows)
    lock.check()
    commit_fragments(place, fragments, spooled.replaced, since)


def _encode(place: Place, job: Job, cluster: Cluster, each: dict[str, Any], sink: Any, tasks: int) -> None:
    """Run the workers over the spool in about `tasks` tasks, each done again where a worker died."""
    import lance
    import lance_ray
    import ray

    options = options_of(place)
    tasks = min(tasks, len(lance.dataset(spool_uri(place), storage_options=options).get_fragments()))
    rows = lance_ray.read_lance(spool_uri(place), storage_options=options, override_num_blocks=tasks)
    encoded = rows.map_batches(
        EncodeRows,
        fn_constructor_args=(job,),
        batch_size=None,  # a block as it was read: nothing is collected across tasks
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(cluster.workers, tasks)),
        **each,
    )
    try:
        encoded.write_datasink(sink)
    except Exception as error:
        if (cause := cause_of(error)) is error:
            raise
        raise cause from None


def _tell(report: IndexReport, spooled: Spooled) -> None:
    report.documents, report.unchanged, report.updated = spooled.documents, spooled.unchanged, spooled.updated
    report.added, report.removed = spooled.rows - spooled.updated, spooled.stale
    report.embedded = spooled.embedded
