"""The tour of ``vtw demo``: the tool's commands one after the other on the demo model, and what pruning does there."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

from vtwcli.data.scenes import DEFAULT_TASKS, Example, examples
from vtwcli.errors import UsageError
from vtwcli.export.directory.publish import check_target
from vtwcli.io import console
from vtwcli.io.outputs import Outputs
from vtwcli.recipe.exports import ExportSection
from vtwcli.recipe.recipe import AnalyzeSection, CalibrateSection, ModelSection
from vtwcli.results.analysis import ANALYSIS
from vtwcli.results.calibration import CALIBRATION
from vtwcli.results.document import Files
from vtwcli.schedule.schedule import Schedule

if TYPE_CHECKING:
    from rich.table import Table

_DEMO = ModelSection(name="demo")
_SEED = 2  # of the scene that is asked about; calibration sees those of seed 0


class Asked(NamedTuple):
    """One question, answered by the full model and the pruned one.

    Attributes:
        example: the scene, the question and its reference answer.
        answers: of the full and of the pruned model.
        entries: entries of each layer's KV cache at the end, full and pruned.
    """

    example: Example
    answers: tuple[str, str]
    entries: tuple[list[int], list[int]]


def tour(folder: Path, limit: int, task: str, force: bool = False) -> None:
    """Calibrate, analyze, export, verify and ask, on the demo model; every step says which command does the same.

    Args:
        folder: where the results go; made if it is not there.
        limit: samples of each task.
        task: of the question that is asked at the end.
        force: replace what an earlier tour wrote.

    Raises:
        UsageError: an unknown task, or results that are there already.
    """
    if task not in DEFAULT_TASKS:
        raise UsageError(f"--task: {task!r} is not a task of the demo", f"one of {', '.join(DEFAULT_TASKS)}")
    results = {files.format: _outputs(folder, files, force) for files in (CALIBRATION, ANALYSIS)}
    picture = Outputs({"result": folder / "answer.png"}, "picture", force)
    for outputs in (*results.values(), picture):
        outputs.check(())
    check_target(folder / "model", force)

    from vtwcli.analyze import analyze
    from vtwcli.calibrate import calibrate
    from vtwcli.export.formats import export, verify
    from vtwcli.report.analysis import sentences
    from vtwcli.report.analysis_page import write_analysis
    from vtwcli.report.calibration import calibration_view, write_calibration

    _title(1, "From which layer on are the visual tokens not needed?", f"vtw calibrate demo --limit {limit}")
    options = CalibrateSection(limit=limit)
    found = calibrate(_DEMO, options=options)
    write_calibration(found, results[CALIBRATION.format])
    console.result(calibration_view(found))
    k = found.get("withdrawal_layer")
    if not isinstance(k, int) or found["schedule"] is None:
        raise UsageError("with so few samples no layer qualifies", "a larger --limit")

    _title(2, "What do the layers do with vision?", f"vtw analyze demo --limit {limit}")
    profile = analyze(_DEMO, options=AnalyzeSection(limit=limit))
    write_analysis(profile, results[ANALYSIS.format])
    for words in sentences(profile.result):
        console.result(words)

    made = folder / "model"
    _title(3, f"A model that withdraws them at layer {k}", f"vtw export demo --layer {k} --output {made}")
    export(_DEMO, Schedule.withdraw_at(k), made, ExportSection(), force=force)
    console.result(
        f"{made} is a Hugging Face directory; AutoModelForImageTextToText loads it with trust_remote_code=True, "
        "pruned, where this tool is not installed."
    )

    _title(4, "Is it what was measured?", f"vtw verify {made}")
    report = verify(made)
    console.result(
        f"Files, loading and generation checked; logits within {report['max_logit_difference']:.1e} of the demo "
        "model's under the runtime."
    )

    _title(5, "One question, full and pruned", f"vtw eval demo --layer {k} asks many")
    asked = ask(next(examples("eval", 1, seed=_SEED, tasks=(task,))), k)
    console.result(_side_by_side(asked))
    with picture.publish() as new:
        new.view("result", lambda path: draw_asked(asked, k, path))
    written = [outputs["result"] for outputs in (*results.values(), picture)]
    console.result(f"\nResults: {', '.join(map(str, written))} and {made}.")
    console.result(
        "Next, your own model: vtw calibrate MODEL --data YOURS.jsonl (vtw docs data shows the forms)."
    )


def ask(example: Example, k: int) -> Asked:
    """One question to the demo model, full and with its visual tokens withdrawn at layer ``k``."""
    from vtwcli.data.sample import Sample
    from vtwcli.models.generation import cache_of
    from vtwcli.models.inputs import encode
    from vtwcli.models.loading import load
    from vtwcli.runtime import entries, pruned

    loaded = load("demo")
    encoded = encode(loaded, Sample(example.id, example.task, (example.image,), example.question))

    def answered() -> tuple[str, list[int]]:
        output = loaded.model.generate(
            **encoded.inputs, max_new_tokens=24, do_sample=False, return_dict_in_generate=True
        )
        ids = output.sequences[0, encoded.inputs["input_ids"].shape[1] :]
        answer = loaded.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return answer, entries(cache_of(output))

    full = answered()
    with pruned(loaded.model, k):
        lean = answered()
    return Asked(example, (full[0], lean[0]), (full[1], lean[1]))


def draw_asked(asked: Asked, k: int, path: Path) -> None:
    """The scene with its question and both answers, beside what each layer's KV cache holds, full and pruned."""
    from matplotlib.figure import Figure

    from vtwcli.report.plots import BLUE, GREY, save_figure

    figure = Figure(figsize=(9.2, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.5])
    left.imshow(asked.example.image)
    left.set(xticks=[], yticks=[])
    left.set_title(asked.example.question, fontsize=10, loc="left")
    words = [
        line
        for who, said in zip(("full", "pruned"), asked.answers, strict=True)
        for line in wrap(f"{who}: {said}", 48)
    ]
    for number, line in enumerate(words):
        left.text(0, -0.07 - 0.07 * number, line, fontsize=9, transform=left.transAxes)
    layers = range(len(asked.entries[0]))
    right.bar([d - 0.2 for d in layers], asked.entries[0], 0.4, color=GREY, label="full")
    right.bar([d + 0.2 for d in layers], asked.entries[1], 0.4, color=BLUE, label=f"withdrawn at {k}")
    right.set_xlabel("layer")
    right.set_ylabel("entries in the KV cache")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.spines[["top", "right"]].set_visible(False)
    share = sum(asked.entries[1]) / sum(asked.entries[0])
    right.set_title(f"the cache holds {share:.0%}", fontsize=10, loc="left")
    right.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    save_figure(figure, path)


def _outputs(folder: Path, files: Files, force: bool) -> Outputs:
    return Outputs({key: folder / name for key, name in files.named().items()}, files.format, force)


def _title(number: int, words: str, command: str) -> None:
    from rich.text import Text

    console.result(Text(f"\n{number}/5  {words}", "bold"))
    console.result(Text(f"     {command}\n", "dim"))


def _side_by_side(asked: Asked) -> Table:
    from vtwcli.report.tables import terminal_table

    def held(entries: list[int]) -> str:
        return f"{sum(entries)} entries ({entries[0]} in the first layer, {entries[-1]} in the last)"

    rows: list[list[Any]] = [
        ["question", asked.example.question, ""],
        ["answer", *asked.answers],
        ["KV cache", *map(held, asked.entries)],
    ]
    return terminal_table(["", "full", "pruned"], rows, left=["", "full", "pruned"], wrap=True)
