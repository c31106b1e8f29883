"""The steps of a run, one class each, and which of them a recipe asks for."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

from vtwcli.errors import UsageError
from vtwcli.export.directory.publish import aside, check_target
from vtwcli.io import documents, files, staging
from vtwcli.io.outputs import Inputs, check_holds_no_input
from vtwcli.judge import gates
from vtwcli.machine.distributed import is_main
from vtwcli.pipeline.run import LOCK, RECIPE, RUN, SUMMARY, Outcome, Run, Step
from vtwcli.pipeline.search import Search
from vtwcli.recipe.recipe import Recipe
from vtwcli.recipe.schedules import schedule_of
from vtwcli.recipe.settings import load_recipe
from vtwcli.results.analysis import ANALYSIS
from vtwcli.results.calibration import CALIBRATION, CalibratedOn, Calibration
from vtwcli.results.comparison import BUDGET
from vtwcli.results.evaluation import EVALUATION
from vtwcli.schedule.schedule import Schedule


class Calibrate(Step):
    """Finds K, or a method's parameters; the profile comes along where one sweep gives both."""

    name = "calibrate"
    kind = CALIBRATION.format
    writes: ClassVar = CALIBRATION.named()
    partial = "calibration.partial.jsonl"

    def depends(self, recipe: Recipe, placed: Recipe) -> list[Any]:
        searched = recipe.calibrate.method == "vtw"
        return [] if searched else [placed.schedule.model_dump(mode="json")]  # parameters not searched

    def run(self, run: Run) -> Outcome:
        from vtwcli.analyze import analyze, shares_sweep
        from vtwcli.calibrate import calibrate
        from vtwcli.report.calibration import calibration_sentence, write_calibration

        recipe = run.recipe
        result: Calibration | None = None
        both = any(step.name == "analyze" and step.runs for step in run.steps)
        if both and recipe.calibrate.method == "vtw" and shares_sweep(recipe.analyze, recipe.calibrate):
            run.analysis = analyze(recipe.model, recipe.data, recipe.analyze, calibration=recipe.calibrate)
            result = run.analysis.calibration
        if result is None:
            state = run.folder / self.partial
            result = calibrate(recipe.model, recipe.data, recipe.calibrate, state=state, rule=recipe.schedule)
        if is_main():
            write_calibration(result, self.outputs(run.folder, run.owned))
        run.results[self.name] = result
        chosen = {"withdrawal_layer": result["withdrawal_layer"], "interval": result.get("interval")}
        return Outcome(calibration_sentence(result), chosen)

    def judge(self, run: Run) -> str | None:
        named = run.recipe.schedule.names_one or "search" in run.recipe.model_fields_set
        calibration = None if named else run.result(self.name)
        if calibration is None or calibration["schedule"] is not None:
            return None
        return run.records[self.name].words.rstrip(".")


class Analyze(Step):
    """Profiles what each layer does with vision."""

    name = "analyze"
    kind = ANALYSIS.format
    writes: ClassVar = ANALYSIS.named()

    def run(self, run: Run) -> Outcome:
        from vtwcli.analyze import analyze
        from vtwcli.report.analysis import sentences
        from vtwcli.report.analysis_page import write_analysis

        analysis = run.analysis or analyze(run.recipe.model, run.recipe.data, run.recipe.analyze)
        run.analysis = None  # its images are many
        if is_main():
            write_analysis(analysis, self.outputs(run.folder, run.owned))
        stages = {name: analysis.result["stages"][name] for name in ("shallow", "middle", "deep")}
        return Outcome(sentences(analysis.result)[0], {"stages": stages})


class Budget(Step):
    """Compares the methods; where the section names a budget, a schedule must fit into it."""

    name = "budget"
    kind = BUDGET.format
    writes: ClassVar = BUDGET.named()

    def depends(self, recipe: Recipe, placed: Recipe) -> list[Any]:
        # parameters of methods that are not varied; which schedule is named makes no difference
        return [placed.schedule.model_dump(mode="json", exclude={"file", "layer", "method"})]

    def run(self, run: Run) -> Outcome:
        from vtwcli.budget import budget
        from vtwcli.report.budget import budget_line, write_budget

        recipe = run.recipe
        result = budget(recipe.model, recipe.data, recipe.budget, recipe.schedule)
        if is_main():
            write_budget(result, self.outputs(run.folder, run.owned))
        run.results[self.name] = result
        return Outcome(budget_line(result), {"best": result["best"], "pareto": result["pareto"]})

    def judge(self, run: Run) -> str | None:
        from vtwcli.report.budget import shortfall

        result = run.result(self.name)
        return None if result is None else shortfall(result)

    def page(self, run: Run) -> str | None:
        from vtwcli.report.budget import markdown

        result = run.result(self.name)
        return None if result is None else markdown(result)


