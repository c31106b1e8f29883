"""``vtw eval``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtwcli.commands.flags import (
    DATA,
    MODEL,
    OUTPUT,
    PRINTED,
    RULE,
    SETTINGS,
    TRACK,
    WHERE,
    fields,
    flag,
    flags,
)
from vtwcli.commands.options import (
    begin,
    data_of,
    inputs_here,
    model_of,
    output_paths,
    recipe_of,
    show,
    state_beside,
)
from vtwcli.errors import GateError
from vtwcli.recipe.recipe import EvalSection, GatesSection
from vtwcli.recipe.settings import section_of
from vtwcli.results.calibration import CalibratedOn, SearchedSample
from vtwcli.results.evaluation import EVALUATION

EXAMPLES = """
Examples:

  vtw eval demo --layer 6

  vtw eval demo --layers 4,6,8 --limit 100

  vtw eval demo --method visipruner --shallow-mid-layer 0 --trace trace.jsonl

  vtw eval MODEL --schedule calibration.json --max-drop 0.01

  vtw eval DIR --baseline MODEL
"""


@flags(
    MODEL,
    flag(
        "schedule",
        list[Path],
        "Schedule or calibration result; may be given several times.",
        metavar="FILE",
    ),
    flag("layer", int, "Withdraw at this layer."),
    flag("layers", str, "Compare withdrawal at several layers.", metavar="K,K,..."),
    RULE,
    DATA,
    fields(EvalSection, without=("seed", "resume", "baseline", "backend")),
    fields(EvalSection, "seed", "resume"),
    fields(GatesSection),
    flag(
        "calibration",
        Path,
        "Calibration result whose samples are left out; those of --schedule are anyway.",
        metavar="FILE",
        panel="Data",
    ),
    fields(EvalSection, "baseline", "backend"),
    SETTINGS,
    WHERE,
    OUTPUT,
    flag(
        "trace",
        Path,
        "JSON lines: per sample and schedule the tokens kept, where, and what it cost.",
        metavar="FILE",
        panel="Output",
    ),
    TRACK,
    PRINTED,
)
def command(**given: Any) -> None:
    """Show what pruning costs and saves: full and pruned on the same samples.

    MODEL is a stock model with a schedule, or a directory that vtw export
    made, which brings its schedule along. Compares answers by each task's
    metric, the distributions by KL, and the work by FLOPs, KV cache and
    measured latency. Writes the result (JSON), tables (Markdown), a page with
    the answers that differ (HTML) and a plot. Exit code 3 when a gate fails.
    """
    begin(given)
    base = recipe_of(given, given["method"])
    options = section_of(EvalSection, given, base.eval)
    limits = section_of(GatesSection, given, base.gates)
    where, specs = model_of(given, base), data_of(given, base)
    from vtwcli.recipe.schedules import schedules_of

    schedules = schedules_of(given, base, where)
    outputs = output_paths(given, where.name, EVALUATION)
    outputs.check(inputs_here(given, base, where, specs))

    from vtwcli.judge import gates
    from vtwcli.report.evaluation import evaluation_view, write_evaluation

    file = base.schedule.file
    calibrated = _calibrated(given["calibration"], given["schedule"] or ([Path(file)] if file else []))
    state = state_beside(outputs["result"], options.resume)

    from vtwcli.evaluate import evaluate
    from vtwcli.machine.distributed import finish, is_main

    lines: list[str] | None = None if given["trace"] is None else []
    result, samples = evaluate(
        where,
        schedules,
        specs,
        options,
        calibration=calibrated,
        limits=limits,
        trace=None if lines is None else lines.append,
        state=state,
    )
    if is_main():
        write_evaluation(result, samples, outputs, None if lines is None else "".join(lines))
        show(result, evaluation_view, outputs, given)
    finish()
    failed = [gate for gate in result["gates"] if not gate["passed"]]
    if failed and is_main():
        raise GateError(gates.sentence(failed[0]), f"{len(failed)} of {len(result['gates'])} gates failed")


def _calibrated(calibration: Path | None, schedules: Sequence[Path]) -> CalibratedOn | None:
    """The samples of the calibration result, and of those schedule files that are one."""
    from vtwcli.results.reading import calibration_in, read_calibration

    found = [read_calibration(calibration), *map(calibration_in, schedules)]
    samples: list[SearchedSample] = [sample for one in found if one for sample in one["samples"]]
    return {"samples": samples} if samples else None
