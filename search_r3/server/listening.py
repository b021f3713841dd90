"""The socket a server listens on: an address and a port, or a file in the file system (a unix socket)."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from search_r3.errors import InputError

BACKLOG = 2048  # uvicorn's default


@dataclass(frozen=True)
class Listening:
    """A bound socket that accepts connections, and its address: `http://HOST:PORT`, or `http+unix://PATH` with the
    path percent-encoded."""

    socket: socket.socket
    url: str
    file: tuple[Path, int] | None = None
    """A unix socket's file and its inode."""

    def close(self) -> None:
        """Close the socket and remove its file, unless another server has put its own there meanwhile."""
        self.socket.close()
        if self.file is not None:
            path, inode = self.file
            with suppress(OSError):
                if path.lstat().st_ino == inode:
                    path.unlink()


def listen(host: str, port: int) -> Listening:
    """Listen on a port. Raises InputError if the address is unknown, in use, or forbidden."""
    if not 0 <= port <= 65_535:
        raise InputError(f"port is {port}; expected 0 (any free port) to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from error
    bound.listen(BACKLOG)
    address, real_port = bound.getsockname()[:2]
    return Listening(bound, f"http://{f'[{address}]' if ':' in address else address}:{real_port}")


def listen_unix(path: Path) -> Listening:
    """Listen on a unix socket; the file that a killed server has left is replaced.

    Who may connect is decided by the permissions of the folder and the umask.

    Raises:
        InputError: another server listens there, another file is there, or the path is too long or cannot be written.
    """
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_abandoned(path)
        bound.bind(str(path))
    except OSError as error:
        bound.close()
        reason = error.strerror or str(error)
        raise InputError(f"cannot listen on {path}: {reason}; choose another --uds") from error
    bound.listen(BACKLOG)
    absolute = path.absolute()
    return Listening(bound, f"http+unix://{quote(os.fspath(absolute), safe='')}", (absolute, absolute.lstat().st_ino))


def _remove_abandoned(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InputError(f"cannot listen on {path}: it is not a socket; choose another --uds, or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise InputError(f"cannot listen on {path}: another server is listening there; choose another --uds")
