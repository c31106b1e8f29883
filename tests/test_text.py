"""Text from data, models and file names is shown as it is: on a terminal, in Markdown, on pages and in plots."""

from __future__ import annotations

import html
import io
import json
import os
import random
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.cli import vtw
from vtwcli.io import console, text
from vtwcli.io.files import document, write_text
from vtwcli.report import pages
from vtwcli.report.plots import new_figure, save_figure
from vtwcli.report.tables import html_table, markdown_table

NASTY = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!-- x", "&lt;", "&#60;b&#62;", "[a](javascript:x)",
    "![i](http://evil/p.png)", "[ref]: http://evil", "<http://evil>", "http://evil", "www.evil.com", "a|b", "| a |",
    "`x`", "``", "```", "~~~", "~~gone~~", "*e*", "**b**", "_e_", "__b__", "snake_case", "# H", "## ", "- x", "+ x",
    "1. x", "2) y", "> quote", "===", "---", "***", "$x^2$", "$$", "\\", "\\|", "\n", "\n\n# H\n", "\r", "\t",
    "    code", "=1+1", "é", "你好", "K=3", "95 %", " ", "!", ":", "@x", "<", ">", "&",
    "\"'", "\x1b[31m", "\u202e", "\ud800", "\0",
]  # fmt: skip


class Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.words += data


def rendered(source: str) -> Words:
    found = Words()
    found.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(source))
    return found


def nasty(seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(NASTY) for _ in range(rng.randint(1, 6)))


def said(words: str) -> str:
    return " ".join(words.split())


@pytest.mark.parametrize("words", [*NASTY, *(nasty(seed) for seed in range(400))])
def test_markdown_shows_text_as_it_is(words):
    shown = said(text.one_line(words))
    for source, tags in (
        (text.paragraph(words), ["p"] if shown else []),
        (f"- {text.paragraph(words)}", None),
        (f"## {text.markdown(words)}: x", ["h2"]),
        (markdown_table(["a", "b"], [[words, "x"]]), None),
    ):
        found = rendered(source)
        assert found.tags == tags or tags is None
        assert not {"script", "img", "a", "em", "strong", "code", "s", "h1", "hr", "blockquote"} & set(
            found.tags
        )
        assert shown in said(found.words), source
    table = rendered(markdown_table(["a", "b"], [[words, "x"]]))
    assert table.tags.count("td") == 2 and table.tags.count("tr") == 2
    if shown:
        assert said(rendered(f"x {text.code(words)} y").words) == said(f"x {shown} y")
        assert rendered(f"x {text.code(words)} y").tags == ["p", "code"]
    block = rendered(text.code_block(words, "yaml"))
    assert block.tags == ["pre", "code"] and said(block.words) == said(text.visible(words))


def test_bare_addresses_are_no_links_on_the_hub_and_elsewhere():
    """These make links of bare addresses."""
    for words in ("http://evil.com", "https://evil.com", "www.evil.com", "WWW.evil.com"):
        assert not re.search(r"(?i)://|www\.", text.markdown(words))


def test_usual_names_stay_readable():
    for words in ("llava-hf/llava-1.5-7b-hf", "scienceqa_img", "K=3", "-0.003", "1.5e-3", "50.0%"):
        assert text.markdown(words) == words


def test_pages_show_text_as_it_is():
    found = Words()
    words = "".join(NASTY)
    found.feed(pages.page(words, "", [html_table(["a"], [[words]]), f"<p>{pages.text(words)}</p>"]))
    assert not {"script", "img", "b", "a"} & set(found.tags)
    assert found.words.count(text.visible(words)) == 3
    assert not re.search("[\x00-\x08\x0e-\x1f\u202e\ud800]", found.words)
    assert html.escape("<b>") in pages.text("<b>")


# --- the terminal ------------------------------------------------------------------------------------------

