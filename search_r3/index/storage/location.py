"""Where an index is stored: in a folder, or on object storage (`s3://bucket/name`), which LanceDB accesses directly.

Credentials are the usual ones: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_PROFILE or the machine's role,
and AWS_ENDPOINT_URL for other providers; or LanceDB's storage options
(https://docs.lancedb.com/storage/configuration).

Every request has a deadline and a bounded number of retries, between which LanceDB waits longer and longer, with jitter
(object_store's `BackoffConfig`); `deadline` bounds whole operations. Tested with lancedb 0.40 against sockets that
accept and never answer: `timeout` (the whole request), `connect_timeout`, `read_timeout` (between two parts of an
answer), `client_max_retries` and `client_retry_timeout` (whole seconds, without a unit) are honored; `request_timeout`
is not. A listing is tried six times whatever the options say, so an endpoint that never answers costs six times
`read_timeout`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from search_r3.errors import InputError
from search_r3.index.storage.storage_options import check_storage_options

SCHEMES = ("s3", "gs", "az")
COLLECTION_SCHEMES = ("milvus://", "milvus+tls://")
COLLECTION_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]{0,199}")
TIMEOUT_VARIABLE = "SEARCH_R3_STORAGE_TIMEOUT"
PATIENCE = {
    "connect_timeout": "4s",
    "read_timeout": "4s",
    "timeout": "60s",
    "client_max_retries": "3",
    "client_retry_timeout": "4",
}
"""Deadlines of one request, unless the user's options or SEARCH_R3_STORAGE_TIMEOUT (seconds) override them. With these,
a search at an endpoint that never answers ends within half a minute."""
WRITING_PATIENCE = PATIENCE | {"read_timeout": "30s", "timeout": "120s"}
"""Deadlines for uploads, in which `read_timeout` also covers the time that sending takes."""
FAILED = re.compile(
    r'store: "|Generic (S3|GCS|MicrosoftAzure)|RetryError|HttpError|Error performing [A-Z]+ |LanceError\(IO\)'
)
"""Matches LanceDB's and obstore's messages for failures of the storage rather than the caller."""
SILENT = re.compile(r"kind: Timeout|TimedOut|timed out| in [1-9]\d*(\.\d+)?s - HTTP error: error sending request")
"""Matches their messages for a passed deadline; Lance reports only how long an unanswered request took."""
MISTAKE = re.compile(r"(lance error: )?(Invalid (user )?input|Query Execution error: Error applying)")
"""Matches the beginning of LanceDB's messages for mistakes of the caller, which quote arbitrary input."""
LOST = re.compile(
    r"Not found: \S*\.lance|\.lance\S*: .*[Nn]o such file|os error \d+|Object at location \S+ not found|NoSuchKey"
    r"|LanceError\(IO\)|not appear to be a Lance file|column metadata range"
)
"""Matches LanceDB's messages for missing, damaged or unreadable files."""
CONFLICT = re.compile(r"commit conflict|concurrent (writers|commit|transaction)", re.IGNORECASE)
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""The environment variables that an error suggests."""


class StorageError(InputError):
    """Object storage failed, refused or did not answer. The request was valid, so a server answers 503."""


class IndexBusy(InputError):
    """Another writer has the index locked, or committed in between. Nothing was lost; repeat the call later."""


class Remote(str):
    """A location on object storage: the URI as a string, together with LanceDB's storage options.

    Options that are not given are taken from the environment. They are never printed, as they may contain secrets.

    Args:
        uri: "s3://bucket/name" ("gs://" and "az://" are LanceDB's too; only S3 is tested here).

    Raises:
        InputError: another kind of URI, or one without a bucket and a name; or LanceDB does not know an option.
    """

    __slots__ = ("given", "options")
    given: dict[str, str]
    options: dict[str, str]

    def __new__(cls, uri: str, options: Mapping[str, str] | None = None) -> Remote:
        scheme, _, rest = uri.partition("://")
        if scheme not in SCHEMES:
            known = ", ".join(f"{name}://" for name in SCHEMES)
            raise InputError(f"{uri}: unknown kind of storage; give a folder, or a URI that begins with {known}")
        bucket, _, name = rest.partition("/")
        if not bucket or not name.strip("/"):
            raise InputError(f"{uri}: give a bucket and a name in it, as in {scheme}://bucket/name")
        location = super().__new__(cls, uri.rstrip("/"))
        location.given = dict(options or {})
        check_storage_options(location, scheme, location.given)
        location.options = _patience(PATIENCE) | location.given
        return location

    def for_writing(self) -> Remote:
        """The same location with the deadlines for uploads, `WRITING_PATIENCE`."""
        location = Remote(str(self), self.given)
        location.options = _patience(WRITING_PATIENCE) | self.given
        return location

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (str(self), self.options)

    @property
    def scheme(self) -> str:
        """ "s3", "gs" or "az"."""
        return self.partition("://")[0]

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self.partition("://")[2].partition("/")[0]


class CollectionUri(str):
    """A collection of Milvus: `milvus://HOST:PORT/NAME`, `milvus://HOST:PORT/DATABASE/NAME`, the same with
    `milvus+tls://`, or `milvus://FOLDER.db/NAME` for Milvus Lite in a folder (`milvus:///var/x.db/NAME`).

    Raises:
        InputError: there is no server or folder, or the name has other characters than letters, digits and _.
    """

    __slots__ = ("database", "name", "server")
    server: str
    """What pymilvus connects to."""
    database: str
    name: str

    def __new__(cls, uri: str) -> CollectionUri:
        scheme, _, rest = uri.partition("://")
        where, _, name = rest.rstrip("/").rpartition("/")
        if not where or not COLLECTION_NAME.fullmatch(name):
            raise InputError(
                f"{uri}: give a server and the name of a collection (letters, digits and _), as in "
                "milvus://127.0.0.1:19530/notes, or a folder for Milvus Lite, as in milvus://notes.db/notes"
            )
        location = super().__new__(cls, uri.rstrip("/"))
        location.name, location.database = name, ""
        if where.endswith(".db"):
            location.server = where
        else:
            address, _, location.database = where.partition("/")
            location.server = f"{'https' if scheme.endswith('+tls') else 'http'}://{address}"
        return location

    def __reduce__(self) -> tuple[Any, ...]:
        return CollectionUri, (str(self),)

    @property
    def is_lite(self) -> bool:
        """Whether it is in a folder of Milvus Lite."""
        return "://" not in self.server


Location = Path | Remote | CollectionUri
"""A folder, a location on object storage, or a collection of Milvus."""


def location_of(path: str | Path) -> Location:
    """`path` as a folder or as a location on object storage, whichever it names.

    A URI that lost a slash by passing through `Path` ("s3:/bucket/name") is recognized too.

    Raises:
        InputError: a URI with another scheme, or without a bucket and a name.
    """
    if isinstance(path, Remote | CollectionUri):
        return path
    text = str(path)
    if isinstance(path, str) and text.startswith(COLLECTION_SCHEMES):
        return CollectionUri(text)
    if isinstance(path, str) and "://" in text:
        return Remote(text)
    scheme, _, rest = text.partition(":/")
    return Remote(f"{scheme}://{rest}") if scheme in SCHEMES and rest else Path(path)


def for_writing(location: Location) -> Location:
    """`location` for opening an index to change it: object storage gets the deadlines for uploads."""
    return location.for_writing() if isinstance(location, Remote) else location


def _patience(defaults: dict[str, str]) -> dict[str, str]:
    """`defaults`, or what SEARCH_R3_STORAGE_TIMEOUT says instead."""
    given = os.environ.get(TIMEOUT_VARIABLE, "").strip().removesuffix("s")
    if not given:
        return defaults
    try:
        milliseconds = round(float(given) * 1000)
    except (ValueError, OverflowError):
        milliseconds = 0
    if milliseconds < 1:
        raise InputError(f"{TIMEOUT_VARIABLE} is {given!r}; give a number of seconds above 0, as in 10")
    longest = max(60_000, 4 * milliseconds)
    return defaults | {
        "connect_timeout": f"{milliseconds}ms",
        "read_timeout": f"{milliseconds}ms",
        "timeout": f"{longest}ms",
        "client_retry_timeout": str(max(1, milliseconds // 1000)),
    }


def options_of(location: Location) -> dict[str, str] | None:
    """The storage options to pass to Lance for `location`; None for a folder."""
    return location.options if isinstance(location, Remote) else None


def connect(location: Location, follow: timedelta | None, session: Any = None) -> Any:
    """A LanceDB connection to `location`.

    Args:
        follow: how soon its tables see other processes' commits; None for never.
        session: caches (`lancedb.Session`) to share with other connections.

    Raises:
        InputError: the storage cannot be reached, or refuses.
    """
    import lancedb

    with storage_errors(location):
        return lancedb.connect(
            str(location), read_consistency_interval=follow, storage_options=options_of(location), session=session
        )


def open_remote(location: Remote, table: str, follow: timedelta | None, session: Any = None) -> Any | None:
    """The LanceDB table called `table` at `location`, or None if it was never committed.

    Raises:
        InputError: the storage cannot be reached or refuses.
    """
    connection = connect(location, follow, session)
    with storage_errors(location):
        try:
            return connection.open_table(table)
        except ValueError as error:
            if re.search(r"Table .* was not found", str(error)):
                return None
            raise


@contextmanager
def storage_errors(location: Path | str) -> Iterator[None]:
    """Turn errors of object storage into StorageError or IndexBusy with a one-line message; other errors pass.

    Raises:
        StorageError: the storage failed, refused or did not answer.
        IndexBusy: another writer committed at the same moment.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not isinstance(location, Remote):
            raise
        message = str(error)
        if CONFLICT.search(message):
            raise IndexBusy(
                f"{location} was changed by another writer at the same moment; nothing is lost: run the command again"
            ) from error
        if (line := describe_failure(location, message)) is not None:
            raise StorageError(line) from error
        raise


def files_lost(error: BaseException | None) -> bool:
    """Whether files were missing or unreadable, according to LanceDB's message.

    Of an InputError only the cause counts: its own message quotes user input, such as a filter.
    """
    while error is not None:
        message = "" if isinstance(error, InputError) else str(error)
        if LOST.search(message) and not MISTAKE.match(message):
            return True
        error = error.__cause__
    return False


def failed_storage(error: BaseException) -> bool:
    """Whether `error` comes from object storage rather than from the request, such as a malformed filter."""
    message = str(error)
    return not MISTAKE.match(message) and FAILED.search(message) is not None


def describe_failure(location: Remote, message: str) -> str | None:
    """One line that says what is wrong with object storage and what to do; None for an unknown message."""
    address = re.search(r"(?:uri: Some\(|Error performing [A-Z]+ )\s*(https?://[^/)\s]+)", message)
    where = address[1] if address else "the endpoint"
    variable = "AWS_ENDPOINT_URL and the network" if location.scheme == "s3" else "the network"
    status = re.search(r"(?:status: |status code: )(\d{3})\b", message)
    code = status[1] if status else ""
    if "NoSuchBucket" in message or "specified bucket does not exist" in message:
        return f"{location}: there is no bucket {location.bucket}; check the name, or create the bucket first"
    if re.search(r"CredentialsNotLoaded|Failed to get AWS credentials|MissingAccount|169\.254\.169\.254", message):
        return f"{location}: no credentials found; set {CREDENTIALS[location.scheme]}"
    refusals = r"AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken"
    if code in ("401", "403") or re.search(refusals, message):
        return f"{location}: {where} refuses these credentials; check the keys and their read and write permissions"
    if "BadScheme" in message:
        return f"{location}: {where} is plain http; set AWS_ALLOW_HTTP=true if that is meant"
    if code == "301" or "PermanentRedirect" in message:
        return f"{location}: the bucket {location.bucket} is in another region; set AWS_REGION to it"
    if code.startswith("5") or code == "429":
        return f"{location}: {where} answers with status {code}; it is overloaded or out of order: try again later"
    if re.search(r"ConnectError|kind: Connect|dns error|Connection refused", message):
        return f"{location}: {where} cannot be reached; check {variable}"
    if SILENT.search(message):
        return f"{location}: {where} does not answer; check {variable}, or set {TIMEOUT_VARIABLE} to more seconds"
    if FAILED.search(message):
        reason = brief(message) if len(message) < 300 else "the connection broke off"
        return f"{location}: {where} failed ({reason}); check {variable}, then try again"
    return None


def brief(error: BaseException | str) -> str:
    """LanceDB's message without locations in Rust sources and repeated prefixes."""
    text = re.sub(r",? ?/\S+\.rs:\d+:\d+", "", str(error).split("\n")[0])
    return re.sub(r"^(Invalid input, |lance error: )+", "", text).strip().rstrip(".")[:300]
