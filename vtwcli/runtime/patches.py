"""From the patches of a vision tower to the visual tokens that a model makes of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch

from vtwcli.runtime.contract import PruningError
from vtwcli.runtime.rows import Tensor

_UNKNOWN = "how this model makes visual tokens of its vision tower's patches is not known"


def tokens_of(features: Any, given: Mapping[str, Any]) -> list[int]:
    """How many visual tokens each image has, from the rows that the model made of the images."""
    if isinstance(features, torch.Tensor):
        if features.ndim == 3:
            return [features.shape[1]] * features.shape[0]
        grid = given.get("image_grid_thw")
        if grid is None:
            return [features.shape[0]]
        patches = grid.prod(-1)
        return (patches * features.shape[0] // patches.sum()).tolist()
    return [x.numel() // x.shape[-1] for x in features]


class Patches:
    """The way from patches to tokens, for the images of one call.

    Args:
        base: the module that turned pixels into features.
        tower: the module that has the tower's layers.
        first: tokens in front of the patches.
        shape: images and rows of a layer of the tower; towers that pack have one image of all rows.
        features: rows of the language model's input that came out.
        given: the call's arguments.
        packed: arguments of ``pack_image_features``, where the model has tiles.

    Attributes:
        tokens: number of tokens of each image.
        grids: their rows and columns; None where there is no single grid.

    Raises:
        PruningError: the family's way is not known.
    """

    def __init__(
        self,
        base: Any,
        tower: Any,
        first: int,
        shape: tuple[int, int],
        features: Any,
        given: Mapping[str, Any],
        packed: tuple[tuple, dict[str, Any]] | None,
    ) -> None:
        self.base, self.tower, self.first, self.given = base, tower, first, given
        self.packed, (images, rows) = packed, shape
        self.tokens = tokens_of(features, given)
        self.grids: list[tuple[int, int] | None] = [None] * len(self.tokens)
        if packed is not None:
            self._tiles = [x.shape[0] for x in self._packed_features()]
            return
        share, rest = divmod(images * (rows - first), sum(self.tokens))
        self.merged = isqrt(share)
        if rest or self.merged**2 != share:
            raise PruningError(_UNKNOWN)
        grid, areas = given.get("image_grid_thw"), given.get("image_sizes")
        if grid is not None:
            self.grids = [
                (h // self.merged, w // self.merged) if t == 1 else None for t, h, w in grid.tolist()
            ]
        elif areas is not None:
            patch = _number(base.config.vision_config.patch_size)
            areas = areas.tolist() if isinstance(areas, torch.Tensor) else areas
            self.grids = [(h // patch // self.merged, w // patch // self.merged) for h, w in areas]
        else:
            # what the tower takes as one image: models that cut images show it several
            number, rest = divmod(sum(self.tokens), images)
            side = isqrt(number)
            if rest or side**2 != number:
                raise PruningError(_UNKNOWN)
            self.tokens, self.grids = [number] * images, [(side, side)] * images
        if [h * w for h, w in (g for g in self.grids if g)] != [
            n for n, g in zip(self.tokens, self.grids, strict=True) if g
        ]:
            raise PruningError(_UNKNOWN)

    @property
    def direct(self) -> bool:
        """Whether a token is a patch, beside a class token."""
        square = self.given.get("image_grid_thw") is None and self.given.get("image_sizes") is None
        return self.packed is None and self.merged == 1 and square and bool(self.first)

    def check_direct(self) -> None:
        """Refuse what only makes sense where a token is a patch.

        Raises:
            PruningError: it is not.
        """
        if not self.direct:
            raise PruningError(
                "the schedule's score looks at keys or features of patches, and in this model a visual token is "
                "not one patch of a tower with a class token"
            )

    def spread(self, parts: Sequence[Tensor], rows: bool) -> list[Tensor]:
        """Numbers of patches as numbers of tokens, [K, n] for each image; a token has the mean of its patches.

        Args:
            parts: [I, K, S] of each call of a layer's attention.
            rows: they are sums over the rows of attention, of which the mean is meant.
        """
        if self.packed is not None:
            return self._spread_tiles(torch.cat(list(parts)), rows)
        flat = torch.cat([part[:, :, self.first :].transpose(0, 1).flatten(1) for part in parts], 1)
        unit = self.merged**2
        if self.given.get("image_grid_thw") is not None:
            flat = flat.view(flat.shape[0], -1, unit).mean(-1)
            if hasattr(self.tower, "fullatt_block_indexes"):
                order = self._window_order().to(flat.device)
                flat = flat[:, order.argsort()]
            found = list(flat.split(self.tokens, 1))
        else:
            found = []
            for one, grid in zip(flat.split([n * unit for n in self.tokens], 1), self.grids, strict=True):
                assert grid is not None
                high, wide = grid
                blocks = one.view(-1, high, self.merged, wide, self.merged)
                found.append(blocks.mean((2, 4)).flatten(1))
        if rows:
            found = [x / (n * unit + self.first) for x, n in zip(found, self.tokens, strict=True)]
        return found

    def _packed_features(self) -> Sequence[Tensor]:
        assert self.packed is not None
        args, kwargs = self.packed
        return args[0] if args else kwargs["image_features"]

    def _spread_tiles(self, x: Tensor, rows: bool) -> list[Tensor]:
        """Numbers [I, K, S] of tiles go the way of their features; line breaks have 0."""
        assert self.packed is not None
        numbers = x[:, :, self.first :].transpose(1, 2)
        if rows:
            numbers = numbers / x.shape[2]
        lengths = {f.shape[1] for f in self._packed_features()}
        if lengths != {numbers.shape[1]} or sum(self._tiles) != len(numbers):
            raise PruningError(_UNKNOWN)
        args, kwargs = self.packed
        split = list(numbers.split(self._tiles))
        kwargs = dict(kwargs)
        if args:
            args = (split, *args[1:])
        else:
            kwargs["image_features"] = split
        if kwargs.get("image_newline") is not None:
            kwargs["image_newline"] = numbers.new_zeros(numbers.shape[2])
        found, _ = type(self.base).pack_image_features(self.base, *args, **kwargs)
        if [len(one) for one in found] != self.tokens:
            raise PruningError(_UNKNOWN)
        return [one.T for one in found]

    def _window_order(self) -> Tensor:
        """Which token stands where while the tower's layers run."""
        grid, tower = self.given["image_grid_thw"], self.tower
        index = getattr(sys.modules[type(tower).__module__], "get_vision_window_index", None)
        if index is None:  # older releases
            return torch.as_tensor(tower.get_window_index(grid)[0])
        return index(
            grid,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )[0]


def _number(size: Any) -> int:
    return int(size) if isinstance(size, int) else int(size[0])