class Evaluate(Step):
    """Judges the schedule on held-out samples; the recipe's gates are its limits."""

    name = "eval"
    follows = ("calibrate", "search")
    kind = EVALUATION.format
    writes: ClassVar = EVALUATION.named()
    partial = "evaluation.partial.jsonl"

    def depends(self, recipe: Recipe, placed: Recipe) -> list[Any]:
        proof = (
            [] if recipe.gates.risk is None else ["losses"]
        )  # those of the samples, which nobody else wants
        return _named_actions(recipe) + proof

    def other_models(self, recipe: Recipe) -> list[str]:
        return [] if recipe.eval.baseline is None else [recipe.eval.baseline]

    def run(self, run: Run) -> Outcome:
        from vtwcli.evaluate import evaluate
        from vtwcli.report.evaluation import write_evaluation

        result, samples = evaluate(
            run.recipe.model,
            [named] if (named := _schedule(run)) else [],
            run.recipe.data,
            run.recipe.eval,
            calibration=_seen(run),
            promise=gates.promise_of(run.recipe.gates),
            state=run.folder / self.partial,
        )
        if is_main():
            write_evaluation(result, samples, self.outputs(run.folder, run.owned))
        run.results[self.name] = result
        [(name, row)] = result["schedules"].items()
        cost = row["cost"]["flops_ratio"][row["cost"]["convention"]]
        drop = row["worst_difference"]
        worst = "" if drop is None else f"worst task {row['worst_task']} {drop:+.3f}, "
        return Outcome(
            f"{name}: {worst}mean KL {row['kl_answer']:.2e}, prefill FLOPs {cost:.1%} of full",
            {
                "schedule": name,
                "worst_task": row["worst_task"],
                "worst_difference": drop,
                "kl_answer": row["kl_answer"],
                "flops_ratio": cost,
            },
        )

    def judge(self, run: Run) -> str | None:
        evaluation = run.result(self.name)
        assert evaluation is not None
        run.gates = gates.check(evaluation["schedules"], run.recipe.gates)
        return next((gates.sentence(gate) for gate in run.gates if not gate["passed"]), None)

    def shown(self, recipe: Recipe) -> dict[str, Any]:
        limits = {name: limit for name, limit in recipe.gates if limit is not None}
        return super().shown(recipe) | _named_schedule(recipe) | limits

    def page(self, run: Run) -> str | None:
        from vtwcli.report.evaluation import markdown

        evaluation = run.result(self.name)
        return None if evaluation is None else markdown(evaluation)


class Export(Step):
    """Makes the pruned model aside, verifies it, and publishes it last."""

    name = "export"
    follows = ("calibrate", "search", "eval")
    writes: ClassVar = {"model": "model/manifest.json"}
    reads_data = False

    def lacks(self, recipe: Recipe) -> tuple[str, str] | None:
        if {"calibrate", "search"} & recipe.model_fields_set or recipe.schedule.names_one:
            return None
        return (
            "export: there is no schedule for it",
            "add the section calibrate or search, or schedule with file, layer or method",
        )

    def depends(self, recipe: Recipe, placed: Recipe) -> list[Any]:
        return _named_actions(recipe)

    def run(self, run: Run) -> Outcome:
        from vtwcli.export.formats import export

        options = run.recipe.export
        named = _schedule(run)
        assert named is not None  # steps_of sees to it
        if not is_main():
            return Outcome("", {})
        with aside(run.folder / "model", force=True) as made:
            manifest = export(
                run.recipe.model,
                named[1],
                made,
                options,
                calibration=run.result("calibrate") if _from_calibration(run) else None,
                evaluation=run.result("eval"),
                recipe=run.text,
            )
            facts = _verify(run, made) if options.format == "hf" else {"parity": manifest["parity"]}
        what = {"hf": "Hugging Face directory", "onnx": "ONNX graphs"}.get(options.format, options.format)
        words = f"{what}, verified, in {run.folder / 'model'}"
        return Outcome(words, {"format": options.format, **facts})

    def shown(self, recipe: Recipe) -> dict[str, Any]:
        return super().shown(recipe) | _named_schedule(recipe)

    def check_way(self, folder: Path, owned: Collection[Path], ours: bool, inputs: Inputs, hint: str) -> None:
        target = folder / "model"
        if files.present(target) and not ours and folder / self.writes["model"] not in owned:
            check_holds_no_input(target, inputs)
            raise UsageError(f"{target} exists already", hint)
        check_target(target, True, inputs)


