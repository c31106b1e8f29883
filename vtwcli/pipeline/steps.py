"""The steps of a run: which ones a recipe asks for, and how each is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtwcli.errors import UsageError
from vtwcli.io import documents
from vtwcli.io.outputs import Outputs
from vtwcli.machine.distributed import is_main
from vtwcli.pipeline.run import FILES, STATES, Run
from vtwcli.recipe.recipe import STEPS, Recipe
from vtwcli.recipe.schedules import schedule_of
from vtwcli.recipe.settings import load_recipe
from vtwcli.schedule.schedule import Schedule


def steps_of(recipe: Recipe, name: str = "the recipe") -> list[str]:
    """The steps whose sections a recipe has, in the order in which they run.

    Raises:
        UsageError: none, or steps that lack what they need.
    """
    wanted = [step for step in STEPS if step in recipe.model_fields_set]
    if not wanted:
        raise UsageError(f"{name} has no step to run", f"add a section, it may be empty: {', '.join(STEPS)}")
    if problems := step_problems(recipe, name):
        raise problems[0]
    return wanted


def step_problems(recipe: Recipe, name: str = "the recipe") -> list[UsageError]:
    """What keeps the steps of a recipe, where it has any, from running."""
    wanted = recipe.model_fields_set & STEPS.keys()
    problems = []
    if "export" in wanted and "calibrate" not in wanted and not recipe.schedule.names_one:
        problems.append(
            UsageError(
                f"{name}: export: there is no schedule for it",
                "add the section calibrate, or schedule with file, layer or method",
            )
        )
    if wanted and "eval" not in wanted and any(limit is not None for _, limit in recipe.gates):
        problems.append(
            UsageError(f"{name}: gates: there is nothing that they judge", "add the section eval")
        )
    return problems


def check_recipe(path: Path) -> tuple[str, list[UsageError]]:
    """Look at a recipe file and at the schedule that it names, and at nothing else.

    Returns:
        The recipe's steps in words, and everything that is wrong, in order; a recipe that is wrong has no steps.
    """
    problems: list[UsageError] = []
    recipe = None
    try:
        recipe = load_recipe(path)
    except UsageError as error:
        problems += documents.all_problems(error)
    try:
        if recipe is not None:
            schedule_of(recipe.schedule)
        elif isinstance(file := _schedule_file(path), str):
            Schedule.from_file(path.parent / file)
    except UsageError as error:
        problems += documents.all_problems(error)
    if recipe is None:
        return "", problems
    problems += step_problems(recipe, str(path))
    has_steps = bool(recipe.model_fields_set & STEPS.keys())
    if problems:
        return "", problems
    return ", ".join(steps_of(recipe, str(path))) if has_steps else "no step for vtw run", []


def _schedule_file(path: Path) -> Any:
    """The schedule that a recipe names which is not valid otherwise; None where there is none to be found."""
    try:
        return documents.read(path, "recipe")["schedule"]["file"]
    except (UsageError, KeyError, TypeError, IndexError):
        return None


def _calibrate(run: Run) -> dict[str, Any]:
    from vtwcli.analyze import analyze, shares_sweep
    from vtwcli.calibrate import calibrate
    from vtwcli.report import calibration as report_calibrate

    recipe = run.recipe
    both = any(step.name == "analyze" and step.runs for step in run.steps)
    if both and recipe.calibrate.method == "vtw" and shares_sweep(recipe.analyze, recipe.calibrate):
        run.analysis = analyze(recipe.model, recipe.data, recipe.analyze, calibration=recipe.calibrate)
        result = run.analysis.calibration
        assert result is not None
    else:
        state = run.folder / STATES["calibrate"]
        result = calibrate(recipe.model, recipe.data, recipe.calibrate, state=state, rule=recipe.schedule)
    if is_main():
        report_calibrate.write_calibration(result, _outputs(run, "calibrate"))
    run.results["calibrate"] = result
    return {
        "words": report_calibrate.calibration_sentence(result),
        "withdrawal_layer": result["withdrawal_layer"],
        "interval": result.get("interval"),
    }


def _analyze(run: Run) -> dict[str, Any]:
    from vtwcli.analyze import analyze
    from vtwcli.report import analysis as report_analyze
    from vtwcli.report import analysis_page as report_analyze_page

    analysis = run.analysis or analyze(run.recipe.model, run.recipe.data, run.recipe.analyze)
    run.analysis = None  # its images are many
    if is_main():
        report_analyze_page.write_analysis(analysis, _outputs(run, "analyze"))
    stages = {name: analysis.result["stages"][name] for name in ("shallow", "middle", "deep")}
    return {"words": report_analyze.sentences(analysis.result)[0], "stages": stages}


def _evaluate(run: Run) -> dict[str, Any]:
    from vtwcli.evaluate import evaluate
    from vtwcli.report import evaluation as report_eval

    result, samples = evaluate(
        run.recipe.model,
        [named] if (named := schedule(run)) else [],
        run.recipe.data,
        run.recipe.eval,
        calibration=run.result("calibrate"),
        state=run.folder / STATES["eval"],
    )
    if is_main():
        report_eval.write_evaluation(result, samples, _outputs(run, "eval"))
    run.results["eval"] = result
    [(name, row)] = result["schedules"].items()
    cost = row["cost"]["flops_ratio"][row["cost"]["convention"]]
    drop = row["worst_difference"]
    worst = "" if drop is None else f"worst task {row['worst_task']} {drop:+.3f}, "
    return {
        "words": f"{name}: {worst}mean KL {row['kl_answer']:.2e}, prefill FLOPs {cost:.1%} of full",
        "schedule": name,
        "worst_task": row["worst_task"],
        "worst_difference": drop,
        "kl_answer": row["kl_answer"],
        "flops_ratio": cost,
    }


def _export(run: Run) -> dict[str, Any]:
    from vtwcli.export.directory.publish import publish
    from vtwcli.export.formats import export

    options = run.recipe.export
    named = schedule(run)
    assert named is not None  # steps_of sees to it
    if not is_main():
        return {"words": ""}
    with publish(run.folder / "model", force=True) as folder:
        made = folder / "model"  # the name that its card tells
        manifest = export(
            run.recipe.model,
            named[1],
            made,
            options,
            calibration=None if run.recipe.schedule.names_one else run.result("calibrate"),
            evaluation=run.result("eval"),
            recipe=run.text,
        )
        facts = _verify(run, made) if options.format == "hf" else {"parity": manifest["parity"]}
        for entry in made.iterdir():
            entry.rename(folder / entry.name)
        made.rmdir()
    what = "Hugging Face directory" if options.format == "hf" else "ONNX graphs"
    return {"words": f"{what}, verified, in {run.folder / 'model'}", "format": options.format, **facts}


def _verify(run: Run, directory: Path) -> dict[str, Any]:
    from vtwcli.export.formats import verify

    model = run.recipe.model
    base = model.name if model.name == "demo" or Path(model.name).exists() else None
    report = verify(directory, base=base, device=model.device)
    return {key: report[key] for key in ("compared_with", "max_logit_difference")}


KINDS = {"calibrate": "vtw-calibration", "analyze": "vtw-analysis", "eval": "vtw-evaluation"}
"""The format of each step's result document."""

RUNNERS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "calibrate": _calibrate,
    "analyze": _analyze,
    "eval": _evaluate,
    "export": _export,
}


def _outputs(run: Run, step: str) -> Outputs:
    places = {kind: run.path(step, kind) for kind in FILES[step]}
    return Outputs(places, KINDS[step], force=True, owned=run.owned)


def schedule(run: Run) -> tuple[str, Schedule] | None:
    """Name and schedule that the run evaluates and exports: the recipe's, else the calibration's.

    None where there is neither; an exported directory carries its own.
    """
    if run.recipe.schedule.names_one:
        return schedule_of(run.recipe.schedule)
    calibration = run.result("calibrate")
    if calibration is None:
        return None
    k = calibration["withdrawal_layer"]
    return "calibrated" if k is None else f"K={k}", Schedule.from_dict(calibration["schedule"])
