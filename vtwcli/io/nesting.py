"""How large a document is: the values that it stands for, and the levels in which they lie."""

from __future__ import annotations

from typing import Any

DEEPEST = (
    100  # levels of lists and mappings; what transformers does with a config takes several calls a level
)
Location = tuple[str | int, ...]


class MisshapenError(ValueError):
    """A part of a document that is too large; ``path`` leads to it."""

    def __init__(self, path: Location, problem: str) -> None:
        super().__init__(problem)
        self.path = path


class TooDeepError(MisshapenError):
    """Lists and mappings lie too deep inside each other."""

    def __init__(self, path: Location = ()) -> None:
        super().__init__(path, f"lists and mappings lie more than {DEEPEST} levels deep inside each other")


def check_size(node: Any, most: int | None = None, largest: int | None = None) -> None:
    """Refuse a document that is too deep, and one of too many values or with too large a number.

    Args:
        node: lists and mappings; an alias is the node that it names, and stands for all that is in it.
        most: values, aliases followed.
        largest: a whole number.

    Raises:
        TooDeepError, MisshapenError: see above, with the place.
    """
    known: dict[int, tuple[int, int]] = {}  # by identity

    def measured(node: Any, path: Location) -> tuple[int, int]:
        """How many values a node stands for, and how many levels deep they go."""
        if not isinstance(node, dict | list):
            if largest is not None and isinstance(node, int) and not -largest <= node <= largest:
                raise MisshapenError(path, f"a whole number beyond {largest}")
            return 1, 0
        if id(node) not in known:
            if len(path) >= DEEPEST:
                raise TooDeepError(path[:3])
            count, levels = 1, 0
            for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
                more, deeper = measured(inner, (*path, key))
                count, levels = count + more, max(levels, deeper + 1)
                if most is not None and count > most:
                    raise MisshapenError((*path, key), f"aliases stand for more than {most:,} values")
            known[id(node)] = count, levels
        if len(path) + known[id(node)][1] > DEEPEST:
            raise TooDeepError(path[:3])
        return known[id(node)]

    measured(node, ())
