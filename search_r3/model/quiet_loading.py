"""Silences the progress bars, log lines and deprecation warnings of transformers and PEFT while a model is loaded.

The user's settings are restored afterwards.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_lock = threading.Lock()
_inside = 0
_undo = ExitStack()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context in which loading is silent; errors are still raised. Download outside of it, so that progress is shown.

    The settings are global, so if several threads are inside, the first changes them and the last restores them.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _undo.enter_context(_quiet())
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _undo.close()


@contextmanager
def _quiet() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    verbosity, bars, hub_bars = (
        logging.get_verbosity(), logging.is_progress_bar_enabled(), not are_progress_bars_disabled(),
    )  # fmt: skip
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        (enable_progress_bars if hub_bars else disable_progress_bars)()
