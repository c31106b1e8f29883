"""Gates: what an evaluation must show before a schedule counts as good enough. Judges a result document."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vtwcli.recipe.recipe import GatesSection
from vtwcli.results.evaluation import EvaluatedSchedule, Gate, GateName

# name in the recipe -> what it looks at in words, and how to find it in a schedule's row of an evaluation
_MEASURES: dict[GateName, tuple[str, Callable[[EvaluatedSchedule], float | None]]] = {
    "max_drop": (
        "drop",
        lambda row: None if row["worst_difference"] is None else max(0.0, -row["worst_difference"]),
    ),
    "max_kl": ("mean KL", lambda row: row["kl_answer"]),
    "min_agreement": ("top-1 agreement", lambda row: row["top1_agreement"]),
    "max_flops": ("share of FLOPs", lambda row: row["cost"]["flops_ratio"][row["cost"]["convention"]]),
}


def check(schedules: Mapping[str, EvaluatedSchedule], limits: GatesSection) -> list[Gate]:
    """Each gate that was asked for, by schedule: what was found, what is allowed, and whether it passes.

    A gate for which nothing was measured does not pass: ``found`` is None, for example the drop of a metric where no
    sample has a reference answer.

    Args:
        schedules: ``schedules`` of an evaluation's result document.
        limits: the gates; those that are None are not asked for.
    """
    found: list[Gate] = []
    for name, row in schedules.items():
        for gate, (_, measure) in _MEASURES.items():
            allowed = getattr(limits, gate)
            if allowed is None:
                continue
            value = measure(row)
            holds = value is not None and (value >= allowed if gate.startswith("min") else value <= allowed)
            task = row["worst_task"] if gate == "max_drop" else None
            found.append(
                {
                    "schedule": name,
                    "gate": gate,
                    "task": task,
                    "found": value,
                    "allowed": allowed,
                    "passed": holds,
                }
            )
    return found


def sentence(gate: Gate) -> str:
    """One gate in words."""
    verdict = "passed" if gate["passed"] else "FAILED"
    where = f" on {gate['task']}" if gate["task"] else ""
    value = "not measured" if gate["found"] is None else f"{gate['found']:.4g}"
    words = f"{_MEASURES[gate['gate']][0]}{where} {value}, allowed {gate['allowed']:g}"
    return f"gate {gate['gate']} {verdict}: {gate['schedule']}: {words}"
