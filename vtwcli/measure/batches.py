"""Who is answered together: batches of samples that are alike in length, as many as memory has room for.

They are formed over all samples before these are split over processes, so that a batch, and with it the last digits
of what comes of it, is the same however many processes there are.
"""

from __future__ import annotations

from collections.abc import Sequence

from vtwcli.data.sample import Sample, answer_tokens
from vtwcli.io import console
from vtwcli.judge.flops import TextShape, kv_bytes
from vtwcli.machine import distributed
from vtwcli.machine.memory import memory_available
from vtwcli.models.inputs import encode
from vtwcli.models.loading import LoadedModel

MOST = 8  # by itself; more save little, and processes are dealt whole batches
SHARE = 0.5
"""Of free memory, for answers: what pictures take and what the allocator wastes is not counted."""


def lengths_of(loaded: LoadedModel, samples: Sequence[Sample]) -> list[int]:
    """Tokens of each sample's prompt; with several processes each encodes its share."""

    def work() -> dict[int, int]:
        return {place: encode(loaded, sample).length for place, sample in distributed.share(samples)}

    return distributed.gathered(work)


def by_length(
    loaded: LoadedModel, samples: Sequence[Sample], tokens: int, size: int | None = None
) -> list[list[int]]:
    """Batches as places of samples, shortest answers and prompts first; all processes must call it, and get the same.

    Samples of one batch have the same longest answer.

    Args:
        loaded: the model; its free memory is that of the process with least.
        samples: all of the command's.
        tokens: longest answer where no task says otherwise.
        size: of a batch; by default ``MOST``, or as many as memory has room for.

    Raises:
        NotFoundError: a sample that cannot be encoded.
    """
    if size == 1 or len(samples) < 2:
        return [[place] for place in range(len(samples))]
    lengths = lengths_of(loaded, samples)
    room = 0.0
    if size is None:
        here = memory_available(loaded.device) * SHARE
        room = min(distributed.gathered(lambda: {distributed.rank(): here}))
    batches: list[list[int]] = []
    longest = [answer_tokens([sample], tokens) for sample in samples]
    for place in sorted(range(len(samples)), key=lambda place: (longest[place], lengths[place], place)):
        alike = bool(batches) and longest[batches[-1][0]] == longest[place]
        count = len(batches[-1]) + 1 if alike else 0
        if size is None:
            fits = count <= MOST and count * answer_bytes(loaded, lengths[place], longest[place]) <= room
        else:
            fits = count <= size
        if count and fits:
            batches[-1].append(place)
        else:
            batches.append([place])
    console.detail(f"{len(samples)} samples are answered in {len(batches)} batches")
    return batches


def answer_bytes(loaded: LoadedModel, length: int, tokens: int) -> int:
    """Bytes that an answer of ``tokens`` tokens to a prompt of ``length`` takes while it is generated.

    Keys and values, the logits that are kept twice, and what a layer computes with.
    """
    shape, size = TextShape.from_config(loaded.model.config), loaded.dtype.itemsize
    cache = kv_bytes(shape, [length + tokens] * shape.layers, size)
    logits = 2 * 4 * tokens * loaded.embedding_rows
    return cache + logits + length * (6 * shape.hidden + 3 * shape.intermediate) * size
