"""`build_index` with many processes that embed: spool the changes, encode them with Ray Data, commit once.

Reading, comparing, hashing, checking and finishing use the local build's functions; only its stages are replaced. A
worker that dies is replaced, and its tasks are repeated; what was encoded is not encoded again (`encoded`), not even by
the next run if the driver dies.
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
from search_r3.index.distributed.encoded import drop_encoded
from search_r3.index.distributed.ray_worker import Described, EncodeRows, Job, describe
from search_r3.index.distributed.spool import Spooled, drop_spool, spool_uri, write_spool
from search_r3.index.encoder_protocol import Encoder
from search_r3.index.source_document import SourceDocument
from search_r3.index.storage.location import Location, Remote, for_writing, location_of, options_of, storage_errors
from search_r3.index.storage.locking import WriteLock, writing
from search_r3.index.storage.object_store import with_environment

TASK_ROWS = 65_536
"""Maximum number of rows of a task, which is repeated when a worker dies; fewer if the corpus is small."""
TASKS_PER_WORKER = 4
"""At least this many, so that no worker waits long for the last one."""


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
    """Create the index at `path`, or bring it up to date with `documents`, with the workers of a Ray cluster.

    Ids, hashes and vectors are the same as with `build_index` (vectors up to rounding, as batches differ). All new and
    changed rows become visible in one commit; before it, readers see the old index. Afterwards, documents that the
    corpus no longer has are removed. If this process dies, the same call goes on with what the workers had encoded.

    Args:
        path: a folder that all machines share, or a location on object storage (`location.Remote`, or its URI), for
            which the workers get this process's credentials, region and endpoint.
        documents: what to index; only this process reads it.
        load: returns the model in a worker; `ModelSource("name")`, or any picklable function.
        cluster: where the workers are.
        batch_size, batch_tokens, max_length, prune, approximate_from: as for `build_index`.
        source, take_over, may_prune, types: as for `build_index`.
        part_rows: rows of one task, which is repeated when a worker dies; by default at most 65,536.
        file_rows: rows of one file of the table; by default about half a gigabyte.

    Raises:
        InputError: as for `build_index`; or the cluster is not available, the workers' models differ, or the folder is
            not shared by all machines. Nothing is committed then.
    """
    started = time.perf_counter()
    for name, value in (("part_rows", part_rows), ("file_rows", file_rows), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    report = IndexReport()
    location = for_writing(location_of(path))
    choose_backend(location).require("distributed", "builds by Ray")
    if isinstance(location, Remote):  # the workers' environment may know nothing of it
        location = with_environment(location)
    with storage_errors(location), writing(location, make=True) as lock, joined(cluster) as each:
        model = _described(load, each)
        build = BuildRun(location, lock, cast(Encoder, model), None, report)  # it only needs the model's description
        diff = build.begin(documents, source, take_over, types, max_length, prune)
        try:
            spooled = write_spool(location, diff, documents, part_rows)
            if spooled.rows or spooled.replaced:
                build.touch()
                build.add_columns(spooled.columns, spooled.widened)
                build.table.checkout_latest()
                since = build.table.version
                described, schema = replace(model, count_tokens=None), build.table.schema
                job = Job(location, load, described, schema, max_length, batch_tokens, batch_size)
                _encode_and_commit(location, lock, spooled, job, cluster, each, (part_rows, file_rows), since)
                build.table.checkout_latest()
            _fill_in(report, spooled)
            build.finish(diff, prune, may_prune, approximate_from, ())
            drop_encoded(location_of(path))
        finally:
            diff.close()
            with suppress(OSError, RuntimeError, ValueError):  # if it is left behind, the next run removes it
                drop_spool(location_of(path))
    report.skipped = list(getattr(documents, "skipped", []))
    report.seconds = time.perf_counter() - started
    return report


def _described(load: Callable[[], Encoder], each: dict[str, Any]) -> Described:
    """The model's description, from a worker: the driver needs neither its weights nor a GPU."""
    import ray

    task = ray.remote(max_calls=1, **each)(describe)  # the process ends and frees its memory
    try:
        return ray.get(task.remote(load))
    except ray.exceptions.RayError as error:
        raise cause_of(error) from None


def _encode_and_commit(
    location: Location,
    lock: WriteLock,
    spooled: Spooled,
    job: Job,
    cluster: Cluster,
    each: dict[str, Any],
    sizes: tuple[int | None, int | None],
    since: int,
) -> None:
    """Encode the spooled rows and commit them.

    Args:
        sizes: rows of a task and of a file, if given.
        since: the table's version before.
    """
    from search_r3.index.distributed.commit import Fragments, check_fragments, commit_fragments, rows_per_file

    fragments: list[Any] = []
    if spooled.rows:
        task_rows, file_rows = sizes
        sink = Fragments(location, job.schema, file_rows or rows_per_file(job.model.dimension))
        tasks = max(TASKS_PER_WORKER * cluster.workers, -(-spooled.rows // (task_rows or TASK_ROWS)))
        _encode(location, job, cluster, each, sink, tasks)
        fragments = sink.fragments
    check_fragments(location, fragments, spooled.rows)
    lock.check()
    commit_fragments(location, fragments, spooled.replaced, since)


def _encode(location: Location, job: Job, cluster: Cluster, each: dict[str, Any], sink: Any, tasks: int) -> None:
    """Encode the spool in about `tasks` tasks; a task is repeated if its worker dies."""
    import lance
    import lance_ray
    import ray

    options = options_of(location)
    tasks = min(tasks, len(lance.dataset(spool_uri(location), storage_options=options).get_fragments()))
    rows = lance_ray.read_lance(spool_uri(location), storage_options=options, override_num_blocks=tasks)
    encoded = rows.map_batches(
        EncodeRows,
        fn_constructor_args=(job,),
        batch_size=None,  # whole blocks, so nothing is collected across tasks
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


def _fill_in(report: IndexReport, spooled: Spooled) -> None:
    report.documents, report.unchanged, report.updated = spooled.documents, spooled.unchanged, spooled.updated
    report.added, report.removed = spooled.rows - spooled.updated, spooled.stale
    report.embedded = spooled.embedded
