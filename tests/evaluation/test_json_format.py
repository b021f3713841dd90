"""Records are JSON that reads back as it was, with a row of values on one line."""

from __future__ import annotations

import json

from search_r3.evaluation.json_format import as_json


def test_a_field_a_line_and_a_row_on_one() -> None:
    record = {
        "name": "über",
        8: {"row": (1, 2.5, -1e-9), "ids": ['a"b', "c"], "none": [], "empty": {}},
        "of": [[1], {"a": None}],
    }
    assert as_json(record) == (
        '{\n  "name": "über",\n  "8": {\n    "row": [1, 2.5, -1e-09],\n    "ids": ["a\\"b", "c"],\n    "none": [],\n'
        '    "empty": {}\n  },\n  "of": [\n    [1],\n    {\n      "a": null\n    }\n  ]\n}\n'
    )
    assert json.loads(as_json(record)) == json.loads(json.dumps(record))
