"""The three parts of a search's samples: to search, to choose, and to test what is promised."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from vtwcli.errors import NotFoundError, UsageError
from vtwcli.machine import distributed
from vtwcli.measure.promised import halved
from vtwcli.measure.study import Study
from vtwcli.models.inputs import encode
from vtwcli.recipe.search import SearchSection


@dataclass(frozen=True)
class Parts:
    """Places of samples with visual tokens in three disjoint parts; those of a task are drawn by the seed.

    Attributes:
        search: in the order in which they are used, a list for each task.
        choose: to choose among what came through.
        guarantee: to test the choice; samples without visual tokens are not looked for here.
        text, visual: mean tokens of a prompt of the first two, rounded.
    """

    search: tuple[tuple[int, ...], ...]
    choose: tuple[int, ...]
    guarantee: tuple[int, ...]
    text: int
    visual: int

    @property
    def looked(self) -> list[int]:
        """All places that search."""
        return [place for mine in self.search for place in mine]

    def first(self, share: float) -> list[int]:
        """Places of this share of each task's samples that search, rounded up."""
        return [place for mine in self.search for place in mine[: ceil(share * len(mine) - 1e-9)]]


def parts_of(study: Study[SearchSection]) -> Parts:
    """The three parts of a study's samples.

    Raises:
        NotFoundError: no sample has a visual token.
        UsageError: a task with too few.
    """
    samples, seed = study.samples, study.options.seed
    ordering, testing = halved(samples, seed)
    choosing, searching = halved([samples[place] for place in ordering], seed)

    def work() -> dict[int, tuple[int, int]]:
        found = {}
        for number, place in distributed.share(ordering):
            one = encode(study.loaded, samples[place])
            visual = int(one.visual.sum())
            found[number] = (visual, one.prompt_length - visual)
        return found

    counts = dict(zip(ordering, distributed.gathered(work), strict=True))
    seeing = [place for place in ordering if counts[place][0]]
    if not seeing:
        raise NotFoundError("no sample has a visual token, so there is nothing to prune", "add images")
    choose = [ordering[n] for n in choosing if counts[ordering[n]][0]]
    look = [ordering[n] for n in searching if counts[ordering[n]][0]]
    tasks = list(dict.fromkeys(samples[place].task for place in seeing))
    for task in tasks:
        if not all(any(samples[place].task == task for place in part) for part in (choose, look)):
            raise UsageError(
                f"a search needs at least 4 samples with images of each task, and {task} has fewer",
                "a larger --limit or more data",
            )
    generator = np.random.default_rng([seed, 1])
    mine = [[place for place in look if samples[place].task == task] for task in tasks]
    orders = tuple(tuple(generator.permutation(places).tolist()) for places in mine)
    visual, text = (round(float(np.mean([counts[place][i] for place in seeing]))) for i in (0, 1))
    return Parts(orders, tuple(choose), tuple(testing), text, visual)
