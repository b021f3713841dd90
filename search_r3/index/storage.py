"""Where an index lives: a folder, or a place on object storage (`s3://bucket/name`) that LanceDB reaches by itself.

Credentials are the usual ones: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_PROFILE or the machine's role,
AWS_ENDPOINT_URL for what is not Amazon's; or LanceDB's storage options (https://docs.lancedb.com/storage/configuration).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from search_r3.errors import InputError

SCHEMES = ("s3", "gs", "az")
PATIENCE = {"connect_timeout": "5s", "client_max_retries": "3"}
"""How long an endpoint that does not answer is tried, unless the options say otherwise; LanceDB's limit is minutes."""


class Remote(str):
    """A place on object storage: the URI as a string, with LanceDB's storage options beside it.

    What the options lack is taken from the environment. They are never printed: they may hold secrets.

    Args:
        uri: "s3://bucket/name" ("gs://" and "az://" are LanceDB's too; only S3 is tested here).

    Raises:
        InputError: another kind of URI, or one without a bucket and a name.
    """

    __slots__ = ("options",)
    options: dict[str, str]

    def __new__(cls, uri: str, options: Mapping[str, str] | None = None) -> Remote:
        scheme, _, rest = uri.partition("://")
        if scheme not in SCHEMES:
            known = ", ".join(f"{name}://" for name in SCHEMES)
            raise InputError(f"{uri}: unknown kind of storage; give a folder, or a place that begins with {known}")
        bucket, _, name = rest.partition("/")
        if not bucket or not name.strip("/"):
            raise InputError(f"{uri}: give a bucket and a name in it, as in {scheme}://bucket/name")
        place = super().__new__(cls, uri.rstrip("/"))
        place.options = PATIENCE | dict(options or {})
        return place

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (str(self), self.options)

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self.partition("://")[2].partition("/")[0]


Place = Path | Remote
"""A folder or a place on object storage."""


def place_of(path: str | Path) -> Place:
    """`path` as a folder or as a place on object storage, whichever it names.

    A URI that went through `Path` and lost a slash on the way ("s3:/bucket/name") is taken for what it was.

    Raises:
        InputError: a URI of another kind, or without a bucket and a name.
    """
    if isinstance(path, Remote):
        return path
    text = str(path)
    if isinstance(path, str) and "://" in text:
        return Remote(text)
    scheme, _, rest = text.partition(":/")
    return Remote(f"{scheme}://{rest}") if scheme in SCHEMES and rest else Path(path)


def options_of(place: Place) -> dict[str, str] | None:
    """The storage options that Lance is given for `place`; None for a folder."""
    return place.options if isinstance(place, Remote) else None


def connect(place: Place, follow: timedelta) -> Any:
    """A LanceDB connection to `place`; `follow` is how soon its tables see what other processes commit.

    Raises:
        InputError: the storage cannot be reached, or refuses.
    """
    import lancedb

    with explained(place):
        return lancedb.connect(str(place), read_consistency_interval=follow, storage_options=options_of(place))


def open_remote(place: Remote, table: str, follow: timedelta) -> Any | None:
    """The LanceDB table called `table` in `place`, or None where none was ever committed.

    Raises:
        InputError: the storage cannot be reached or refuses.
    """
    connection = connect(place, follow)
    with explained(place):
        try:
            return connection.open_table(table)
        except ValueError as error:
            if re.search(r"Table .* was not found", str(error)):
                return None
            raise


@contextmanager
def explained(place: Place) -> Iterator[None]:
    """Turn what object storage says into one line; other errors, and those of folders, pass."""
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(place, Remote) and not isinstance(error, InputError) and (line := explain(place, str(error))):
            raise InputError(line) from error
        raise


def explain(place: Remote, message: str) -> str | None:
    """One line for what object storage answered: what is wrong and what to do; None if it is nothing that we know."""
    found = re.search(r"uri: Some\((https?://[^/)]+)", message)
    where = found[1] if found else "the endpoint"
    if "NoSuchBucket" in message or "specified bucket does not exist" in message:
        return f"{place}: there is no bucket {place.bucket}; check the name, or make the bucket first"
    if "CredentialsNotLoaded" in message or "Failed to get AWS credentials" in message:
        return f"{place}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if re.search(r"status: 40[13]\b|AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken", message):
        return f"{place}: {where} refuses these credentials; check the keys and what they may read and write"
    if "BadScheme" in message:
        return f"{place}: {where} is plain http; set AWS_ALLOW_HTTP=true if that is meant"
    if "status: 301" in message or "PermanentRedirect" in message:
        return f"{place}: the bucket {place.bucket} is in another region; set AWS_REGION to it"
    if re.search(r"ConnectError|kind: (Connect|Timeout)|dns error|timed out|Connection refused", message):
        return f"{place}: {where} cannot be reached; check AWS_ENDPOINT_URL and the network"
    return None


def brief(error: BaseException) -> str:
    """LanceDB's message without its places in Rust sources and its repeated prefixes."""
    text = re.sub(r",? ?/\S+\.rs:\d+:\d+", "", str(error).split("\n")[0])
    return re.sub(r"^(Invalid input, |lance error: )+", "", text).strip().rstrip(".")[:300]
