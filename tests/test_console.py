"""Progress and words stay on stderr, plain without a terminal."""

import io

import pytest

from vtwcli.io import console


@pytest.fixture(autouse=True)
def fresh_settings():
    before = console.settings.quiet, console.settings.verbose
    yield
    console.settings.quiet, console.settings.verbose = before


def test_progress_without_a_terminal_is_sparse_lines(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.progress("layers", total=4) as task:
        for _ in range(4):
            task.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("layers: ")
    assert "s left, " in err and " GB" in err
    assert "\x1b" not in err


def test_progress_on_a_terminal_draws_a_bar_with_remaining_time(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with console.progress("layers", total=3) as task:
        task.advance(2)
        task.update("layer 2")
    drawn = terminal.getvalue()
    assert "layer 2" in drawn
    assert "2/3" in drawn
    assert ":" in drawn  # the remaining time


def test_quiet_silences_notes_but_not_warnings(capsys):
    console.settings.quiet = True
    console.note("a note")
    console.warn("beware")
    with console.progress("work", total=1) as task:
        task.advance()
    out, err = capsys.readouterr()
    assert (out, err) == ("", "warning: beware\n")


def test_markup_in_messages_is_text(capsys):
    console.error("file [bold]x[/bold]", "hint [red]y")
    assert capsys.readouterr().err == "error: file [bold]x[/bold]\n  hint [red]y\n"


def test_words_are_printed_as_they_are(capsys):
    console.note("file.json:100:1: [bold]: :smile:")
    console.error("r.yaml:100:1: [red]x[/red]")
    assert capsys.readouterr().err == "file.json:100:1: [bold]: :smile:\nerror: r.yaml:100:1: [red]x[/red]\n"
