"""What happens in front of the language model: images are looked at, some of their tokens stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vtwcli.runtime.call import Call
from vtwcli.runtime.contract import PruningError, given_cache, strange
from vtwcli.runtime.picture import Front, Picked, Picture
from vtwcli.runtime.plan import Plan
from vtwcli.runtime.positions import lower, lowering
from vtwcli.runtime.rows import Tensor, compact
from vtwcli.runtime.selectors import SELECTORS
from vtwcli.runtime.tower import Look, Tower
from vtwcli.schedule.words import kept_count


def tapped(
    plan: Plan, base: torch.nn.Module, text_model: torch.nn.Module, handles: list[Any]
) -> Tower | None:
    """The model's vision tower under the plan's selection, its hooks among ``handles``; None where there is none.

    Raises:
        PruningError: as ``Tower``; the handles are then removed.
    """
    if plan.front is None:
        return None
    needs = SELECTORS[plan.front["score"]].needs(plan.front_parameters)
    try:
        return Tower(base, text_model, needs, handles.append)
    except PruningError:
        for handle in handles:
            handle.remove()
        raise


def shorten(call: Call, tower: Tower, given: dict[str, Any]) -> dict[str, Any]:
    """The language model's arguments ``given`` with what the plan's selection leaves of the images.

    Rows still stand where they stood, and leave at layer 0: what changes is their contents, where a selector
    replaces it, and the position ids, which become those of the shorter prompt. Ids of several axes stay.

    Raises:
        PruningError: the vision tower was not seen, or what it showed does not fit the prompt.
    """
    given = dict(given)
    looks = tower.last()
    if call.visual is not None:
        embeds: Any = given.get("inputs_embeds")
        if not isinstance(embeds, torch.Tensor) or embeds.shape[:2] != call.visual.shape:
            raise strange("the language model gets no inputs_embeds")
        given["inputs_embeds"] = _choose(call, tower, looks, embeds, _flat(given))
        _deepstack(call, given)
    _lower(call, given)
    return given


def _flat(given: dict[str, Any]) -> bool:
    """Whether position ids count tokens, so that those of a shorter prompt are known."""
    ids = given.get("position_ids")
    return ids is None or ids.ndim == 2


def _choose(call: Call, tower: Tower, looks: Sequence[Look], embeds: Tensor, flat: bool) -> Tensor:
    """Let the selector choose for every image; fills ``call.front`` and returns the rows with those replaced."""
    assert call.visual is not None and call.real is not None and call.plan.front is not None
    visual = call.visual.to(embeds.device)
    stays = torch.zeros_like(visual)
    embeds, select = embeds.clone(), call.plan.front
    selector, parameters = SELECTORS[select["score"]], call.plan.front_parameters
    kept: list[list[list[int]]] = []
    for row, images in enumerate(_shared(visual.sum(1).tolist(), looks)):
        places = visual[row].nonzero()[:, 0]
        kept.append([])
        if not images:
            continue
        behind = torch.arange(len(visual[row]), device=embeds.device) > places[-1]
        question = embeds[row, behind & call.real[row].to(embeds.device)]
        for look, where in zip(images, places.split([look.tokens for look in images]), strict=True):
            rows = embeds[row, where]
            if not torch.equal(rows[0], look.head.to(rows)):
                raise _unseen("other", "these")
            picture = Picture(
                rows.detach(), question.detach(), look.grid, look.cls, look.received, look.keys,
                look.queries, look.features, look.depth,
            )  # fmt: skip
            with torch.no_grad():
                count = None if select.get("found") else kept_count(select, look.tokens)
                picked = selector.choose(picture, count, **parameters)
                rows = _rows(picked, rows, tower)
            chosen = picked.kept.to(where.device)
            slots, order = chosen.sort()
            # under ids of several axes a row has its own token's place; else only the order counts
            embeds[row, where[slots]] = (rows if flat else rows[order.to(rows.device)]).to(embeds.dtype)
            stays[row, where[chosen]] = True
            kept[-1].append((chosen if flat else slots).tolist())
    stays = stays.to(call.visual.device)
    call.front = Front(stays, kept, call.visual & ~stays if flat else None)
    return embeds


def _rows(picked: Picked, rows: Tensor, tower: Tower) -> Tensor:
    """The rows [n, E] that stand for the kept tokens.

    Raises:
        PruningError: what was chosen cannot be, or the family cannot project other features.
    """
    kept = picked.kept.to(rows.device)
    fits = kept.ndim == 1 and len(kept.unique()) == len(kept)
    if not fits or (len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < len(rows)):
        raise PruningError(f"a selection of {len(rows)} visual tokens gave {kept.tolist()}")
    if picked.embeds is not None:
        found = picked.embeds
    elif picked.rows is not None:
        projector = tower.projector()
        weight = next(projector.parameters())
        kind = weight.dtype if weight.is_floating_point() else rows.dtype  # packed weights are whole numbers
        found = projector(picked.rows[None].to(weight.device, kind))[0].to(rows.device)
    else:
        return rows[kept]
    if found.shape != (len(kept), rows.shape[1]):
        raise PruningError(f"a selection of {len(kept)} tokens gave rows of shape {list(found.shape)}")
    return found.to(rows.device)


def _shared(numbers: Sequence[int], looks: Sequence[Look]) -> list[list[Look]]:
    """The images of each sample, given how many visual tokens samples have.

    ``generate`` may show the tower each image once and repeat what came out for several rows of a sample.

    Raises:
        PruningError: the images do not add up to the samples' tokens.
    """
    total, seen = sum(numbers), sum(look.tokens for look in looks)
    repeats = total // seen if seen else 0
    wrong = _unseen(total, seen)
    if not seen or repeats * seen != total or len(numbers) % repeats:
        raise wrong
    waiting, found = list(looks), []
    for row in range(0, len(numbers), repeats):
        own: list[Look] = []
        while sum(look.tokens for look in own) < numbers[row] and waiting:
            own.append(waiting.pop(0))
        if {sum(look.tokens for look in own)} != set(numbers[row : row + repeats]):
            raise wrong
        found += [own] * repeats
    return found


def _unseen(total: Any, seen: Any) -> PruningError:
    return PruningError(
        f"the prompt has {total} visual tokens, and the vision tower was seen to make {seen}; scores of the vision "
        "tower go with images that are given as pixel_values in the same call, and not with videos"
    )


def _lower(call: Call, given: dict[str, Any]) -> None:
    """Give tokens the position ids that they have in the shorter prompt."""
    cache, hidden = given_cache(given), given["inputs_embeds"]
    if not _flat(given) or not isinstance(hidden, torch.Tensor):
        return
    layers = getattr(cache, "layers", None) or [None]
    columns, past = getattr(layers[0], "columns", None), 0 if cache is None else cache.get_seq_length()
    device, length = hidden.device, hidden.shape[1]
    before = None if columns is None else columns.absent
    by = lowering(None if call.front is None else call.front.left, before)
    if by is None or not bool(by.any()):
        return
    ids = given.get("position_ids")
    if ids is None:
        ids = torch.arange(past, past + length, device=device)[None]
    given["position_ids"] = lower(ids.to(device), by)
    if given.get("attention_mask") is None:  # gaps in the ids are not borders between packed sequences
        given["attention_mask"] = torch.ones(hidden.shape[0], past + length, dtype=torch.long, device=device)


def _deepstack(call: Call, given: dict[str, Any]) -> None:
    """Let the rows that vision is added to in the first layers be those that stay."""
    more = given.get("deepstack_visual_embeds")
    if more is None:
        return
    assert call.visual is not None and call.front is not None
    mask = given["visual_pos_masks"]
    stays = (call.present & (~call.visual | call.front.stays)) | call.is_last
    rows = compact(stays, stays)
    assert rows.index is not None
    taken = stays.to(mask.device)[mask]
    given["visual_pos_masks"] = (mask.to(rows.index.device).gather(1, rows.index) & rows.query).to(
        mask.device
    )
    given["deepstack_visual_embeds"] = [x[taken.to(x.device)] for x in more]
