"""``vtw calibrate``."""

from __future__ import annotations

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
from vtwcli.recipe.recipe import CalibrateSection
from vtwcli.recipe.settings import section_of
from vtwcli.results.calibration import CALIBRATION

EXAMPLES = """
Examples:

  vtw calibrate demo

  vtw calibrate llava-hf/llava-1.5-7b-hf --data scienceqa --policy paper

  vtw calibrate demo --policy guarantee --risk 0.05 --limit 200

  vtw calibrate demo --method visipruner --eta 0.01

  vtw calibrate ./my-model --data ./mine.jsonl --json | jq .withdrawal_layer
"""


@flags(
    MODEL,
    DATA,
    fields(CalibrateSection),
    SETTINGS,
    WHERE_STREAMED,
    OUTPUT,
    flag("plot", Path, "Curve picture, png or svg.", metavar="FILE", panel="Output"),
    TRACK,
    PRINTED,
)
def command(**given: Any) -> None:
    """Find the withdrawal layer K: the first layer that runs without visual tokens and nobody notices.

    Runs a few samples and compares, for every layer, the next-token
    distribution without visual tokens from that layer on with the full
    model's (KL in nats). Writes the result (JSON), the schedule (YAML) and
    a picture of the curve, by default into vtw-MODEL/. Exit code 3 when no
    layer qualifies. With --method visipruner it searches that method's
    shallow boundary and thresholds instead, by running the candidates.
    """
    begin(given)
    base = recipe_of(given)
    options = section_of(CalibrateSection, given, base.calibrate)
    where, specs = model_of(given, base), data_of(given, base)
    outputs = output_paths(given, where.name, CALIBRATION)
    outputs.check(inputs_here(given, base, where, specs))

    from vtwcli.calibrate import calibrate
    from vtwcli.machine.distributed import finish, is_main
    from vtwcli.report.calibration import calibration_sentence, calibration_view, write_calibration

    state = state_beside(outputs["result"], options.resume)
    result = calibrate(where, specs, options, state=state, rule=base.schedule)
    if is_main():
        write_calibration(result, outputs)
        show(result, calibration_view, outputs, given)
    finish()
    if result["schedule"] is None and is_main():
        larger = "--risk" if options.policy == "guarantee" else "--eta"
        raise GateError(calibration_sentence(result), f"more samples, a larger {larger}, or --policy budget")
