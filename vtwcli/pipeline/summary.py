"""Views of a run: the plan, the summary, and the summary in Markdown."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtwcli.io import text
from vtwcli.judge import gates
from vtwcli.report.tables import markdown_table

if TYPE_CHECKING:
    from vtwcli.pipeline.run import Run


def plan_view(run: Run) -> str:
    """What there is to do: the inputs, and per step whether it runs, why, and with which options."""
    lines = [inputs(run)]
    for step in run.steps:
        state = "will run" if step.runs else "kept" if step.kept else "left out"
        given = [f"{key} {_value(value)}" for key, value in step.step.shown(run.recipe).items()]
        lines.append(f"  {step.name:<10}{state:<10}{step.why}; {', '.join(given) or 'defaults'}")
    return "\n".join(lines)


def inputs(run: Run) -> str:
    """Model, data and output directory in a line."""
    version = run.model["revision"] or f"files {run.model['fingerprint']}"
    data = ", ".join(spec.source for spec in run.recipe.data) or "the default mix"
    return f"model {run.model['name']} ({version}); data {data}; results in {run.folder}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def summary_view(run: Run) -> str:
    """What was found: a line per step, the gates, and where everything is."""
    lines = [f"{name:<10}{seconds:>8}  {words}" for name, words, seconds in _rows(run)]
    return "\n".join([*lines, *(gates.sentence(gate) for gate in run.gates), verdict(run)])


def verdict(run: Run) -> str:
    """Whether the run came to its end, in a line."""
    if run.failure is None:
        return f"Results in {run.folder}."
    return f"Stopped: {run.failure}. Results so far in {run.folder}."


def markdown(run: Run) -> str:
    """The summary for a job's page, with what each step shows of its result."""
    parts = [
        f"## {text.markdown(run.model['name'])}: {'passed' if run.failure is None else 'FAILED'}",
        markdown_table(["step", "result", "time"], _rows(run), numbers=False),
    ]
    if run.gates:
        parts.append("\n".join(f"- {text.paragraph(gates.sentence(gate))}" for gate in run.gates))
    if run.failure is not None:
        parts.append(text.paragraph(f"Stopped: {run.failure}."))
    done = [one.step for one in run.steps if one.name in run.reached and one.name in run.records]
    pages = [page for step in done if (page := step.page(run))]
    parts += [page.replace("## ", "### ", 1).strip() for page in pages]
    parts.append(text.paragraph(f"{inputs(run)[0].upper()}{inputs(run)[1:]}."))
    return "\n\n".join(parts) + "\n"


def _rows(run: Run) -> list[tuple[str, str, str]]:
    rows = []
    for step in run.steps:
        record = run.records.get(step.name)
        if record is None or step.name not in run.reached:
            rows.append((step.name, "failed" if step.name in run.started & run.reached else "not run", "-"))
        else:
            seconds = "kept" if not step.runs else f"{record.seconds:.1f} s"
            rows.append((step.name, record.words, seconds))
    return rows


def check_summary(also: Path, run: Run) -> None:
    """Refuse, before long work, a file to which the summary must not be appended.

    Raises:
        UsageError: a directory, a pipe, a link that leads nowhere, an input, a file of the run, or a place that
            cannot be written.
    """
    from vtwcli.errors import UsageError
    from vtwcli.io import files
    from vtwcli.io.outputs import check_no_input
    from vtwcli.pipeline.plan import run_inputs
    from vtwcli.pipeline.steps import is_run_file

    hint = "choose another --summary"
    if files.present(also):
        if also.is_dir():
            raise UsageError(f"{also} is a directory, not a file", hint)
        if not also.exists():
            raise UsageError(f"{also} is a link that leads nowhere", hint)
        if not (also.is_file() or also.is_char_device()):  # the terminal, or nowhere
            raise UsageError(f"{also} is not a file", hint)
        if not os.access(also, os.W_OK):
            raise UsageError(f"{also}: cannot be written", hint)
        check_no_input(also, run_inputs(run.recipe, run.file))
    else:
        files.check_folder(also)
    place, folder = also.resolve(), run.folder.resolve()
    if place.is_relative_to(folder) and is_run_file(place.relative_to(folder).parts[0]):
        raise UsageError(f"{also} is a file that vtw run writes itself", hint)


def write_summary(run: Run, also: Path | None = None) -> None:
    """Write the Markdown summary into the output directory, and append it to another file.

    Raises:
        VtwError: the file system refuses.
    """
    from vtwcli.errors import VtwError
    from vtwcli.io import files
    from vtwcli.pipeline.run import SUMMARY

    summary = markdown(run)
    files.write_text(run.folder / SUMMARY, summary)
    if also is not None:
        try:
            with also.open("a", encoding="utf-8") as stream:
                stream.write(summary)
        except OSError as error:
            raise VtwError(f"{also}: cannot write: {error.strerror or error}") from None
