"""Mail: one message (EML) or a box of them (MBOX), read with Python's `email`, which knows their encodings (RFC 5322).

A message is a document titled with its subject; who wrote it to whom, and when, is metadata. Attachments are named, not
read.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from search_r3.index.readers.document_reader import DocumentReader, SourceFile, UnreadableFile
from search_r3.index.readers.html_reader import read_html
from search_r3.index.source_document import Scalar, SourceDocument

if TYPE_CHECKING:
    from email.message import EmailMessage, Message

# A line "From " with a time begins a message where an empty line stands above it (RFC 4155); in a message it is written
# ">From ".
START = re.compile(rb"(?:\A|(?<=\n\n)|(?<=\r\n\r\n))From [^\r\n]*\d\d:\d\d[^\r\n]*\r?\n")
QUOTED_START = re.compile(rb"^>(>*From )", re.MULTILINE)
HEADERS = ("from", "to", "cc")
CONTROL = [chr(code) for code in range(32) if chr(code) not in "\t\n\v\f\r\x1b"]
MOST_UNKNOWN = 0.3
"""The share of a text's characters that may be control characters, or bytes that its encoding does not have."""


class MailReader(DocumentReader):
    """One message."""

    suffixes = (".eml",)
    size_factor = 5

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        document = _document(file, file.data(), "")
        if document is None:
            raise UnreadableFile("a message without text, or not a message at all")
        yield document


class MailboxReader(DocumentReader):
    """A box of messages; each is a document whose part is made of its Message-ID, so that it stays the same."""

    suffixes = (".mbox",)
    size_factor = 50

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        data = file.data()
        starts = list(START.finditer(data))
        if not starts or data[: starts[0].start()].strip():
            raise UnreadableFile('not a mailbox: its first line is not "From " with a sender and a time')
        ends = [start.start() for start in starts[1:]] + [len(data)]
        seen: Counter[str] = Counter()
        for start, end in zip(starts, ends, strict=True):
            raw = QUOTED_START.sub(rb"\1", data[start.end() : end])
            name = _name(raw)
            seen[name] += 1
            part = name if seen[name] == 1 else f"{name}-{seen[name]}"
            if (document := _document(file, raw, part)) is not None:
                yield document


def _name(raw: bytes) -> str:
    """A short name of a message that does not depend on its place in the box."""
    found = re.search(rb"^Message-ID:\s*<([^>\s]+)>", raw, re.IGNORECASE | re.MULTILINE)
    return hashlib.sha256(found[1] if found else raw.strip()).hexdigest()[:12]


def _document(file: SourceFile, raw: bytes, part: str) -> SourceDocument | None:
    from email import message_from_bytes
    from email.policy import default

    message = message_from_bytes(raw, policy=default)
    if not any(name in message for name in ("from", "to", "date", "subject")):
        return None
    metadata: dict[str, Scalar] = {name: value for name in HEADERS if (value := _header(message, name))}
    if date := _date(message):
        metadata["date"] = date
    subject = _header(message, "subject")
    names = list(filter(None, map(_filename, message.walk())))
    text = _body(message)
    if names:
        text = f"{text}\n\nAttachments: {', '.join(names)}".strip()
    if not text and not subject:
        return None
    return file.document(text or subject, part=part, title=subject, metadata=metadata, line=0)


def _header(message: EmailMessage, name: str) -> str:
    try:
        return " ".join(str(message.get(name, "")).split())
    except (ValueError, IndexError, AttributeError, TypeError):  # headers that the standard's parser chokes on
        return ""


def _date(message: EmailMessage) -> str:
    """The date in ISO 8601, which sorts as text; "" without a valid one."""
    from email.utils import parsedate_to_datetime

    try:
        return parsedate_to_datetime(_header(message, "date")).isoformat()
    except (ValueError, TypeError, IndexError):
        return ""


def _body(message: EmailMessage) -> str:
    """The text of a message and of those that are attached to it."""
    from email.message import EmailMessage

    texts = [_own_text(message)]
    for part in message.walk():
        inner = part.get_payload(0) if part.get_content_type() == "message/rfc822" and part.is_multipart() else None
        if isinstance(inner, EmailMessage):
            texts += [_header(inner, "subject"), _own_text(inner)]
    return "\n\n".join(filter(None, texts))


def _filename(part: Message) -> str:
    try:
        return part.get_filename() or ""
    except (ValueError, IndexError, AttributeError, TypeError, LookupError):
        return ""


def _own_text(message: EmailMessage) -> str:
    """The plain text, or the HTML's text where there is no plain one."""
    try:
        part = message.get_body(("plain", "html"))
    except (KeyError, AttributeError, ValueError, TypeError):
        return ""
    data = part.get_payload(decode=True) if part is not None else None
    if part is None or not isinstance(data, bytes):
        return ""
    try:
        text = data.decode(part.get_content_charset() or "utf-8", "replace")
    except LookupError:
        text = data.decode("utf-8", "replace")
    if _is_binary(text):
        return ""
    if part.get_content_type() == "text/html":
        return read_html(text, whole=True).text
    return text.replace("\r\n", "\n").replace("\0", "").strip()


def _is_binary(text: str) -> bool:
    """Whether it is a picture or an archive whose mail program called it text: it has many bytes that are no text."""
    unknown = text.count("\ufffd") + sum(map(text.count, CONTROL))
    return unknown > MOST_UNKNOWN * len(text)
