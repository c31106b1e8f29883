"""The commented recipe that ``vtw recipe init`` writes; its keys, defaults and words are those of ``recipe.py``."""

from __future__ import annotations

import json
import re

from pydantic.fields import FieldInfo

from vtwcli.io.outputs import RECIPE
from vtwcli.io.section import Section
from vtwcli.recipe.recipe import STEPS, Recipe

_HEAD = f"""\
{RECIPE}
# their own sections with --recipe FILE. A step ({", ".join(STEPS)}) runs when its section is
# here, be it empty. Lines behind # show the defaults. Paths are relative to this file."""

_ACTIVE = ("model", "calibrate", "eval", "gates", "export")  # the others are shown as comments


def starter(model: str = "demo") -> str:
    """A valid recipe for ``model`` that shows every option of every section with its default."""
    parts = [_HEAD]
    for name, info in Recipe.model_fields.items():
        if name == "data":
            mix = "[demo]" if model == "demo" else "[scienceqa, gqa, ocrbench, flickr30k]"
            lines = [
                f"# Where samples come from: SOURCE[:KEY=VALUE,...] as for --data, or a mapping.\ndata: {mix}"
            ]
        elif isinstance(section := info.annotation, type) and issubclass(section, Section):
            lines = [f"# {section.__doc__}", f"{name}:" if name in _ACTIVE else f"# {name}:"]
            lines += [_line(name, key, field, model) for key, field in section.model_fields.items()]
        else:
            shown = "results" if name == "output" else json.dumps(info.default)
            lines = [f"# {info.description}\n# {name}: {shown}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(section: str, key: str, field: FieldInfo, model: str) -> str:
    """One option: its default in a comment, or the value that makes the recipe useful."""
    given = {("model", "name"): _quoted(model), ("export", "format"): "hf"}.get((section, key))
    default = field.default if isinstance(field.default, str) else json.dumps(field.default)
    text = f"  {key}: {given}" if given is not None else f"  # {key}: {default}"
    return f"{text:<34}  # {field.description}"


def _quoted(text: str) -> str:
    """A YAML scalar; names of models need quotes only if they hold other signs than usual."""
    return text if re.fullmatch(r"[A-Za-z_][\w./-]*", text) else json.dumps(text, ensure_ascii=False)
