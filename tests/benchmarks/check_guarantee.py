"""Whether what ``vtw calibrate demo --policy guarantee`` promises holds on questions that it has not seen.

    python tests/benchmarks/check_guarantee.py [--fresh 400] [--seed 1] [--limit 200] [--risk 0.05 0.02]

For each risk the demo model's K is found from ``--limit`` questions a task. Then ``--fresh`` questions a task of the
split ``test``, whose scenes no calibration draws, say by a sweep how many tokens of an answer really change at that K.
"""

from __future__ import annotations

import argparse

from vtwcli.calibrate import calibrate
from vtwcli.data.spec import DataSpec
from vtwcli.recipe.recipe import CalibrateSection, ModelSection

DEMO = ModelSection(name="demo")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fresh", type=int, default=400, help="questions of each task to check with")
    parser.add_argument("--seed", type=int, default=1, help="of these")
    parser.add_argument("--limit", type=int, default=200, help="questions of each task to calibrate with")
    parser.add_argument("--risk", type=float, nargs="+", default=[0.05, 0.02])
    given = parser.parse_args()
    fresh = calibrate(
        DEMO,
        [DataSpec(source="demo", split="test")],
        CalibrateSection(limit=given.fresh, seed=given.seed, bootstrap=0),
    )
    seen: set[str | None] = set()
    print("| promised | K | " + " | ".join(fresh["tasks"]) + " |")
    print("| --: | --: |" + " --: |" * len(fresh["tasks"]))
    for risk in given.risk:
        asked = CalibrateSection(limit=given.limit, bootstrap=0, policy="guarantee", risk=risk)
        found = calibrate(DEMO, [DataSpec(source="demo")], asked)
        seen |= {one.get("fingerprint") for one in found["samples"]}
        k = found["withdrawal_layer"]
        cells = (
            "-" if k is None else f"{100 * (1 - task['agreement'][k]):.3g} %"
            for task in fresh["tasks"].values()
        )
        print(f"| {100 * risk:g} % | {'none' if k is None else k} | " + " | ".join(cells) + " |")
    again = sum(one.get("fingerprint") in seen for one in fresh["samples"])
    print(f"{len(fresh['samples'])} fresh questions, {again} of them among those of the calibrations.")


if __name__ == "__main__":
    main()
