"""The ``vtw`` command: its subcommands in the order of the help page, and what a failure looks like."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer

from vtwcli import __version__
from vtwcli.errors import NotFoundError, VtwError
from vtwcli.io import console
from vtwcli.machine import libraries, threads

_WRONG_USE = typer.BadParameter.__mro__[1]  # what typer raises for options that it cannot read
_SIGNALS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

# subcommand -> its file in ``vtwcli.commands``, in the order of the help page
COMMANDS = {
    "demo": "demo",
    "calibrate": "calibrate",
    "analyze": "analyze",
    "budget": "budget",
    "eval": "evaluate",
    "export": "export",
    "verify": "verify",
    "run": "run",
    "recipe": "recipe",
    "families": "families",
    "methods": "methods",
    "docs": "docs",
    "env": "env",
}


def build(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """The command line with these subcommands; only their files are imported."""
    app = typer.Typer(
        name="vtw",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
        help="Find the layer from which a multimodal LLM no longer needs its visual tokens, and ship it without them.",
        epilog="Start here:  vtw calibrate demo",
    )
    app.callback()(_options)
    for name in names:
        module = import_module(f"vtwcli.commands.{COMMANDS[name]}")
        if name == "recipe":
            app.add_typer(module.app, name=name)
        else:
            app.command(name, epilog=module.EXAMPLES)(module.command)
    return app


def main() -> None:
    """Run the command line; every expected failure is one line on stderr and its exit code."""
    console.prepare_streams()
    console.settings.kept = None
    threads.settings.by_size = True
    libraries.quiet_imports()
    stopped = _stop_cleanly()
    try:
        # one subcommand is not to wait for the others
        app = build([name for name in sys.argv[1:2] if name in COMMANDS] or COMMANDS)
        # what is imported here lives to the end: a tenth of a help page went into looking it over
        gc.freeze()
        code = app(standalone_mode=False)  # what is wrong with the options is told like everything else
        sys.exit(code if isinstance(code, int) else 0)
    except SystemExit as ended:
        if stopped:
            _tell_stopped(stopped[0])
        if not ended.code and console.settings.unwritten is not None:
            _end_unwritten(console.settings.unwritten)
        raise
    except (Exception, KeyboardInterrupt) as error:
        # a library's own tidying may fail under the signal and put its error in the signal's place
        if stopped or isinstance(error, KeyboardInterrupt):
            number = stopped[0] if stopped else signal.SIGINT
            _tell_stopped(number)
            sys.exit(128 + number)
        if isinstance(error, _WRONG_USE):
            _tell_wrong_use(error)
            sys.exit(2)
        if isinstance(error, VtwError):
            console.error(error.message, error.hint)
            sys.exit(error.exit_code)
        if isinstance(error, OSError) and error.filename is None and _is_full():
            console.lose_stdout(error)  # help pages are not printed by this package
            _end_unwritten(error)
        if console.settings.verbose:
            console.trace(error)
            sys.exit(1)
        name = type(error).__name__
        if _from_the_model(error):
            console.error(
                f"transformers cannot run this model: {name}: {' '.join(str(error).split())}",
                "its config.json, generation_config.json, tokenizer or processor files do not go together; "
                "--verbose shows where",
            )
            sys.exit(NotFoundError.exit_code)
        console.error(f"unexpected failure: {name}: {' '.join(str(error).split())}", "--verbose shows where")
        sys.exit(1)


def _tell_stopped(number: int) -> None:
    """Say that a signal ended the work, what is left of it, and how to go on."""
    kept = console.settings.kept
    console.note(_SIGNALS[number] + (f"; {kept()}" if kept is not None else ""))


def _tell_wrong_use(error: Any) -> None:
    """Options that typer refuses, in one line as every other error."""
    context, parameter = error.ctx, getattr(error, "param", None)
    said, name = error.format_message().rstrip("."), ""
    if not said:  # no arguments at all: the help page is shown already
        return
    if isinstance(error, typer.BadParameter) and parameter is not None and error.message:
        said, name = error.message.rstrip("."), f"{parameter.opts[0]}: "
    console.error(
        f"{name}{said[:1].lower()}{said[1:]}",
        None if context is None else f"{context.command_path} --help shows what there is",
    )


def _end_unwritten(error: OSError) -> NoReturn:
    console.error(
        f"cannot write to stdout: {error.strerror or error}", "files that were asked for are complete"
    )
    sys.exit(1)


def _is_full() -> bool:
    """Whether stdout takes no more."""
    try:
        sys.stdout.write(" ")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _from_the_model(error: BaseException) -> bool:
    """Whether transformers raised an error in running a model, whose files say how it is run."""
    if not isinstance(
        error, (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
    ):
        return False
    trace = error.__traceback__
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__", "")).startswith("transformers."):
            return True
        trace = trace.tb_next
    return False


def _stop_cleanly() -> list[int]:
    """Let SIGTERM and Ctrl-C end the work as exceptions do, so that whatever is half-made is taken away.

    Returns:
        The signals that have come, filled while the work runs.
    """
    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        came.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
            signal.signal(number, stop)
    return came


def _version(value: bool) -> None:
    if value:
        console.result_text(f"vtw {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
