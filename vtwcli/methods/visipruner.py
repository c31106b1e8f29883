"""VisiPruner: shallow layers do not read vision, a few critical tokens carry it on, and they leave when they are read
no more (arXiv 2510.17205; where paper and code differ, the code).

With S the shallow boundary, in the prefill of each sample:

- Layer 0. Form ``7b``: text rows' attention to visual columns is summed onto the first visual column, and visual rows
  do not read visual columns. Form ``13b``: visual rows do not read visual columns, and text rows do not read the first
  half of them.
- Layers 1..S-1: text rows' attention to visual columns is set to zero behind the softmax, without renormalising.
- From layer S+1 on, with c_i the last row's contribution of visual token i and o its attention output: in the first
  layer with some cos(o - c_i, o) < ``layer_threshold`` the tokens with ||c_i||_2 > ``tokens_threshold`` are chosen;
  from the next layer on only they exist.
- Behind that, once ``exit_layers`` layers had cos(o - c_i, o) >= ``exit_threshold`` for every chosen token, all leave
  at the next layer. The published code counts these layers in total, the paper speaks of consecutive ones.

Tokens behind the prompt read all visual tokens that their layer still has, as in the published code, which mutes
prompts only.
"""

from __future__ import annotations

from typing import Any, Literal

from vtwcli.schedule.schedule import Action, Keep, Mute, Schedule, Select, When, Withdraw


def schedule(
    shallow_mid_layer: int = 6,
    layer_threshold: float = 0.995,
    tokens_threshold: float = 0.2,
    exit_threshold: float = 0.999,
    exit_layers: int = 2,
    consecutive: bool = False,
    layer0: Literal["7b", "13b"] = "7b",
    **provenance: Any,
) -> Schedule:
    """The rule as a schedule; the defaults are those published for LLaVA-1.5-7B.

    Args:
        shallow_mid_layer: S; 0 mutes nothing.
        layer_threshold: a cosine below it makes a layer the one that chooses.
        tokens_threshold: norm of contribution above which a token is kept; it grows with the model's values, so it
            is the parameter to calibrate on another model.
        exit_threshold: a layer whose cosines are all at least this no longer reads vision.
        exit_layers: how many such layers it takes.
        consecutive: they must follow one another.
        layer0: form of the muting in layer 0.
    """
    actions: list[Action] = []
    if shallow_mid_layer > 0 and layer0 == "7b":
        actions.append(_mute(0, 1, sink="first"))
        actions.append(_mute(0, 1, readers="visual"))
    elif shallow_mid_layer > 0:
        actions.append(_mute(0, 1, readers="visual"))
        actions.append(_mute(0, 1, columns="first_half"))
    if shallow_mid_layer > 1:
        actions.append(_mute(1, shallow_mid_layer))
    chosen = Select(score="contribution", above=tokens_threshold)
    below = When(cosine_below=layer_threshold)
    above = When(cosine_above=exit_threshold, layers=exit_layers, consecutive=consecutive)
    actions.append(Keep(at="auto", after=shallow_mid_layer, action="keep", select=chosen, when=below))
    actions.append(Withdraw(at="auto", action="withdraw", when=above))
    return Schedule(actions=tuple(actions), provenance={"method": "visipruner", **provenance})


def _mute(at: int, until: int, **more: Any) -> Mute:
    return Mute(**{"at": at, "until": until, "action": "mute", "sink": "zero", "during": "prefill", **more})
