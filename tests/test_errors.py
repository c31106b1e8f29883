"""What is told of an error that another library raised."""

from __future__ import annotations

import pytest

from vtwcli.errors import first_line, typed_line


@pytest.mark.parametrize(
    "text, expected",
    [
        ("\n  one \ntwo", "one"),
        ("a list:\n\n  - first\n  - second", "a list: - first"),
        ("a colon and no more:", "a colon and no more:"),
        ("", "OSError"),
        (" \n ", "OSError"),
    ],
)
def test_the_first_line(text, expected):
    assert first_line(OSError(text)) == expected
    assert typed_line(OSError(text)) == (expected if expected == "OSError" else f"OSError: {expected}")