CONTROL = "\x1b[31mred\x1b]8;;http://evil\x07x\x9b1m\r\u202etxt.exe\u2066\x00\x7f"


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding: str = "utf-8", tty: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True, newline="")
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty

    @property
    def shown(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def streams(request, monkeypatch):
    def install():  # within the test, where pytest has put its own in place
        out, err = Terminal(tty=request.param), Terminal(tty=request.param)
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stderr", err)
        for name, value in (("TERM", "xterm"), ("COLUMNS", "400")):
            monkeypatch.setenv(name, value)
        return out, err

    return install


def without_style(shown: str) -> str:
    """Without what rich itself writes: colours, and the moves of a bar."""
    return re.sub(r"\x1b\[[0-9;]*[mAK]|\x1b\[\?25[lh]|\x1b\[2K|\r", "", shown)


def test_control_characters_never_reach_the_terminal(streams):
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    streams = streams()
    table = Table(box=None)
    table.add_column(f"h{CONTROL}")
    table.add_row(CONTROL + "[bold]x[/bold][/]", style="bold green")
    console.result(Group(table, Text(CONTROL)))
    console.result(CONTROL + "[/]:smile:")
    console.result_text(CONTROL)
    for say in (console.note, console.warn, console.error):
        say(CONTROL + "[/] [link=http://evil]x[/link]")
    console.error("x", CONTROL)
    with console.progress(CONTROL + "[/]", 2) as task:
        task.update(CONTROL + "[red]")
        task.advance()
    console.trace(ValueError(CONTROL))
    for shown in (without_style(stream.shown) for stream in streams):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", shown), repr(shown)
        assert "\\u001b[31mred" in shown and "\\u202etxt.exe" in shown
    out, err = (without_style(stream.shown) for stream in streams)
    assert "[bold]x[/bold][/]" in out and ":smile:" in out
    assert "[link=http://evil]x[/link]" in err


def test_json_stays_the_same_document(streams):
    streams = streams()
    value = {"a": CONTROL + '\ud800 \U000e0041 你好 \\ " \b', "\x1b": [1]}
    console.result_text(document(value))
    shown = streams[0].shown
    assert json.loads(shown) == value
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_narrow_stdout_takes_everything(monkeypatch, encoding):
    from rich.table import Table

    out = Terminal(encoding, tty=False)
    monkeypatch.setattr("sys.stdout", out)
    value = {"a": "é 你好 ‖ 😀 \ud800"}
    console.result_text(document(value))
    assert json.loads(out.shown) == value
    table = Table(box=None)
    table.add_row("█ 你好")
    console.result(table)
    assert "\\u4f60\\u597d" in out.shown


def test_a_message_is_one_line_and_not_a_megabyte(capsys):
    console.error("a\nb" + "x" * 1_000_000, "c\r\nd")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: a bx") and len(lines[0]) < 2500
    assert lines[1] == "  c d"


def test_files_take_lone_surrogates(tmp_path):
    write_text(tmp_path / "a.json", document({"a": "\ud800"}))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": "\ud800"}
    write_text(tmp_path / "a.md", "x \udcff")
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == "x \\udcff"


@pytest.mark.parametrize(
    "args",
    [
        ["calibrate", "\udcff"],
        ["calibrate", os.fsdecode(b"\xff\x1b[31m")],
        ["calibrate", "demo", "--data", os.fsdecode(b"\xff.jsonl")],
        ["calibrate", "demo", "--set", "calibrate.policy=\udcff"],
        ["eval", "demo", "--schedule", "\udcff.yaml"],
        ["run", "\udcff.yaml"],
        ["recipe", "check", "\udcff\x1b[31m.yaml"],
        ["verify", "\udcff"],
        ["export", "\udcff", "--layer", "1", "--output", "\udcff"],
    ],
    ids=ascii,
)
def test_lone_surrogates_in_options_are_told(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = vtw(*args)
    assert done.code in (2, 4) and done.err.startswith("error: "), done
    assert "unexpected" not in done.err and not re.search("[\x1b\ud800-\udfff]", done.err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "key", ["model", "output", "schedule: {file", "data: [{source", "eval: {baseline", "gqa"]
)
@pytest.mark.parametrize("words", [r"\ud800", r"\0", r"a\udc00b"])
def test_text_in_a_recipe_that_no_name_can_hold_is_refused(tmp_path, key, words):
    close = "}]" if "[" in key else "}" if "{" in key else ""
    (tmp_path / "r.yaml").write_text(f'{key}: "{words}"{close}\n')
    done = vtw("run", tmp_path / "r.yaml", "--dry-run")
    assert done.code == 2 and "r.yaml:1:" in done.err and "unexpected" not in done.err, done


# --- plots -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
@pytest.mark.parametrize(
    "words", ["$x^2$", "$\\frac{$", "$", "\\$x\\$", "你好 \U0001fae0", CONTROL, "a\nb", "x" * 5000]
)
def test_plots_draw_text_as_it_is(tmp_path, words, suffix, recwarn):
    figure, axis = new_figure()
    axis.plot([1, 2], [1e-4, 1], label=f"l{words}")
    axis.set_yscale("log")
    axis.set_title(words, loc="left")
    axis.annotate(words, (1, 1e-3))
    axis.text(1.5, 0.1, words)
    axis.set_ylabel(words)
    axis.legend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / f"plot{suffix}")
    assert (tmp_path / f"plot{suffix}").stat().st_size > 1000
    drawn = axis.get_title(loc="left")
    assert "\n" not in drawn and len(drawn) <= 100
    if words.startswith(("$", "\\")):
        assert drawn == words
    if "你" in words:
        assert drawn == "<U+4F60><U+597D> <U+1FAE0>"
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert any("10^{" in label for label in labels)  # those are matplotlib's own


# --- whole commands ----------------------------------------------------------------------------------------

TASKS = ["<script>alert('t')</script>", "a|b\n# X", "$\\frac{$ 你好", "[/]\x1b[31m\u202e"]


@pytest.fixture
def strange(tmp_path):
    from PIL import Image

    rows = []
    for number, task in enumerate(TASKS):
        Image.new("RGB", (24, 24), (50 * number, 0, 90)).save(tmp_path / f"{number}.png")
        words = f"{task.encode('utf-8', 'replace').decode()} [a](javascript:x)"
        rows.append({"image": f"{number}.png", "question": words, "answer": words, "task": task})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


@pytest.mark.filterwarnings("error:Glyph")
def test_commands_on_strange_data(strange, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    few = ["--data", strange, "--limit", "1"]
    for args in (
        ["eval", "demo", *few, "--layer", "3", "--no-timing", "--bootstrap", "0", "--output", "e.json"],
        ["calibrate", "demo", *few, "--eta", "100", "--bootstrap", "0", "--output", "c.json"],
        ["analyze", "demo", *few, "--output", "a.json"],
        ["export", "demo", "--calibration", "c.json", "--output", "out"],
    ):
        done = vtw(*args)
        assert done.code == 0, done
        assert not re.search("[\x1b\u202e\ud800]", done.out + done.err)
        assert "arning" not in done.err + capfd.readouterr().err
    assert json.loads(Path("e.json").read_text(encoding="utf-8"))["tasks"].keys() == set(TASKS)
    for name in ("e.html", "a.html"):
        found = Words()
        found.feed(Path(name).read_text(encoding="utf-8"))
        assert "script" not in found.tags and "<script>alert('t')" in found.words
    for name in ("e.md", "out/README.md"):
        source = Path(name).read_text(encoding="utf-8")
        found = rendered(re.sub(r"\A---\n.*?\n---\n", "", source, flags=re.S))
        assert "<script>alert('t')" in found.words and not {"script", "em", "a"} & set(found.tags)
        assert not re.search("[\x1b\u202e\ud800]", source)


def test_a_card_cannot_be_broken_out_of(tmp_path, tiny_dir):
    """Front matter, name and licence of the base model are somebody else's text."""
    import shutil

    from ruamel.yaml import YAML

    from vtwcli.export.hf.export import export_hf
    from vtwcli.schedule.schedule import Schedule

    base = Path(shutil.copytree(tiny_dir, tmp_path / "ba`se <b>"))
    base.joinpath("README.md").write_text(
        '---\nlicense: "mit\\n---\\n# <script>alert(1)</script>"\nlicense_name: "a`b|c\\n# X"\n'
        "language: &a [*a]\n---\n"
    )
    schedule = Schedule.withdraw_at(3, note="```\n# <img src=x>\n```", more="---\n# X")
    export_hf(str(base), schedule, tmp_path / 'na"me\n# <i>')
    [card] = tmp_path.glob("na*/README.md")
    source = card.read_text()
    head, body = re.match(r"---\n(.*?)\n---\n(.*)", source, flags=re.S).groups()
    data = YAML(typ="safe", pure=True).load(head)
    assert set(data) <= {"library_name", "pipeline_tag", "tags", "license", "license_name"}
    found = rendered(body)
    assert not {"script", "img", "i", "b", "h1"} & set(found.tags[1:])
    assert found.tags[0] == "h1" and found.tags.count("h2") == len(re.findall(r"^## ", body, flags=re.M))
