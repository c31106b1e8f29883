"""An exit without training, after DyVTE (arXiv 2411.19628): visual tokens leave once the last row reads them no more.

DyVTE asks a trained gate behind each layer whether visual tokens may go. This asks the attention instead: how much of
the last row's goes to the visual tokens that are there, mean over heads. Once it was below a threshold in so many
layers, all visual tokens leave at the next. Every sample has its own layer. No threshold is published, and the default
is no more than a place to start from; ``vtw calibrate --method exit`` fits it.

One sweep measures withdrawal at every layer, and so labels each sample: the first layer from which on its own KL stays
at or under eta. Until a sample leaves it is the full model's, so the attention of that says at which layer it leaves
under any rule, and the sweep at which KL. For each number of layers to be below, and each layer to look behind, the
thresholds tried are those at which a share of the samples, of any task where the worst one decides, leaves before its
label, and one that all are below: withdrawal at a fixed layer. Those remain than which no other is both closer and
earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from vtwcli.methods.method import Alone, Answers, Candidate, Grid, Method, Shape, Style
from vtwcli.schedule.intervention import Intervention
from vtwcli.schedule.schedule import Schedule, When, Withdraw

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of a comparison
LAYERS = (1, 2, 4)
EARLY = (0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)  # shares of samples that leave before their label


class Exit(Method):
    """Withdraw at ``auto``, when the last row's attention to vision is low."""

    key: ClassVar[str] = "exit"
    title: ClassVar[str] = "exit by attention"
    finds: ClassVar[str | None] = "its threshold, its number of layers and where it begins to look"
    searched: ClassVar[tuple[str, ...]] = ("threshold", "exit_layers", "after")
    leaves_alone: ClassVar[bool] = True
    style: ClassVar[Style] = Style("#E69F00", "h", "exit by attention, after DyVTE")

    threshold: float = Field(
        0.1, ge=0, le=1, description="share of attention below which vision is read no more"
    )
    exit_layers: int = Field(2, ge=1, description="how many layers must be below until all tokens leave")
    consecutive: bool = Field(False, description="they must follow one another")
    after: int | None = Field(
        None, ge=0, description="looked for behind this layer; by default from the first on"
    )

    def fitted(self, model: Shape) -> Exit:
        if "after" in self.model_fields_set or model.first_withdrawal < 2:
            return self
        return self.model_copy(update={"after": model.first_withdrawal - 2})

    def schedule(self, **provenance: Any) -> Schedule:
        when = When(attention_below=self.threshold, layers=self.exit_layers, consecutive=self.consecutive)
        action = Withdraw(at="auto", after=self.after, action="withdraw", when=when)
        return Schedule(actions=(action,), provenance={"method": "exit", **provenance})

    def leaves(self, read: NDArray[np.float64]) -> NDArray[np.int64]:
        """The layer at which each sample leaves, the number of layers where none does, [S].

        Args:
            read: the share of the last row's attention that goes to visual tokens in the full model, [S, L].
        """
        import numpy as np

        depth, count = read.shape[1], self.exit_layers
        below = read < self.threshold
        below[:, : self._first] = False
        below[:, depth - 1 :] = False  # behind the last layer there is nowhere to leave
        total = below.cumsum(1)
        if self.consecutive:
            total[:, count:] -= total[:, :-count].copy()
        done = total >= count
        return np.where(done.any(1), done.argmax(1) + 1, depth)

    def bearable(self, read: Sequence[float], label: int) -> float:
        """The largest threshold at which a sample with these shares, [L], does not leave before its label."""
        count = self.exit_layers
        looked = read[self._first : max(label - 1, 0)]
        if len(looked) < count:
            return 1.0
        if not self.consecutive:
            return sorted(looked)[count - 1]
        return min(max(looked[start : start + count]) for start in range(len(looked) - count + 1))

    def _name(self) -> str:
        behind = "" if self.after is None else f" after={self.after}"
        return f"exit a={self.threshold:g} m={self.exit_layers}{behind}"

    @property
    def _first(self) -> int:
        """The first layer that is looked at."""
        return 0 if self.after is None else self.after + 1

    @classmethod
    def compared(cls, model: Shape, grid: Grid, base: Mapping[str, Any]) -> list[Candidate]:
        """Every threshold, with the default number of layers."""
        found = []
        for threshold in THRESHOLDS:
            rule = cls(threshold=threshold)
            varied = {"threshold": threshold, "exit_layers": rule.exit_layers}
            found.append(Candidate(rule._name(), "exit", rule.fitted(model).schedule(), varied))
        return found

    @classmethod
    def ask(cls, model: Shape) -> list[Intervention]:
        """Withdrawal at every layer."""
        return [Intervention("withdraw", k) for k in range(model.depth)]

    @classmethod
    def findings(cls, found: Answers) -> dict[str, Any]:
        """Means over samples: KL of withdrawal at each layer, and the share of attention that goes to vision."""
        depth = len(found.kl)
        read = [sum(one.read[layer] for one in found.samples) / len(found.samples) for layer in range(depth)]
        return {"withdrawal": list(found.kl), "read": read}

    @classmethod
    def candidates(cls, model: Shape, found: Answers, base: Mapping[str, Any]) -> list[Candidate]:
        """The rules on the front of earliness and closeness, of the samples that the sweep has seen."""
        import numpy as np

        read = np.array([one.read for one in found.samples])
        kl = np.array([[*one.kl, 0.0] for one in found.samples])  # whoever never leaves is the full model's
        labels = [label_of(one.kl, found.eta) for one in found.samples]
        groups = _tasks(found.samples) if found.worst_task else [list(range(len(labels)))]
        fixed = {key: base[key] for key in ("consecutive",) if key in base}
        scored = []
        for rule in _rules(cls, model, found.samples, labels, groups, fixed):
            at = rule.leaves(read)
            cost = kl[np.arange(len(at)), at]
            scored.append((float(at.mean()), max(float(cost[group].mean()) for group in groups), rule))
        front, best = [], float("inf")
        for _, worst, rule in sorted(scored, key=lambda one: one[:2]):
            if worst < best:
                varied = {name: getattr(rule, name) for name in cls.searched}
                front.append(Candidate(rule._name(), "exit", rule.schedule(), varied))
                best = worst
        return front

    @classmethod
    def safest_first(cls, front: Sequence[Candidate]) -> list[Candidate]:
        """By the earliest layer at which a sample may leave, the last first; of equals the dearest.

        A rule under which no sample left early need not be safe: some other sample may. Whoever leaves at a late layer
        loses little.
        """

        def earliest(one: Candidate) -> int:
            after = one.parameters["after"]
            return one.parameters["exit_layers"] + (0 if after is None else after + 1)

        return sorted(super().safest_first(front), key=earliest, reverse=True)


