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

Its calibration, which no paper describes:

1. Boundary. For each layer d the sweep mutes text's reading of vision in layers 0..d. The boundary S is the first d at
   which this costs more than eta: the layers before it can be muted together.
2. Thresholds. The last row's contributions in the full model say what sizes occur: their quantiles are the thresholds
   of contribution that are tried, because the published 0.2 is a size of one model's values. Tried are S, half of it
   and 0, and several thresholds of the cosine around the published one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from vtwcli.errors import UsageError
from vtwcli.io.section import Section
from vtwcli.methods.method import Answers, Candidate, Grid, Method, Shape, Style
from vtwcli.schedule.intervention import Intervention
from vtwcli.schedule.schedule import Action, Keep, Mute, Schedule, Select, When, Withdraw

# the published one, a stricter one that filters earlier, and laxer ones
LAYER_THRESHOLDS = (0.999, 0.995, 0.98, 0.9)
QUANTILES = (0.5, 0.75, 0.9)  # of contribution; with the published threshold four sizes are tried


class Rule(Section):
    """The published rule's parameters; the defaults are those published for LLaVA-1.5-7B."""

    shallow_mid_layer: int = Field(6, ge=0, description="in the layers before this text does not read vision")
    layer_threshold: float = Field(
        0.995,
        ge=-1,
        le=1,
        description="without some single visual token the attention output of a layer turns (cosine below this): the "
        "first such layer chooses the tokens",
    )
    tokens_threshold: float = Field(
        0.2,
        ge=0,
        description="it chooses those that add more than this (a norm) to what the last token reads",
    )
    exit_threshold: float = Field(
        0.999,
        ge=-1,
        le=1,
        description="without any one of these the output of a layer hardly turns (cosine at least this): such layers "
        "count towards the exit",
    )
    exit_layers: int = Field(2, ge=1, description="after how many such layers all visual tokens leave")
    consecutive: bool = Field(
        False,
        description="such layers must follow one another, as the paper says; its code counts them in all",
    )
    layer0: Literal["7b", "13b"] = Field(
        "7b", description="what is not read in layer 0: as in the published code for the 7b or the 13b model"
    )


