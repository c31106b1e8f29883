"""``vtw analyze``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vtwcli.commands.flags import (
    DATA,
    MODEL,
    OUTPUT,
    PRINTED,
    SETTINGS,
    TRACK,
    WHERE_STREAMED,
    fields,
    flag,
    flags,
)
from vtwcli.commands.options import begin, data_of, inputs_here, model_of, output_paths, recipe_of, show
from vtwcli.io.files import present
from vtwcli.recipe.recipe import AnalyzeSection
from vtwcli.recipe.settings import section_of
from vtwcli.results.analysis import ANALYSIS

EXAMPLES = """
Examples:

  vtw analyze demo

  vtw analyze llava-hf/llava-1.5-7b-hf --data gqa --data scienceqa --stream

  vtw analyze ./my-model --data ./mine.jsonl --json | jq .stages.sentences
"""


@flags(
    MODEL,
    DATA,
    fields(AnalyzeSection, without=("sink_ratio", "layer_threshold", "exit_threshold", "exit_layers")),
    SETTINGS,
    WHERE_STREAMED,
    OUTPUT,
    flag("svg", bool, "Plots as SVG, not PNG.", panel="Output"),
    TRACK,
    PRINTED,
)
def command(**given: Any) -> None:
    """Show which layers fuse vision and text, which carry vision along, which no longer need it.

    One pass over the layers of a few samples measures, for every layer, what
    the last token reads from the image and what it costs (KL in nats) when
    text does not read it. Writes the profile (JSON), a page with plots and
    heat maps (HTML), the plots, and a static and a dynamic schedule (YAML),
    by default into vtw-MODEL/; --output may also name a directory.
    """
    begin(given)
    base = recipe_of(given)
    options = section_of(AnalyzeSection, given, base.analyze)
    where, specs = model_of(given, base), data_of(given, base)
    output: Path | None = given["output"]
    if output is not None and (not output.suffix or (present(output) and output.is_dir())):
        output = output / "analysis.json"
    plots = ".svg" if given["svg"] else ".png"
    beside = {key: suffix.replace(".png", plots) for key, suffix in ANALYSIS.beside.items()}
    outputs = output_paths({**given, "output": output}, where.name, replace(ANALYSIS, beside=beside))
    outputs.check(inputs_here(given, base, where, specs))

    from vtwcli.analyze import analyze
    from vtwcli.machine.distributed import finish, is_main

    analysis = analyze(where, specs, options)
    if is_main():
        from vtwcli.report.analysis import analysis_view
        from vtwcli.report.analysis_page import write_analysis

        write_analysis(analysis, outputs)
        show(analysis.result, analysis_view, outputs, given)
    finish()
