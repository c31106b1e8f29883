"""Where the tokens of a generation are, and what it remembers of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import UsageError


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a forward pass are.

    Attributes:
        attended: which positions are no padding, bool [B, S].
        visual: which are visual tokens, bool [B, S].
        positions: position ids [B, S], or [3, B, S] where images have rows and columns.
    """

    attended: np.ndarray
    visual: np.ndarray
    positions: np.ndarray

    def last(self) -> np.ndarray:
        """The place of each row's last token, [B]."""
        return last_places(self.attended)

    def next_position(self) -> np.ndarray:
        """The position of the token that follows each row, [B]: one behind the largest."""
        reached = np.where(self.attended, self.positions, -1)
        return reached.reshape(-1, *self.attended.shape).max((0, 2)) + 1


@dataclass
class State:
    """What a generation carries from step to step.

    Attributes:
        masks: for each mask input which cached positions are no padding, [B, P] of 0 and 1.
        position: position of the next token, [B].
        cache: present keys and values by their input name, on the device of the session.
    """

    masks: dict[str, np.ndarray]
    position: np.ndarray
    cache: dict[str, Any] = field(default_factory=dict)

    def cache_lengths(self) -> list[int]:
        """Entries of each layer's keys, by layer."""
        keys = {name.split(".")[1]: value for name, value in self.cache.items() if name.endswith(".key")}
        return [int(keys[layer].shape()[2]) for layer in sorted(keys, key=int)]

    def cache_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(int(value.numpy().nbytes) for value in self.cache.values())

    def attend(self, name: str, attended: np.ndarray) -> np.ndarray:
        """Append new positions to a mask and return it whole."""
        new = attended.astype(np.int64)
        self.masks[name] = np.concatenate([self.masks[name], new], 1) if name in self.masks else new
        return self.masks[name]


def last_places(attended: np.ndarray) -> np.ndarray:
    """The place of each row's last token, [B], of those that are ``attended`` [B, S]."""
    return attended.shape[1] - 1 - np.argmax(attended[:, ::-1], 1)


def grid_positions(visual: np.ndarray, attended: np.ndarray, grids: np.ndarray, merge: int) -> np.ndarray:
    """Positions along time, row and column, [3, B, S]; text counts on, images hold their grid.

    An image of t x h x w merged patches that begins at position p has (p + time, p + row, p + column); the text
    behind it goes on at p + max(h, w). Qwen2-VL, arXiv:2409.12191.

    Args:
        visual: which positions are visual tokens [B, S].
        attended: which are no padding [B, S].
        grids: time, rows and columns of each image in patches [N, 3].
        merge: patches merged along each side of a visual token.
    """
    positions = np.zeros((3, *visual.shape), dtype=np.int64)
    image = iter(grids)
    for row in range(len(visual)):
        places = np.flatnonzero(attended[row])
        at, start = 0, 0
        while at < len(places):
            if not visual[row, places[at]]:
                positions[:, row, places[at]] = start
                at, start = at + 1, start + 1
                continue
            grid = next(image, None)
            if grid is None:
                raise UsageError("the prompt has more images than image_grid_thw")
            t, h, w = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
            block = places[at : at + t * h * w]
            if len(block) < t * h * w or not visual[row, block].all():
                raise UsageError(
                    f"an image of {t * h * w} visual tokens has fewer placeholders in the prompt"
                )
            positions[:, row, block] = start + np.indices((t, h, w)).reshape(3, -1)
            at, start = at + t * h * w, start + max(h, w)
    return positions
