"""Runs the command line, in this process or in several."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
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


def launch(tmp_path, *args, processes=2, code=None):
    """Start ``processes`` gloo processes as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        env = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, *(["-c", code] if code else ["-m", "vtwcli"]), *args]
        started.append(
            subprocess.Popen(
                command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return [(process, *process.communicate(timeout=300)) for process in started]
