"""The answers of a model whose layers are read from disk."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vtwcli.data.sample import Sample, answer_tokens
from vtwcli.io import console
from vtwcli.machine.libraries import quiet_libraries
from vtwcli.machine.memory import memory_available
from vtwcli.measure.batches import SHARE, answer_bytes
from vtwcli.models.generation import spelled
from vtwcli.models.inputs import encode_batch
from vtwcli.models.loading import LoadedModel
from vtwcli.sweep.decode import decode
from vtwcli.sweep.layers import LayerSource


def streamed_answers(
    loaded: LoadedModel, source: LayerSource, batches: Sequence[Sequence[Sample]], longest: int
) -> list[list[tuple[str, Tensor]]]:
    """As ``models.generation.generate_batches``, by passes over the layers, one for each token of the longest answer.

    All batches are answered in the same passes, as far as memory has room for their keys and values.

    Raises:
        NotFoundError: a sample that cannot be encoded, or numbers that are not finite.
    """
    tokens = [answer_tokens(part, longest) for part in batches]
    longest = max(tokens, default=longest)
    room = memory_available(loaded.device) * SHARE
    groups: list[list[int]] = []
    free, inputs = 0.0, []
    for number, part in enumerate(batches):
        inputs.append(encode_batch(loaded, part))
        needed = len(part) * answer_bytes(loaded, inputs[-1]["input_ids"].shape[1], tokens[number])
        if not groups or needed > free:
            groups.append([])
            free = room
        groups[-1].append(number)
        free -= needed
    count = sum(map(len, batches))
    groups_of = f" of each of {len(groups)} groups that memory has room for" if len(groups) > 1 else ""
    console.note(
        f"{count} answers are generated from layers on disk: all {source.depth} layers are read once for every token "
        f"of the longest answer{groups_of}, at most {len(groups) * longest} times; --answers reference reads no more "
        "than the sweep does"
    )
    found: list[list[tuple[str, Tensor]]] = []
    with console.progress("tokens of answers", total=len(groups) * longest) as task, quiet_libraries():
        for done, group in enumerate(groups, 1):
            names = [[sample.id for sample in batches[number]] for number in group]
            said = decode(loaded, source, [inputs[number] for number in group], names, longest, task)
            for number, rows in zip(group, said, strict=True):
                found.append([spelled(loaded, row[: tokens[number]]) for row in rows])
            task.advance(done * longest - task.done)
    return found