class VisiPruner(Rule, Method):
    """The published rule, dynamic: every sample has its own layers and tokens."""

    key: ClassVar[str] = "visipruner"
    title: ClassVar[str] = "VisiPruner"
    paper: ClassVar[str | None] = "2510.17205"
    finds: ClassVar[str | None] = "its boundary and thresholds"
    searched: ClassVar[tuple[str, ...]] = ("shallow_mid_layer", "layer_threshold", "tokens_threshold")
    style: ClassVar[Style] = Style("#D55E00", "s", "VisiPruner")

    def schedule(self, **provenance: Any) -> Schedule:
        actions: list[Action] = []
        if self.shallow_mid_layer > 0 and self.layer0 == "7b":
            actions.append(_mute(0, 1, sink="first"))
            actions.append(_mute(0, 1, readers="visual"))
        elif self.shallow_mid_layer > 0:
            actions.append(_mute(0, 1, readers="visual"))
            actions.append(_mute(0, 1, columns="first_half"))
        if self.shallow_mid_layer > 1:
            actions.append(_mute(1, self.shallow_mid_layer))
        chosen = Select(score="contribution", above=self.tokens_threshold)
        below = When(cosine_below=self.layer_threshold)
        above = When(cosine_above=self.exit_threshold, layers=self.exit_layers, consecutive=self.consecutive)
        actions.append(
            Keep(at="auto", after=self.shallow_mid_layer, action="keep", select=chosen, when=below)
        )
        actions.append(Withdraw(at="auto", action="withdraw", when=above))
        return Schedule(actions=tuple(actions), provenance={"method": "visipruner", **provenance})

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """Shallow boundaries 0 and, as published, 6 of 32 layers, with every threshold of the grid."""
        found = []
        for shallow in sorted({0, round(model.depth * 6 / 32)}):
            # the rule keeps two layers behind its boundary at the earliest
            shallow = max(shallow, model.first_withdrawal - 2)
            if shallow > model.depth - 3:
                continue
            for threshold in grid.thresholds:
                varied: dict[str, Any] = {"shallow_mid_layer": shallow, "tokens_threshold": threshold}
                schedule = cls(**{**base, **varied}).schedule()
                name = f"visipruner S={shallow} t={threshold:g}"
                found.append(Candidate(name, "visipruner", schedule, varied))
        return found

    @classmethod
    def ask(cls, model: Shape) -> list[Intervention]:
        least = _least(model)
        if model.depth < least + 3:
            raise UsageError(f"VisiPruner needs at least {least + 3} layers, the model has {model.depth}")
        return [Intervention("mute", 0, d + 1) for d in range(model.depth)]

    @classmethod
    def findings(cls, found: Answers) -> dict[str, Any]:
        boundary = {"layer": shallow_boundary(found), "kl": list(found.kl), "tasks": dict(found.by_task)}
        return {"boundary": boundary}

    @classmethod
    def candidates(cls, model: Shape, found: Answers, base: Mapping[str, Any]) -> list[Candidate]:
        boundary, least = shallow_boundary(found), _least(model)
        rule = cls(**base)
        import numpy as np

        quantiles = np.quantile(found.contribution, QUANTILES)
        sizes = sorted({rule.tokens_threshold, *(float(f"{x:.3g}") for x in quantiles)})
        fixed = rule.model_dump(exclude=set(cls.searched))
        made = []
        for shallow in sorted(
            {min(max(one, least), model.depth - 3) for one in (0, boundary // 2, boundary)}
        ):
            for layer in LAYER_THRESHOLDS:
                for size in sizes:
                    varied: dict[str, Any] = {
                        "shallow_mid_layer": shallow,
                        "layer_threshold": layer,
                        "tokens_threshold": size,
                    }
                    name = f"S={shallow} cos={layer:g} t={size:g}"
                    made.append(Candidate(name, "visipruner", cls(**fixed, **varied).schedule(), varied))
        return made


def shallow_boundary(found: Answers) -> int:
    """S: the first layer that cannot be muted together with all before it; 0 where not even layer 0 can.

    Args:
        found: the sweep's answers to ``VisiPruner.ask``; the mean KL decides, or the worst task's.
    """
    import numpy as np

    curve = np.max(list(found.by_task.values()), axis=0) if found.worst_task else np.asarray(found.kl)
    costly = np.flatnonzero(curve > found.eta)
    return int(costly[0]) if len(costly) else len(curve)


def filter_and_exit(
    minimum: Sequence[float],
    kept: Sequence[int],
    kept_minimum: Sequence[Sequence[float]],
    shallow: int,
    layer_threshold: float,
    exit_threshold: float,
    exit_layers: int,
) -> tuple[int | None, int | None]:
    """VisiPruner's two boundaries of one sample, read off the full model's layers.

    From layer shallow + 1 on, the first layer in which some visual token's cosine is under ``layer_threshold``
    filters: from the next layer on there are its critical tokens only. Behind it, the ``exit_layers``-th layer (in
    total, as in the published code) in which every kept token's cosine is at least ``exit_threshold`` ends them: from
    the next layer on there are none. Under the schedule itself the later layers see fewer tokens, so its exit may
    differ from this one.

    Args:
        minimum: smallest cosine of any visual token, [L].
        kept: number of critical tokens of each layer, [L].
        kept_minimum: [L][L]; row f, column d: smallest cosine in layer d of the critical tokens of layer f.
        shallow: the boundary between shallow and middle layers.

    Returns:
        The first layer with kept tokens only and the first layer without visual tokens; None where the condition
        never holds. L means behind the last layer.
    """
    filters = [d for d in range(shallow + 1, len(minimum)) if minimum[d] < layer_threshold]
    if not filters:
        return None, None
    f = filters[0]
    if not kept[f]:
        return f + 1, f + 1
    quiet = [d for d in range(f + 1, len(minimum)) if kept_minimum[f][d] >= exit_threshold]
    return f + 1, quiet[exit_layers - 1] + 1 if len(quiet) >= exit_layers else None


def behind(shallow: int, model: Shape, rule: VisiPruner, provenance: Mapping[str, Any]) -> Schedule | None:
    """The rule behind a measured shallow stage: each sample keeps its critical tokens, then none.

    None where the shallow stage leaves no room for it.

    Args:
        shallow: number of shallow layers.
        rule: the thresholds.
    """
    after = max(shallow, model.first_withdrawal - 2)
    if after + 2 >= model.depth:
        return None
    schedule = rule.model_copy(update={"shallow_mid_layer": shallow}).schedule(**provenance)
    actions = tuple(
        one.model_copy(update={"after": after}) if isinstance(one, Keep) else one for one in schedule.actions
    )
    return schedule.model_copy(update={"actions": actions})


def _least(model: Shape) -> int:
    """The earliest boundary: the rule keeps tokens two layers behind it."""
    return max(0, model.first_withdrawal - 2)


def _mute(at: int, until: int, **more: Any) -> Mute:
    return Mute(**{"at": at, "until": until, "action": "mute", "sink": "zero", "during": "prefill", **more})
