"""Text that comes from data, models and files, made fit to be shown: it says what it says and does nothing.

``visible`` is for whatever is written for people. The other functions put text into Markdown.
"""

from __future__ import annotations

import re

# control characters but tab and line feed, marks that turn or hide text, line and paragraph separators, surrogates
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Text in which what a terminal or a page would obey is spelled out, as in JSON: ``\\u001b``."""
    return _HIDDEN.sub(lambda found: escaped(found.group()), text)


def escaped(character: str) -> str:
    """A character as ``\\uXXXX``, beyond U+FFFF as two of them."""
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{int.from_bytes(units[i : i + 2], 'big'):04x}" for i in range(0, len(units), 2))


def fitting(text: str, encoding: str | None) -> str:
    """Visible text with what an encoding lacks spelled out."""
    text = visible(text)
    try:
        text.encode(encoding or "utf-8")
        return text
    except UnicodeEncodeError as error:
        return "".join(one if _in(one, error.encoding) else escaped(one) for one in text)


def _in(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
        return True
    except UnicodeEncodeError:
        return False


def one_line(text: str, most: int | None = None) -> str:
    """Visible text with blanks in place of line ends and tabs, and at most about ``most`` characters of it."""
    if most is not None and len(text) > most:
        text = f"{text[: most // 2]}... ({len(text) - most:,} characters) ...{text[-(most // 2) :]}"
    return visible(re.sub(r"\s*[\n\r\t\v\f]\s*", " ", text))


# --- Markdown ----------------------------------------------------------------------------------------------


def markdown(text: str) -> str:
    """Text for a line of Markdown, which shows it as it is: no HTML, emphasis, link, mathematics, cell or line end."""
    text = one_line(text).strip()
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    text = re.sub(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|(?<=\])\(", r"\\\g<0>", text)
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"(?i)(?<=:)//|(?<=\bwww)\.", lambda found: "\\" + "\\".join(found.group()), text)


def paragraph(text: str) -> str:
    """Text for a paragraph or a list item of its own, at whose beginning it could make a heading or a list."""
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", markdown(text))
    return re.sub(r"^[#+=-]", r"\\\g<0>", text)


def code(text: str) -> str:
    """Text as a code span, for any place but a table's cell."""
    text = one_line(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text[:1] in ("`", " ", "") or text[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def code_block(text: str, language: str) -> str:
    """Lines of code that nothing in them can end."""
    text = visible(text.rstrip("\n"))
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text}\n{fence}"
