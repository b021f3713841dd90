"""A bar is drawn where it is asked for, on standard error; elsewhere nothing is written."""

from __future__ import annotations

import pytest

from search_r3.progress import progress_bar


def test_a_bar_counts_on_standard_error(capsys: pytest.CaptureFixture[str]):
    with progress_bar("encoding", 3, show=True) as advance:
        for _ in range(3):
            advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "encoding" in err
    assert "3/3" in err


def test_without_a_terminal_nothing_is_written(capsys: pytest.CaptureFixture[str]):
    with progress_bar("encoding", 3) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")
