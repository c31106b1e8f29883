"""Drawing the next token."""

from __future__ import annotations

import numpy as np

from .errors import UsageError


def sample(
    logits: np.ndarray,
    random: np.random.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> np.ndarray:
    """Draw one token per row from logits [B, V]; see ``OnnxModel.generate``."""
    if temperature <= 0:
        raise UsageError(
            f"a temperature of {temperature} is not above 0; for the most likely token do not sample"
        )
    drawn = []
    for row in logits.astype(np.float64) / temperature:
        order = np.argsort(-row, kind="stable")
        order = order[: top_k or None]
        weights = np.exp(row[order] - row[order[0]])
        weights /= weights.sum()
        before = np.cumsum(weights) - weights
        weights = np.where(before < top_p, weights, 0.0)
        weights[0] = weights[0] or 1.0
        drawn.append(order[random.choice(len(order), p=weights / weights.sum())])
    return np.array(drawn, dtype=np.int64)
