"""A manual page's roff source (man(7)) as plain sections; supports the few requests that man pages use.

It is not a formatter: fonts are removed, paragraphs become lines, examples keep their lines, and tables and macro
    definitions are skipped.
"""

from __future__ import annotations

import re

_ESCAPES = {
    "-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "|": "", "^": "", "&": "", "/": "", ",": "",
    ")": "", "%": "", ":": "", "c": "", "'": "'", "`": "`", "t": "\t", "d": "", "u": "", ".": ".",
}  # fmt: skip
_NAMED = {
    "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "bu": "•", "em": "—", "en": "–", "co": "©",
    "rs": "\\", "ti": "~", "ha": "^", "ga": "`", "mu": "×", "<=": "≤", ">=": "≥", "->": "→", "+-": "±", "de": "°",
    "at": "@", "sh": "#", "Do": "$", "ss": "ß", "12": "½", "14": "¼", "aa": "´", "hy": "-", "mi": "-", "Tm": "",
    "R": "®", "if": "∞", "==": "≡", "!=": "≠", "sr": "√", "*p": "π", "ua": "↑", "da": "↓", "or": "|", "ba": "|",
}  # fmt: skip
_ESCAPE = re.compile(
    r"""\\(?:f(?:\[[^\]]*\]|\(..|.) | s[-+]?(?:\d+|\[[^\]]*\]|'[^']*') | [mFk](?:\[[^\]]*\]|\(..|.)
        | \*(?:\[(?P<string>[^\]]*)\]|\((?P<short>..)|(?P<shortest>.)) | \[(?P<long>[^\]]*)\] | \((?P<two>..)
        | [hvwlLoDbAXZNRH]'[^']*' | n(?:\[[^\]]*\]|\(..|[-+]?.) | "[^\n]* | \#[^\n]* | (?P<one>.))""",
    re.VERBOSE,
)
_FONTS = re.compile(r"[BIR]{1,2}|SM|SB")
_PARAGRAPHS = re.compile("PP|P|LP|TP|IP|HP|TQ|RS|RE|sp|br|in|ti|UR|UE|MT|ME|SY|YS|OP")
_UNTIL = {"de": "..", "de1": "..", "am": "..", "ig": "..", "TS": ".TE", "EQ": ".EN", "PS": ".PE"}


def plain_sections(source: str) -> list[tuple[str, str]]:
    """(heading, text) of each section and subsection, in order; text before the first heading is skipped."""
    sections: list[tuple[str, list[str]]] = []
    verbatim = False
    until: str | None = None
    heading_next = False
    for line in re.sub(r"(?<!\\)\\\n", "", source).splitlines():
        request, arguments = _request(line)
        if until is not None:
            if line.rstrip() == until:
                until = None
        elif request in _UNTIL:
            until = _UNTIL[request]
        elif request in ("SH", "SS"):
            verbatim = False
            heading_next = not arguments
            if arguments:
                sections.append((_squeeze(unescape(" ".join(arguments))), []))
        elif heading_next and request is None:
            sections.append((_squeeze(unescape(line)), []))
            heading_next = False
        elif sections:
            verbatim = _body(request, arguments, line, sections[-1][1], verbatim)
    return [(heading, _join("".join(parts))) for heading, parts in sections]


def unescape(text: str) -> str:
    r"""Text without its escapes: `\fBname\fP` is name, `\-` is -, `\(bu` is a bullet."""

    def replaced(match: re.Match[str]) -> str:
        name = match["long"] or match["two"]
        if name:
            if re.fullmatch(r"u[0-9A-F]{4,5}", name):
                return chr(int(name[1:], 16))
            return _NAMED.get(name, "")
        if match["string"] or match["short"] or match["shortest"]:
            return _NAMED.get(match["string"] or match["short"] or match["shortest"], "")
        return _ESCAPES.get(match["one"], match["one"]) if match["one"] else ""

    return _ESCAPE.sub(replaced, text)


def _body(request: str | None, arguments: list[str], line: str, parts: list[str], verbatim: bool) -> bool:
    """Add a line's text to a section's parts; returns whether the following lines are verbatim."""
    end = "\n" if verbatim else " "
    if request is None:
        parts.append((unescape(line) + end) if line.strip() else "\n\n")
    elif request in ("EX", "nf"):
        parts.append("\n\n\v")
        return True
    elif request in ("EE", "fi"):
        parts.append("\v\n\n")
        return False
    elif _FONTS.fullmatch(request):
        glue = " " if request in ("B", "I", "R", "SM", "SB") else ""
        parts.append(unescape(glue.join(arguments)) + end)
    elif request == "IP" and arguments:
        parts.append("\n\n" + unescape(arguments[0]) + " ")
    elif _PARAGRAPHS.fullmatch(request) and not verbatim:
        parts.append("\n\n")
    return verbatim


def _request(line: str) -> tuple[str | None, list[str]]:
    r"""("BR", ["pipe", "(2)"]) of `.BR pipe (2)`; ("", []) of a comment; (None, []) of text."""
    if not line.startswith((".", "'")):
        return None, []
    match = re.match(r"[.']\s*([A-Za-z]\w*)\s*(.*)", line)
    if not match:
        return "", []
    rest = re.sub(r'\\["#].*', "", match[2])
    found = re.findall(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s"])(?:\\.|\S)*)', rest)
    return match[1], [plain or quoted.replace('""', '"') for quoted, plain in found]


def _join(text: str) -> str:
    """Paragraphs as lines; lines between two \\v are verbatim."""
    lines: list[str] = []
    for number, block in enumerate(text.split("\v")):
        if number % 2:
            lines.append(block.strip("\n").rstrip())
        else:
            lines += [_squeeze(paragraph) for paragraph in block.split("\n\n")]
    return "\n".join(line for line in lines if line.strip())


def _squeeze(text: str) -> str:
    return " ".join(text.split())
