"""Actions as sentences, put together from what ``words`` says of each word."""

from __future__ import annotations

from vtwcli.schedule.rules import parameters
from vtwcli.schedule.schedule import Action, Freeze, Keep, Mute, Select, When, Withdraw
from vtwcli.schedule.words import GUIDE, OF_ATTENTION, TOWER, given, row


def describe(action: Action, layers: int) -> str:
    """An action as a sentence.

    Args:
        layers: number of decoder layers of the model.
    """
    says = row("action", action.action).says
    if isinstance(action, Mute | Freeze):
        last = action.until - 1
        span = f"layer {last}" if action.at == last else f"layers {action.at}-{last}"
        if isinstance(action, Mute):
            during = row("during", action.during).says
            span += f" {during}" if during else ""
            slots = (("readers", action.readers), ("columns", action.columns), ("sink", action.sink))
            says = says.format(*(row(*slot).says.format(action.steps) for slot in slots))
            says += ", those nearer are read in both directions" if action.both_ways else ""
        return f"In {span} {says}."
    if action.at != "auto" and action.at >= layers:
        return "No visual token leaves."
    if isinstance(action, Keep):
        says = says.format(_selection(action.select))
        if action.positions != "original":
            says += f"; {row('positions', action.positions).says}"
        if action.rest is not None:
            says += f"; {row('merge', action.rest.merge).says}"
        if action.every is not None:
            begins = row("every", "every").says.format(action.every)
            return f"{begins}from {_start(action, layers)} {says}."
    return f"From {_start(action, layers)} {says}."


def _start(action: Withdraw | Keep, layers: int) -> str:
    if action.at != "auto":
        return f"layer {action.at} of {layers} on"
    assert action.when is not None  # the schedule's rules
    after = f", looked for behind layer {action.after}" if action.after is not None else ""
    return f"{row('at', 'auto').says.format(_condition(action.when))}{after},"


def _condition(when: When) -> str:
    [word] = given("condition", vars(when))
    text = row("condition", word).says.format(getattr(when, word))
    if when.layers > 1:
        text += f", for the {when.layers}. time" + (" in a row" if when.consecutive else "")
    return text


def _selection(select: Select) -> str:
    [word] = given("amount", vars(select))
    amount = row("amount", word).says.format(getattr(select, word))
    score = row("score", select.score)
    if score.needs == TOWER:
        values = parameters(vars(select))
        says = score.says.format(
            **{key: row(key, x).says if isinstance(x, str) else x for key, x in values.items()}
        )
    elif score.needs == GUIDE:
        says = score.says.format(parameters(vars(select)).get("guide") or "a second model")
    else:
        says = score.says.format(row("rows", select.rows).says)
    said = [] if select.layer == "before" else [row("layer", select.layer).says]
    said += [row(key, key).says.format(getattr(select, key)) for key in OF_ATTENTION if getattr(select, key)]
    return f"{amount} ({', '.join([says, *said])})"
