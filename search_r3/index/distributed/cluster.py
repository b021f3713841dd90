"""A Ray cluster for one build: started or joined, checked against what the workers need, and left as it was.

Ray is imported only inside functions: without it everything else works.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import tempfile
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
TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
REFUSED = re.compile(r"authenticat|InvalidAuthToken|RAY_AUTH|auth[_ ]token", re.IGNORECASE)
"""Matches Ray's messages about a missing or wrong token, which its C++ code only prints."""
FULL = re.compile(
    r"^.*(?:No space left on device|Disk quota exceeded|os error (?:28|122)\b|OutOfDiskError).*$", re.MULTILINE
)
"""Matches the line of a worker's traceback that says that a disk is full."""


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
    """The InputError that a worker raised, or one that says that its disk is full; else `error` itself.

    Ray passes on the worker's exception as the text of its traceback, whose last line it is.
    """
    text = str(error)
    if messages := re.findall(r"^\s*search_r3\.errors\.InputError: (.+)$", text, re.MULTILINE):
        return InputError(messages[-1])
    if (full := FULL.findall(text)) and (found := full[-1].strip()):
        node = re.search(r"\bip=([0-9a-fA-F.:]+)", text)
        where = f" on {node[1]}" if node else ""
        return InputError(
            f"a worker{where} has no space left on its disk ({found[:200]}); free some there, or set RAY_TMPDIR to "
            "another disk before that machine joins the cluster; nothing was committed: run the same command again"
        )
    return error


def _start(ray: Any, cluster: Cluster) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else its C++ parts write hints to our stderr
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address == LOCAL:  # one CPU more than workers, for Ray's own reading and writing
        settings |= {"num_cpus": cluster.workers + 1, "include_dashboard": False}
    else:
        settings |= {"address": cluster.address}
    printed: list[str] = []
    try:
        _knock(cluster.address)
        with warnings.catch_warnings(), _stderr_into(printed):
            warnings.simplefilter("ignore")  # Lance warns about any fork; these only start programs
            ray.init(**settings)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        if REFUSED.search("\n".join([str(error), *printed])):
            raise InputError(f"the Ray cluster at {cluster.address} wants a token, or another one; {TOKEN}") from error
        if "home directory" in str(error) or (isinstance(error, OSError) and error.errno in UNWRITABLE):
            raise InputError(
                f"Ray cannot write its files ({str(error).splitlines()[0][:200]}); set HOME and RAY_TMPDIR to folders "
                "that you may write to"
            ) from error
        raise InputError(
            f"no Ray cluster answers at {cluster.address} ({str(error).splitlines()[0][:200]}); start one (ray start "
            "--head), give its address, or use --ray local"
        ) from error


@contextmanager
def _stderr_into(lines: list[str]) -> Iterator[None]:
    """Collect what is written to the process's standard error, by C++ code too, in `lines`."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield
            finally:
                os.dup2(kept, 2)
                file.seek(0)
                lines += file.read().decode(errors="replace").splitlines()
    finally:
        os.close(kept)


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
