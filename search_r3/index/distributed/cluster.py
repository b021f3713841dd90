"""A Ray cluster for one build: started or joined, checked against what the workers need, and left as it was.

Ray is imported only inside functions: without it everything else works.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from search_r3.errors import InputError
from search_r3.files import UNWRITABLE
from search_r3.optional import require

LOCAL = "local"
KNOCK_SECONDS = 5.0


@dataclass(frozen=True)
class Cluster:
    """Where the workers run, and how many there are."""

    address: str = LOCAL
    """ "local" starts a cluster on this machine; else Ray's address: "auto", "HOST:6379", "ray://HOST:10001"."""
    workers: int = 2
    """Number of processes, each of which loads the model."""
    gpus_per_worker: float | None = None
    """GPUs per worker; None means one if the cluster has any, else none."""

    def __post_init__(self) -> None:
        if not self.address:
            raise InputError('the Ray address is empty; give "local", "auto" or HOST:PORT')
        if self.workers < 1:
            raise InputError(f"workers is {self.workers}; it must be at least 1")
        if self.gpus_per_worker is not None and self.gpus_per_worker < 0:
            raise InputError(f"gpus_per_worker is {self.gpus_per_worker}; it must be 0 or more")


@contextmanager
def joined(cluster: Cluster) -> Iterator[dict[str, Any]]:
    """Connect to the cluster; yields the resources of one worker as Ray's arguments (num_cpus, num_gpus).

    A cluster that this process is already connected to is used as it is. One that is started here is stopped at the
    end.

    Raises:
        InputError: Ray is not installed, or the cluster cannot be reached or is too small.
    """
    require("lance_ray", "ray", "a build by many workers")
    ray = require("ray", "ray", "a build by many workers")
    ours = not ray.is_initialized()
    if ours:
        _start(ray, cluster)
    try:
        quiet()
        yield _worker(cluster, ray.cluster_resources())
    finally:
        if ours:
            ray.shutdown()


def quiet() -> None:
    """Silence Ray Data's progress bars and its log on stderr: errors that end a build are raised anyway."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    logging.getLogger("ray").setLevel(logging.ERROR)


def cause_of(error: BaseException) -> BaseException:
    """The InputError that a worker raised, if Ray wrapped one; else `error` itself.

    Ray passes on the worker's exception as the text of its traceback, whose last line it is.
    """
    messages = re.findall(r"^\s*search_r3\.errors\.InputError: (.+)$", str(error), re.MULTILINE)
    return InputError(messages[-1]) if messages else error


def _start(ray: Any, cluster: Cluster) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else its C++ parts write hints to our stderr
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address == LOCAL:  # one CPU more than workers, for Ray's own reading and writing
        settings |= {"num_cpus": cluster.workers + 1, "include_dashboard": False}
    else:
        settings |= {"address": cluster.address}
    try:
        _knock(cluster.address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lance warns about any fork; these only start programs
            ray.init(**settings)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        if "home directory" in str(error) or (isinstance(error, OSError) and error.errno in UNWRITABLE):
            raise InputError(
                f"Ray cannot write its files ({str(error).splitlines()[0][:200]}); set HOME and RAY_TMPDIR to folders "
                "that you may write to"
            ) from error
        raise InputError(
            f"no Ray cluster answers at {cluster.address} ({str(error).splitlines()[0][:200]}); start one (ray start "
            "--head), give its address, or use --ray local"
        ) from error


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT, where Ray would try for many minutes. Other addresses pass."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_SECONDS).close()


def _worker(cluster: Cluster, resources: dict[str, float]) -> dict[str, Any]:
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    each = (1.0 if gpus else 0.0) if cluster.gpus_per_worker is None else cluster.gpus_per_worker
    if cpus < cluster.workers + 1 or gpus < each * cluster.workers:
        raise InputError(
            f"the Ray cluster ({cluster.address}) has {cpus:g} CPUs and {gpus:g} GPUs, but {cluster.workers} workers "
            f"need {cluster.workers + 1} CPUs and {each * cluster.workers:g} GPUs; lower --workers"
        )
    return {"num_cpus": 1.0, "num_gpus": each}
