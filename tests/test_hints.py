"""A near name is offered, a far one is not."""

from __future__ import annotations

from search_r3.hints import did_you_mean, nearest


def test_the_nearest_name_is_offered():
    assert did_you_mean("scifat", ["cosqa", "scifact", "scidocs"]) == "did you mean 'scifact'? "


def test_nothing_is_offered_where_nothing_is_near():
    assert did_you_mean("zzz", ["cosqa", "scifact"]) == ""
    assert nearest("scifat", ["scifact"], cutoff=0.99) is None


def test_a_name_of_another_type_is_compared_as_text():
    assert nearest(None, ["none"], cutoff=0.5) == "none"
