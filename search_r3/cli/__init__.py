"""The command line. Errors in the user's input become one line on stderr with exit code 2; bugs keep their
traceback."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from search_r3.cli.commands import app
from search_r3.cli.process import collect_garbage_rarely, keep_freed_memory, quiet_lost_connections
from search_r3.errors import InputError
from search_r3.files import allow_no_temporary_folder, disk_is_full, no_temporary_folder

EXIT_INPUT, EXIT_INTERRUPTED, EXIT_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (by default the process's arguments) and return the exit code; errors that the
    user can fix are printed without a traceback."""
    keep_freed_memory()
    quiet_lost_connections()
    allow_no_temporary_folder()
    collect_garbage_rarely()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 must not stop a search
    arguments = list(sys.argv[1:] if argv is None else argv)
    click_error = typer.BadParameter.__mro__[2]  # ClickException; from version 0.29, typer includes its own click
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = typer.main.get_command(app).main(arguments, prog_name="search-r3", standalone_mode=False)
            sys.stdout.flush()
        if code == EXIT_INTERRUPTED:  # how newer versions of typer report Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except InputError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; run the same command again to resume", EXIT_INTERRUPTED)
    except OSError as error:
        if error.errno == errno.EPIPE:
            # otherwise the interpreter's last flush prints an error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_PIPE
        return _fail(_explain(error))
    except Exception as error:
        if isinstance(error, click_error):
            return _fail(_usage(error, arguments))
        if type(error).__name__ == "OutOfMemoryError":
            return _fail("the GPU is out of memory: lower --batch-size, or use --device cpu")
        if disk_is_full(error):  # raised inside a library with its own error types, such as LanceDB
            return _fail(_explain(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        raise


def _fail(message: str, code: int = EXIT_INPUT) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage(error: Any, arguments: Sequence[str]) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "search-r3"
    message = f"{error.format_message().rstrip('.')} (see {command} --help)"
    text = _dashed_text(message, arguments)
    takes_text = context is not None and any(p.param_type_name == "argument" for p in context.command.params)
    if text is None or not takes_text:
        return message
    return f"{message}; put text that begins with a dash after --: {command} ... -- {shlex.quote(text)}"


def _dashed_text(message: str, arguments: Sequence[str]) -> str | None:
    """The argument that was parsed as an option but may be text: it contains white space, or is an unknown -letter."""
    if "--" in arguments:
        return None
    dashed = [word for word in arguments if word.startswith("-") and word != "-"]
    spaced = [word for word in dashed if any(char.isspace() for char in word.partition("=")[0])]
    unknown = re.match(r"No such option: (-[^-\s])", message)
    short = [word for word in dashed if unknown and word.startswith("-") and not word.startswith("--")]
    return next((word for word in spaced or short if not unknown or unknown[1][1] in word), None)


def _explain(error: OSError) -> str:
    if (line := no_temporary_folder(error)) is not None:
        return line
    where = f"{error.filename}: " if error.filename else ""
    advice = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space", errno.EACCES: "correct the permissions"}
    todo = advice.get(error.errno or 0, "check the path")
    return f"{where}{(error.strerror or str(error)).lower()}; {todo} and run the same command again"


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if not issubclass(category, DeprecationWarning | FutureWarning | PendingDeprecationWarning):
        print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
