"""Gates: what an evaluation must show before a schedule counts as good enough. Judges a result document.

The gate ``risk`` has the meaning of the calibration's policy ``guarantee`` with the loss ``tokens``: a sample loses the
share of its answer's tokens whose first choice is no longer the full model's. It passes if the evaluation's samples
prove, with the confidence, that the mean loss of every task over all inputs like them is at most the risk. Each
schedule is judged by itself: of several that pass, the chance that one does wrongly is up to the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vtwcli.judge.guarantee import Promise
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

CONFIDENCE = 0.95
"""Of the gate ``risk``, where none is asked for."""


def promise_of(limits: GatesSection) -> Promise | None:
    """What the gate ``risk`` wants proved; None where it is not asked for."""
    if limits.risk is None:
        return None
    return Promise(limits.risk, CONFIDENCE if limits.confidence is None else limits.confidence)


def check(schedules: Mapping[str, EvaluatedSchedule], limits: GatesSection) -> list[Gate]:
    """Each gate that was asked for, by schedule: what was found, what is allowed, and whether it passes.

    A gate for which nothing was measured does not pass: ``found`` is None, for example the drop of a metric where no
    sample has a reference answer.

    Args:
        schedules: ``schedules`` of an evaluation's result document.
        limits: the gates; those that are None are not asked for.
    """
    found: list[Gate] = []
    promise = promise_of(limits)
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
        if promise is not None:
            found.append(_risk(name, row.get("losses") or {}, promise))
    return found


def _risk(schedule: str, losses: Mapping[str, Sequence[float]], promise: Promise) -> Gate:
    """The gate ``risk``, by the task of which the least can be proved."""
    bounds = {task: promise.bound(lost) for task, lost in losses.items()}
    worst = max(bounds, key=lambda task: bounds[task], default=None)
    return {
        "schedule": schedule,
        "gate": "risk",
        "task": worst,
        "found": None if worst is None else bounds[worst],
        "allowed": promise.risk,
        "passed": bool(losses) and all(promise.p_value(lost) <= promise.delta for lost in losses.values()),
        "confidence": promise.confidence,
        "samples": 0 if worst is None else len(losses[worst]),
    }


def sentence(gate: Gate) -> str:
    """One gate in words."""
    verdict = "passed" if gate["passed"] else "FAILED"
    where = f" on {gate['task']}" if gate["task"] else ""
    if gate["gate"] == "risk" and gate["found"] is not None:
        words = (
            f"at most {gate['found']:.4g} of an answer's tokens change{where} with {100 * gate['confidence']:g} % "
            f"confidence, from {gate['samples']} samples; allowed {gate['allowed']:g}"
        )
        return f"gate risk {verdict}: {gate['schedule']}: {words}"
    value = "not measured" if gate["found"] is None else f"{gate['found']:.4g}"
    what = "risk" if gate["gate"] == "risk" else _MEASURES[gate["gate"]][0]
    words = f"{what}{where} {value}, allowed {gate['allowed']:g}"
    return f"gate {gate['gate']} {verdict}: {gate['schedule']}: {words}"