STEPS: dict[str, Step] = {
    step.name: step for step in (Calibrate(), Analyze(), Budget(), Search(), Evaluate(), Export())
}
"""Every step by the name of its section, in the order in which they run."""


def _schedule(run: Run) -> tuple[str, Schedule] | None:
    """Name and schedule that the run evaluates and exports: the recipe's, else the search's, else the calibration's.

    None where there is neither; an exported directory carries its own.
    """
    if run.recipe.schedule.names_one:
        return schedule_of(run.recipe.schedule, run.recipe.model)
    if (found := run.result("search")) is not None:
        return found["best"], Schedule.from_dict(found["schedule"])
    calibration = run.result("calibrate")
    if calibration is None:
        return None
    k = calibration["withdrawal_layer"]
    return "calibrated" if k is None else f"K={k}", Schedule.from_dict(calibration["schedule"])


def _from_calibration(run: Run) -> bool:
    """Whether the schedule is the calibration's."""
    return not run.recipe.schedule.names_one and run.result("search") is None


def _seen(run: Run) -> CalibratedOn | None:
    """The samples that had a say in the schedule, which an evaluation leaves out."""
    found = [one for step in ("calibrate", "search") if (one := run.result(step)) is not None]
    return {"samples": [sample for one in found for sample in one["samples"]]} if found else None


def _named_actions(recipe: Recipe) -> list[Any]:
    """The schedule that a recipe names, as a part of what a step depends on."""
    named = schedule_of(recipe.schedule, recipe.model)
    return [named[1].to_dict()] if named else []


def _named_schedule(recipe: Recipe) -> dict[str, Any]:
    """How a recipe names a schedule, for the plan."""
    section = recipe.schedule
    named = [str(one) for one in (section.file, section.layer, section.method) if one is not None]
    return {"schedule": named[0]} if named else {}


def _verify(run: Run, directory: Path) -> dict[str, Any]:
    from vtwcli.export.formats import verify

    model = run.recipe.model
    base = model.name if model.name == "demo" or Path(model.name).exists() else None
    report = verify(directory, base=base, device=model.device)
    return {key: report[key] for key in ("compared_with", "max_logit_difference")}


def is_run_file(name: str) -> bool:
    """Whether a run may have made a file or directory of this name at the top of its output directory."""
    made = {Path(file).parts[0] for step in STEPS.values() for file in step.writes.values()}
    partial = [re.escape(step.partial) for step in STEPS.values() if step.partial]
    kept = re.fullmatch(rf"\.({'|'.join(partial)})\.\d+", name) is not None
    return name in made | {RUN, RECIPE, SUMMARY, LOCK} or kept or staging.is_stage(name)


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
    lacking = [lack for step in STEPS.values() if step.name in wanted and (lack := step.lacks(recipe))]
    problems = [UsageError(f"{name}: {message}", hint) for message, hint in lacking]
    if wanted and "eval" not in wanted and any(limit is not None for _, limit in recipe.gates):
        problems.append(
            UsageError(f"{name}: gates: there is nothing that they judge", "add the section eval")
        )
    return problems + _too_few(recipe, wanted, name)


def _too_few(recipe: Recipe, wanted: Collection[str], name: str) -> list[UsageError]:
    """Steps that shall prove more than as many samples as are asked for ever can."""
    from vtwcli.measure.promised import needed, promise_of

    searched = recipe.calibrate.method != "vtw"
    proofs = {
        "calibrate": needed(promise_of(recipe.calibrate), searched),
        "search": needed(promise_of(recipe.search), True),
        "eval": needed(gates.promise_of(recipe.gates)),
    }
    found = []
    for step, least in proofs.items():
        limit = getattr(recipe, step).limit
        most = sum(spec.limit or limit for spec in recipe.data) or limit
        if step in wanted and most < least:
            wanting = f"what is to be proved needs at least {least} samples of each task"
            message = f"{name}: {step}.limit is {limit}, and {wanting}"
            found.append(UsageError(message, "a larger limit or a larger risk"))
    return found


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
