"""A guarantee in words; reads result documents, computes nothing."""

from __future__ import annotations

from vtwcli.results.calibration import Calibration
from vtwcli.results.guarantee import Guarantee, Tested
from vtwcli.results.search import Search


def rule_words(result: Calibration) -> str:
    """The rule that chose, for a sentence: the policy with what it depends on."""
    promised = result.get("guarantee")
    if promised is None:
        return f"policy {result['policy']}, eta {result['eta']:g}, {result['positions']} positions"
    eta = f" above eta {result['eta']:g}" if promised["loss"] == "kl" else ""
    return (
        f"policy guarantee, risk {promised['risk']:g}, confidence {promised['confidence']:g}, "
        f"loss {promised['loss']}{eta}, {result['positions']} positions"
    )


def promise_words(result: Calibration | Search) -> str:
    """What is promised of the choice, over which inputs, and what is not; empty where nothing is.

    Where no candidate held, why the first did not.
    """
    promised = result.get("guarantee")
    if promised is None:
        return ""
    if not any(one["holds"] for one in promised["tested"]):
        return _failed(promised)
    counts = promised["samples"].values()
    many = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{min(counts)}"
    names = ", ".join(promised["samples"])
    each, tasks = (" a task", f"each task ({names})") if len(counts) > 1 else ("", f"the task {names}")
    drawn = "; ".join(promised["population"])
    return (
        f" Promised with {percent(promised['confidence'])} confidence for {tasks}: {risk_words(result, promised)}, on "
        f"inputs drawn independently like the samples of {drawn}; from {many} distinct samples{each} "
        f"({promised['test']} test). Not promised: anything of a single input, of other kinds of input, or of how "
        "good the full model's answers are."
    )


def brief(result: Calibration) -> str:
    """The promise in a plot's legend, with a space in front; empty where there is none."""
    promised = result.get("guarantee")
    if promised is None:
        return ""
    return f" (risk {promised['risk']:g} with {100 * promised['confidence']:g} % confidence)"


def risk_words(result: Calibration | Search, promised: Guarantee) -> str:
    """What happens at most, by the loss that a promise is about."""
    risk = percent(promised["risk"])
    first = result["positions"] == "first"
    forced = result["options"].get("answers")
    along = " along the reference answers" if forced == "reference" or _streamed(result) else ""
    if promised["loss"] == "metric":
        return f"the task's metric drops by at most {promised['risk']:g} on average, gains not counted"
    if promised["loss"] == "kl":
        return f"at most {risk} of answers have a mean KL above {result['eta']:g} nats{along}"
    if first:
        return f"at most {risk} of answers begin with another token"
    if promised["loss"] == "answer":
        return f"at most {risk} of answers have any token changed{along}"
    return f"on average at most {risk} of an answer's tokens change{along}"


def _streamed(result: Calibration | Search) -> bool:
    """Whether layers were streamed, which forces reference answers unless they were to be generated."""
    run = result.get("run")
    return bool(run and run.get("streamed")) and result["options"].get("answers") != "generated"


def _failed(promised: Guarantee) -> str:
    first: Tested = promised["tested"][0]
    worst = max(first["p_value"], key=lambda task: first["p_value"][task])
    name = first.get("candidate") or f"withdrawal at layer {first.get('layer')}"
    return (
        f" The safest candidate, {name}, fails: mean loss {first['loss'][worst]:.3g} on {worst} from "
        f"{promised['samples'][worst]} samples, p = {first['p_value'][worst]:.2g} and at most "
        f"{1 - promised['confidence']:.2g} allowed."
    )


def percent(share: float) -> str:
    """A share as a sentence says it."""
    return f"{100 * share:.6g} %"
