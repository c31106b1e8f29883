"""How long help pages take. Run by hand; prints a Markdown table.

    python tests/benchmarks/bench_help.py [--repeat 15]

Each command is started anew, in turn and around again, beside an interpreter that does nothing; the median wall time is
shown. The goal is 0.25 s.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=15)
    options = parser.parse_args()
    from vtwcli.cli import COMMANDS

    commands = {"python -c pass": [sys.executable, "-c", "pass"]}
    commands["vtw --help"] = [sys.executable, "-m", "vtwcli", "--help"]
    commands |= {
        f"vtw {name} --help": [sys.executable, "-m", "vtwcli", str(name), "--help"] for name in COMMANDS
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.repeat):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    print("| command | seconds |\n|---|---|")
    for name, times in seconds.items():
        print(f"| `{name}` | {statistics.median(times):.3f} |")


if __name__ == "__main__":
    main()
