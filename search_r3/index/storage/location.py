"""Where an index lives: a folder, or a place on object storage (`s3://bucket/name`) that LanceDB reaches by itself.

Credentials are the usual ones: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_PROFILE or the machine's role,
AWS_ENDPOINT_URL for what is not Amazon's; or LanceDB's storage options (https://docs.lancedb.com/storage/configuration).

Every request has a deadline and a bounded number of retries. Tried with lancedb 0.40 against sockets that accept and
never answer: `timeout` (the whole request), `connect_timeout`, `read_timeout` (between two pieces of an answer),
`client_max_retries` and `client_retry_timeout` (whole seconds, without a unit) are honored, `request_timeout` is not;
a listing is tried six times whatever the options say, so an endpoint that never answers costs six times `read_timeout`.
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

SCHEMES = ("s3", "gs", "az")
TIMEOUT_VARIABLE = "SEARCH_R3_STORAGE_TIMEOUT"
PATIENCE = {
    "connect_timeout": "4s",
    "read_timeout": "4s",
    "timeout": "60s",
    "client_max_retries": "3",
    "client_retry_timeout": "4",
}
"""Deadlines of one request, unless the user's options or SEARCH_R3_STORAGE_TIMEOUT (seconds) say otherwise. With these
a search at an endpoint that never answers ends within half a minute."""
WRITING_PATIENCE = PATIENCE | {"read_timeout": "30s", "timeout": "120s"}
"""Deadlines where files are uploaded: `read_timeout` then also covers the time that sending takes."""
FAILED = re.compile(
    r'store: "|Generic (S3|GCS|MicrosoftAzure)|RetryError|HttpError|Error performing [A-Z]+ |LanceError\(IO\)'
)
"""What LanceDB's and obstore's messages contain when the storage failed, not the caller."""
SILENT = re.compile(r"kind: Timeout|TimedOut|timed out| in [1-9]\d*(\.\d+)?s - HTTP error: error sending request")
"""What their messages contain when a deadline passed; Lance's gives only how long one request took that got none."""
MISTAKE = re.compile(r"(lance error: )?(Invalid (user )?input|Query Execution error: Error applying)")
"""How LanceDB's messages begin where the caller was wrong. They quote what was given, which may be anything."""
LOST = re.compile(
    r"Not found: \S*\.lance|\.lance\S*: .*[Nn]o such file|os error \d+|Object at location \S+ not found|NoSuchKey"
    r"|LanceError\(IO\)|not appear to be a Lance file|column metadata range"
)
"""What LanceDB's messages contain where files are gone, damaged, or cannot be read."""
CONFLICT = re.compile(r"commit conflict|concurrent (writers|commit|transaction)", re.IGNORECASE)
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""The variables that a message names."""


class StorageError(InputError):
    """Object storage failed, refused or did not answer. Nothing is wrong with the request: a server answers 503."""


class IndexBusy(InputError):
    """Another writer holds the index, or committed in between. Nothing was lost; the same call succeeds later."""


class Remote(str):
    """A place on object storage: the URI as a string, with LanceDB's storage options beside it.

    What the options lack is taken from the environment. They are never printed: they may hold secrets.

    Args:
        uri: "s3://bucket/name" ("gs://" and "az://" are LanceDB's too; only S3 is tested here).

    Raises:
        InputError: another kind of URI, or one without a bucket and a name.
    """

    __slots__ = ("given", "options")
    given: dict[str, str]
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
        place.given = dict(options or {})
        place.options = _patience(PATIENCE) | place.given
        return place

    def for_writing(self) -> Remote:
        """The same place with the deadlines of uploads, `WRITING_PATIENCE`."""
        place = Remote(str(self), self.given)
        place.options = _patience(WRITING_PATIENCE) | self.given
        return place

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


def for_writing(place: Place) -> Place:
    """`place` as it is opened to be changed: object storage with the deadlines of uploads, a folder as it is."""
    return place.for_writing() if isinstance(place, Remote) else place


def _patience(defaults: dict[str, str]) -> dict[str, str]:
    """`defaults`, with the seconds that the user's environment gives."""
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


def options_of(place: Place) -> dict[str, str] | None:
    """The storage options that Lance is given for `place`; None for a folder."""
    return place.options if isinstance(place, Remote) else None


def connect(place: Place, follow: timedelta | None, session: Any = None) -> Any:
    """A LanceDB connection to `place`; `follow` is how soon its tables see what other processes commit. Connections of
    one `session` (`lancedb.Session`) share what they have cached.

    Raises:
        InputError: the storage cannot be reached, or refuses.
    """
    import lancedb

    with explained(place):
        return lancedb.connect(
            str(place), read_consistency_interval=follow, storage_options=options_of(place), session=session
        )


def open_remote(place: Remote, table: str, follow: timedelta | None, session: Any = None) -> Any | None:
    """The LanceDB table called `table` in `place`, or None where none was ever committed.

    Raises:
        InputError: the storage cannot be reached or refuses.
    """
    connection = connect(place, follow, session)
    with explained(place):
        try:
            return connection.open_table(table)
        except ValueError as error:
            if re.search(r"Table .* was not found", str(error)):
                return None
            raise


@contextmanager
def explained(place: Path | str) -> Iterator[None]:
    """Turn what object storage says into one line; other errors, and those of folders, pass.

    Raises:
        StorageError: the storage failed, refused or did not answer.
        IndexBusy: another writer committed at the same moment.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not isinstance(place, Remote):
            raise
        message = str(error)
        if CONFLICT.search(message):
            raise IndexBusy(
                f"{place} was changed by another writer at the same moment; nothing is lost: run the same command again"
            ) from error
        if (line := explain(place, message)) is not None:
            raise StorageError(line) from error
        raise


def files_lost(error: BaseException | None) -> bool:
    """Whether files were gone or could not be read, by what LanceDB said.

    An InputError says it by its cause: its own message quotes what the user gave, such as a filter.
    """
    while error is not None:
        message = "" if isinstance(error, InputError) else str(error)
        if LOST.search(message) and not MISTAKE.match(message):
            return True
        error = error.__cause__
    return False


def failed_storage(error: BaseException) -> bool:
    """Whether `error` comes from object storage and not from what was asked, as a filter that does not parse would."""
    message = str(error)
    return not MISTAKE.match(message) and FAILED.search(message) is not None


def explain(place: Remote, message: str) -> str | None:
    """One line for what object storage answered: what is wrong and what to do; None if it is nothing that we know."""
    found = re.search(r"(?:uri: Some\(|Error performing [A-Z]+ )\s*(https?://[^/)\s]+)", message)
    where = found[1] if found else "the endpoint"
    variable = "AWS_ENDPOINT_URL and the network" if place.scheme == "s3" else "the network"
    status = re.search(r"(?:status: |status code: )(\d{3})\b", message)
    code = status[1] if status else ""
    if "NoSuchBucket" in message or "specified bucket does not exist" in message:
        return f"{place}: there is no bucket {place.bucket}; check the name, or make the bucket first"
    if re.search(r"CredentialsNotLoaded|Failed to get AWS credentials|MissingAccount|169\.254\.169\.254", message):
        return f"{place}: no credentials found; set {CREDENTIALS[place.scheme]}"
    refusals = r"AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken"
    if code in ("401", "403") or re.search(refusals, message):
        return f"{place}: {where} refuses these credentials; check the keys and what they may read and write"
    if "BadScheme" in message:
        return f"{place}: {where} is plain http; set AWS_ALLOW_HTTP=true if that is meant"
    if code == "301" or "PermanentRedirect" in message:
        return f"{place}: the bucket {place.bucket} is in another region; set AWS_REGION to it"
    if code.startswith("5") or code == "429":
        return f"{place}: {where} answers with status {code}; it is overloaded or out of order: try again later"
    if re.search(r"ConnectError|kind: Connect|dns error|Connection refused", message):
        return f"{place}: {where} cannot be reached; check {variable}"
    if SILENT.search(message):
        return f"{place}: {where} does not answer; check {variable}, or set {TIMEOUT_VARIABLE} to more seconds"
    if FAILED.search(message):
        reason = brief(message) if len(message) < 300 else "the connection broke off"
        return f"{place}: {where} failed ({reason}); check {variable}, then try again"
    return None


def brief(error: BaseException | str) -> str:
    """LanceDB's message without its places in Rust sources and its repeated prefixes."""
    text = re.sub(r",? ?/\S+\.rs:\d+:\d+", "", str(error).split("\n")[0])
    return re.sub(r"^(Invalid input, |lance error: )+", "", text).strip().rstrip(".")[:300]
