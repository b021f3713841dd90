"""`search-r3 index --ray`: its options, and the call of `search_r3.index.distributed`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from search_r3.index.build.build_index import IndexReport

Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help='Embed with the workers of a Ray cluster: its address ("auto", HOST:6379), or "local" to start one here. '
        "All new rows are written in one commit.",
    ),
]
Workers = Annotated[
    int, typer.Option(min=1, help="With --ray: processes with a copy of the model, each on a GPU if available.")
]


def index_on_ray(
    target: str,
    documents: Any,
    model: str,
    address: str,
    workers: int,
    loading: tuple[str | None, str, str],
    **options: Any,
) -> IndexReport:
    """Build the index `target` of `documents` with the named model; `loading` is its device, dtype and engine.

    Raises:
        InputError: see `build_distributed`.
    """
    from search_r3.index.distributed import Cluster, ModelSource, build_distributed

    device, dtype, engine = loading
    load = ModelSource(model, device, dtype, engine)
    return build_distributed(target, documents, load, Cluster(address, workers=workers), **options)