def label_of(kl: Sequence[float], eta: float, least: int = 0) -> int:
    """The first layer, not before ``least``, from which on a sample's own KL stays at or under eta.

    Args:
        kl: of withdrawal at each layer, nats, [L].

    Returns:
        L where it exceeds eta even at the last.
    """
    label = len(kl)
    while label > least and kl[label - 1] <= eta:
        label -= 1
    return label


def _rules(
    made: type[Exit],
    model: Shape,
    samples: Sequence[Alone],
    labels: Sequence[int],
    groups: Sequence[Sequence[int]],
    fixed: Mapping[str, Any],
) -> list[Exit]:
    """All that are weighed, each once; of those that do the same the simplest first."""
    import numpy as np

    found = []
    starts = [None, *range(model.depth - 2)]
    for after in starts[max(0, model.first_withdrawal - 1) :]:
        found.append(made(threshold=1.0, exit_layers=1, after=after, **fixed))
        for count in LAYERS:
            rule = made(threshold=1.0, exit_layers=count, after=after, **fixed)
            bearable = [rule.bearable(one.read, label) for one, label in zip(samples, labels, strict=True)]
            by_group = [np.array(bearable)[group] for group in groups]
            levels = {
                _floor(min(np.quantile(one, early, method="lower") for one in by_group)) for early in EARLY
            }
            found += [rule.model_copy(update={"threshold": level}) for level in sorted(levels - {0.0, 1.0})]
    return found


def _tasks(samples: Sequence[Alone]) -> list[list[int]]:
    """The samples' numbers by task."""
    names = [one.task for one in samples]
    return [[i for i, name in enumerate(names) if name == task] for task in dict.fromkeys(names)]


def _floor(share: float) -> float:
    """Three digits, never more than ``share``: a sample's own share is not below it, however that is rounded."""
    short = float(f"{share:.3g}")
    return short if short < share or share == 1 else float(f"{share * (1 - 1e-3):.3g}")
