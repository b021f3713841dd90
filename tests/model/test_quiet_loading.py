"""As a library nothing is printed unless it is asked for, and the user's settings are unchanged."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import run

from search_r3.model.quiet_loading import quiet_transformers

pytestmark = pytest.mark.slow

USE = """
import sys, warnings
from search_r3 import SearchR3
model = SearchR3.from_pretrained(sys.argv[1])
model.encode_document(["a document"]); model.encode_query(["a query"], reasoning=False)
model.reason(["a query"], max_reasoning_tokens=2)
if model.source == sys.argv[2]:
    model.save_pretrained(sys.argv[3])
"""


def test_loading_encoding_and_saving_print_nothing(
    tiny_model: Path, save_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = save_adapter(tiny_model, tmp_path / "adapter")
    for number, folder in enumerate((tiny_model, adapter)):
        command = [
            sys.executable,
            "-W",
            "default",
            "-c",
            USE,
            str(folder),
            str(adapter),
            str(tmp_path / f"out{number}"),
        ]
        done = run(command)
        assert (done.stdout, done.stderr) == ("", "")


def test_what_the_user_has_set_stays(tiny_model: Path) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    from search_r3 import SearchR3

    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_info()
    try:
        SearchR3.from_pretrained(tiny_model)
        assert logging.get_verbosity() == logging.INFO
        assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == before[1:]
    finally:
        logging.set_verbosity(before[0])


def test_two_loads_that_overlap_leave_what_was_set() -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    def state() -> tuple[object, ...]:
        bars = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
        return logging.get_verbosity(), *bars, list(warnings.filters)

    before, verbosity = state(), logging.get_verbosity()
    logging.set_verbosity_info()
    set_by_the_user = state()
    first, second = quiet_transformers(), quiet_transformers()
    try:
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert logging.get_verbosity() == logging.ERROR  # the second still loads
        second.__exit__(None, None, None)
        assert state() == set_by_the_user
    finally:
        logging.set_verbosity(verbosity)
    assert state() == before
