"""What the subcommands may be told: flags made from the recipe's fields, and those that only commands have.

A command takes ``**given``, every flag's value by name, and ``@flags(...)`` gives it the signature that typer reads. A
field's flag is None unless it was given: the one default lives in ``vtwcli.recipe.recipe``, and the help pages read it
from there. Nothing heavy is imported: ``vtw --help`` must answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import Parameter, Signature
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args

import typer

from vtwcli.io.section import Section
from vtwcli.methods.visipruner import Rule
from vtwcli.recipe.recipe import GatesSection, ModelSection, ScheduleSection
from vtwcli.recipe.search import SearchSection

# where flags stand on a help page: those of a section, and fields of others by name
_PANELS: dict[type[Section] | str, str] = {
    ModelSection: "Model",
    ScheduleSection: "Method",
    GatesSection: "Gates",
    SearchSection: "Search",
    "limit": "Data",
    "skip_bad": "Data",
    "baseline": "Model",
    "backend": "Model",
    "opset": "ONNX",
    "merged": "ONNX",
    "quantize": "ONNX",
}
# how a list is given
_METAVARS = {
    "map_layers": "LAYER,...",
    "methods": "NAME,NAME,...",
    "ratios": "R,R,...",
    "thresholds": "T,T,...",
    "timing_batch": "B,B,...",
}


def flags(*groups: Parameter | Iterable[Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes ``**given`` these flags, in the order of its help page."""
    found = [one for group in groups for one in ([group] if isinstance(group, Parameter) else group)]

    def typed(command: Callable[..., None]) -> Callable[..., None]:
        command.__signature__ = Signature(found)  # type: ignore[attr-defined]
        return command

    return typed


def flag(
    name: str,
    kind: Any,
    help: str,
    *short: str,
    spelled: str | None = None,
    panel: str | None = None,
    **extra: Any,
) -> Parameter:
    """A flag that no section of the recipe has; a ``bool`` is False unless given, others are None or ``default``.

    Args:
        name: under which the command finds the value.
        kind: type of the value; a list may be given several times.
        short: further spellings, ``-o``.
        spelled: what is typed, where it is not the name.
        panel: box of the help page.
        extra: what else ``typer.Option`` takes, and ``default``.
    """
    default = extra.pop("default", False if kind is bool else None)
    option = typer.Option(spelled or _spelled(name), *short, help=help, rich_help_panel=panel, **extra)
    return _parameter(name, kind if default is not None else kind | None, option, default)


def argument(name: str, kind: Any, metavar: str, help: str, default: Any = Parameter.empty) -> Parameter:
    """What is given by its place; it may be left out only where it has a default, be it None."""
    info = typer.Argument(metavar=metavar, help=help, show_default=default is not None)
    return _parameter(name, kind | None if default is None else kind, info, default)


def fields(section: type[Section], *names: str, without: Iterable[str] = ()) -> list[Parameter]:
    """The flags of a section's fields, of these or of all but some; type, help and shown default are the field's."""
    return [_field(section, name) for name in names or section.model_fields if name not in without]


def _field(section: type[Section], name: str) -> Parameter:
    info = section.model_fields[name]
    text, default = info.description or "", info.default
    kinds = get_args(info.annotation) if isinstance(info.annotation, UnionType) else (info.annotation,)
    kind = next((one for one in (bool, int, float) if one in kinds), str)  # the section checks the rest
    if default is not None and default is not False:
        if isinstance(default, tuple):  # written as it is given
            default = ",".join(map(str, default))
        text += f" [dim]\\[default: {default}][/dim]"
    option = typer.Option(
        _spelled(name, two_ways=kind is bool and info.default is not False),
        help=text,
        show_default=False,
        metavar=_METAVARS.get(name),
        rich_help_panel=_PANELS.get(section) or _PANELS.get(name),
    )
    return _parameter(name, kind | None, option, None)


def _spelled(name: str, two_ways: bool = False) -> str:
    word = name.replace("_", "-")
    return f"--{word}/--no-{word}" if two_ways else f"--{word}"


def _parameter(name: str, kind: Any, info: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


MODEL_HELP = "Local directory, Hub id with optional @revision, or demo."
MODEL = argument("model", str, "MODEL", MODEL_HELP, default=None)
DATA = flag(
    "data",
    list[str],
    "Where samples come from; may be given several times. demo, a built-in task (scienceqa, ai2d, mmmu, "
    "gqa, textvqa, textvqa_ocr, pope, mme, flickr30k, ocrbench), a local file or directory, or a Hub data set. "
    "By default demo for the demo model, else scienceqa, gqa, ocrbench and flickr30k.",
    metavar="SOURCE[:KEY=VALUE,...]",
    panel="Data",
)
SET = flag("set", list[str], "Override a recipe key, e.g. calibrate.eta=1e-4.", metavar="KEY=VALUE")
SETTINGS = [flag("recipe", Path, "Recipe whose values the options here override.", metavar="FILE"), SET]
TRUST = fields(ModelSection, "trust_remote_code")
WHERE = fields(ModelSection, "device", "dtype", "attn", "trust_remote_code")
WHERE_STREAMED = fields(ModelSection, "device", "dtype", "attn", "stream", "trust_remote_code")
RULE = fields(ScheduleSection, "method", *Rule.model_fields)
OUTPUT = flag("output", Path, "Result file.", "-o", metavar="PATH", panel="Output")
JSON = flag("json", bool, "Print the result as JSON on stdout.", panel="Output")
TRACK = flag(
    "track",
    str,
    "Log the result as a run of trackio, wandb or tensorboard too, if installed.",
    metavar="TRACKER",
    panel="Output",
)
FORCE = flag("force", bool, "Replace what vtw wrote before.", panel="Output")
WORDS = [
    flag("quiet", bool, "No progress, no notes.", "-q", panel="Output"),
    flag("verbose", bool, "More words; tracebacks on failure.", "-v", panel="Output"),
]
PRINTED = [JSON, FORCE, *WORDS]
