"""Runs the command line in this process."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from typing import NamedTuple
from unittest.mock import patch

from vtwcli import cli
from vtwcli.io import console


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def vtw(*args: object) -> Done:
    """Run ``vtw ARGS`` through its entry point; gives exit code, stdout and stderr, as text without colour."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    settings = vars(console.settings).copy()
    code = 0
    try:
        with (
            patch.object(sys, "argv", ["vtw", *map(str, args)]),
            patch("gc.freeze"),  # this process lives on
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        vars(console.settings).clear()
        vars(console.settings).update(settings)
    return Done(code, out.getvalue(), err.getvalue())
