"""``vtw export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtwcli.commands.flags import MODEL, PRINTED, RULE, SETTINGS, TRUST, fields, flag, flags
from vtwcli.commands.options import begin, inputs_here, model_of, recipe_of
from vtwcli.errors import UsageError
from vtwcli.io import console
from vtwcli.io.files import document
from vtwcli.recipe.exports import ExportSection
from vtwcli.recipe.settings import section_of

EXAMPLES = """
Examples:

  vtw export demo --layer 9 --output demo-pruned

  vtw export MODEL --calibration vtw-MODEL/calibration.json --output pruned

  vtw export MODEL --layer 16 --format onnx --dtype float16 --output graphs
"""


@flags(
    MODEL,
    flag("schedule", Path, "Schedule to bake in, YAML or JSON.", metavar="FILE"),
    flag("calibration", Path, "Calibration result whose schedule is baked in.", metavar="FILE"),
    flag("layer", int, "Withdraw at this layer.", min=0),
    RULE,
    fields(ExportSection),
    flag("evaluation", Path, "Evaluation result for the model card (hf).", metavar="FILE"),
    SETTINGS,
    TRUST,
    flag("push_to_hub", str, "Upload the directory (hf), private by default.", metavar="REPO"),
    flag("public", bool, "Make the uploaded repository public."),
    flag("output", Path, "Directory to make.", "-o", metavar="DIR", panel="Output"),
    PRINTED,
)
def command(**given: Any) -> None:
    """Write a model with its schedule baked in: a Hugging Face directory, ONNX graphs, or for transformers.js.

    The directory appears only when it is complete and checked. The Hugging
    Face form loads pruned with trust_remote_code=True where this tool is not
    installed, and as the plain model without it.
    """
    begin(given)
    base = recipe_of(given, given["method"])
    options = section_of(ExportSection, given, base.export)
    where = model_of({**given, "dtype": None}, base)
    output: Path | None = given["output"]
    if output is None:
        raise UsageError("no output directory given", "--output DIR")
    from vtwcli.export.directory.publish import check_target
    from vtwcli.recipe.schedules import schedules_of
    from vtwcli.results.reading import read_calibration, read_evaluation

    check_target(output, given["force"], inputs_here(given, base, where, ()))
    paths = [given[name] for name in ("schedule", "calibration") if given[name] is not None]
    named = schedules_of({**given, "schedule": paths}, base, where)
    if len(named) != 1:
        raise UsageError("give exactly one of --schedule, --calibration, --layer and --method")
    [(_, chosen)] = named
    repository: str | None = given["push_to_hub"]
    if repository and options.format != "hf":
        raise UsageError("--push-to-hub goes with --format hf only", "upload graphs with: hf upload REPO DIR")
    from vtwcli.export.formats import export

    manifest = export(
        where,
        chosen,
        output,
        options,
        force=given["force"],
        calibration=read_calibration(given["calibration"]),
        evaluation=read_evaluation(given["evaluation"]),
        recipe=given["recipe"] and given["recipe"].read_text(encoding="utf-8"),
    )
    if repository:
        from vtwcli.export.directory.push import push

        console.note(f"uploaded {push(output, repository, private=not given['public'])}")
    console.result_text(document(manifest) if given["json"] else f"wrote {output}")
