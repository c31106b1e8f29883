"""Attention weights of a few rows, by running a layer's own attention again for them."""

from __future__ import annotations

import copy
from typing import Any

import torch

from vtwcli.runtime.contract import CACHE_NAMES, LENT, PruningError, borrows, cache_argument, strange
from vtwcli.runtime.rows import Tensor, take, take_positions

not_compiled = torch.compiler.disable  # hooks decide by values, so under torch.compile they run as they are


class _Fixed:
    """A cache of one layer whose entries are all there already."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.entries = (keys, values)
        self.asked = 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As a cache's; the new entries are among the old ones."""
        self.asked += 1
        return self.entries

    def get_seq_length(self, *args: Any) -> int:
        """Nothing stands before the rows that run."""
        return 0


def check_weights(module: Any) -> None:
    """Refuse to ask a module again whose weights are there only while it is called.

    Raises:
        PruningError: they are offloaded.
    """
    if any(p.is_meta for p in module.parameters()):
        raise PruningError("scores and conditions do not go with weights offloaded to CPU or disk")


def row_weights(
    module: Any, given: dict[str, Any], index: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor
) -> Tensor:
    """Attention weights [B, H, Q, T] of the rows ``index`` [B, Q], over the keys and values of T columns.

    The module's own code runs for these rows, on its eager path because only that one returns the weights: q K over
    H x Q x T, whatever attention the layer itself uses.

    Args:
        module: an attention module.
        given: its arguments.
        mask: what is added to the scores, [B, 1, Q, T].

    Raises:
        PruningError: an attention that is not understood.
    """
    weights = attend(running_as(module, "eager"), given, index, mask, keys, values)[1]
    if weights is None:
        raise strange("the eager attention of this model returns no weights")
    return weights


def running_as(module: Any, kind: str) -> Any:
    """An attention module of its own that runs another attention implementation, in inference."""
    one = copy.copy(module)  # the weights are shared; the configuration is its own: no other thread sees it
    one.config = copy.copy(module.config)
    one.config._attn_implementation = kind
    one.training = False
    one.__dict__.pop("forward", None)  # as wrapped by accelerate it would run the original
    return one


def attend(
    module: Any, given: dict[str, Any], index: Tensor, mask: Tensor | None, keys: Tensor, values: Tensor
) -> Any:
    """Run an attention module for the rows ``index`` [B, Q] of what it was ``given``, over these keys and values."""
    hidden = given["hidden_states"]
    given = {name: value for name, value in given.items() if name not in CACHE_NAMES}
    given |= {"hidden_states": take(hidden, index, 1), "attention_mask": mask}
    take_positions(given, index, hidden.shape[1], module)
    given[cache_argument(module)] = fixed = _Fixed(keys, values)
    if LENT in given:
        given[LENT] = {module.layer_type: (keys, values)}
    output = module.forward(**given)
    if fixed.asked != (not borrows(module)) or not isinstance(output, tuple) or len(output) < 2:
        raise strange("the attention of this model does not ask its cache once, or returns no tuple")
    return output
