from __future__ import annotations

import pytest
import yaml

from search_r3.yaml_file import parse_yaml


@pytest.mark.parametrize(
    "text",
    [
        "2001-99-99",
        "!!int x",
        "!!int ''",
        "!!float x",
        "!!timestamp x",
        "!!bool x",
        "[" * 1200,
        "9" * 5000,
        "\0",
        "a: b: c",
    ],
)
def test_whatever_is_wrong_is_a_yaml_error(text):
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


def test_what_is_right_is_read_and_tags_run_nothing():
    assert parse_yaml("a: [1, 2.5, no, 2001-02-03]")["a"][:3] == [1, 2.5, False]
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        parse_yaml("!!python/object/apply:os.system [ls]")
