"""How long variants take and how large their caches get, one prompt at a time and in batches.

Every round runs all variants once on the same prompts, each round beginning with another one, so that drifts of the
machine meet all of them; variants are compared round by round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from statistics import median, quantiles

import torch

from vtwcli.data.sample import Sample
from vtwcli.io import console
from vtwcli.judge.statistics import speed_up
from vtwcli.machine import distributed
from vtwcli.machine.memory import is_out_of_memory, memory_available
from vtwcli.measure import costs
from vtwcli.measure.answers import Answer
from vtwcli.measure.variants import FULL, Batch, Scheduled, Variant, batches_of
from vtwcli.models.loading import LoadedModel
from vtwcli.recipe.recipe import EvalSection
from vtwcli.results.evaluation import BatchTiming, Latency, Memory, Time
from vtwcli.schedule.schedule import Schedule

Seconds = tuple[float, float]
"""Of one generation: until the first token of every row is known, and until the last one is."""
Timer = Callable[[int], Seconds]
"""Generates so many tokens a row and tells how long that took."""
Rounds = Mapping[str, Sequence[Seconds]]
"""By variant, full first."""


@dataclass
class Costs:
    """What was measured, by variant, full first.

    Attributes:
        cache: bytes of the KV cache behind the prompt of a sample.
        sample: the place of that sample.
        latency, memory: as in the document; None without timing.
        left_out: sizes of batches that do not fit in memory.
    """

    cache: dict[str, int]
    sample: int
    latency: dict[str, Latency] | None = None
    memory: dict[str, Memory | None] | None = None
    left_out: list[int] = field(default_factory=list)


def measured_costs(
    full: LoadedModel,
    variants: Sequence[Variant],
    samples: Sequence[Sample],
    answers: Sequence[Sequence[Answer]],
    options: EvalSection,
    timing: dict[str, float],
) -> Costs:
    """Cache, memory and times of the full model and the variants.

    Args:
        answers: of the samples, the full model's first; prompts that have visual tokens are taken.
        options: whether and how to time.
        timing: gets the seconds that it took.
    """
    everyone = [Scheduled(FULL, Schedule(), full), *variants]
    seeing = [i for i, row in enumerate(answers) if row[0].visual_per_layer[0]] or [0]
    prompts = [batches_of(full, variants, [samples[i]]) for i in seeing[:2]]
    cache = {v.name: v.cache_bytes(batch) for v, batch in zip(everyone, prompts[0], strict=True)}
    found = Costs(cache, seeing[0])
    if options.timing and distributed.is_main():
        began = time.perf_counter()
        sizes = sorted(set(options.timing_batch))
        batches = "" if sizes == [1] else f", batches of {', '.join(map(str, sizes))}"
        console.note(f"timing prefill and decode{batches}")
        found.memory = {
            v.name: costs.peak_of(partial(v.cache_bytes, batch), full.device)
            for v, batch in zip(everyone, prompts[0], strict=True)
            if isinstance(v, Scheduled)  # ONNX Runtime keeps what it once took, so a second run shows nothing
        }
        _time(found, everyone, prompts, [samples[i] for i in seeing], options, full.device)
        timing["latency"] = time.perf_counter() - began
    return found


def _time(
    found: Costs,
    everyone: Sequence[Variant],
    prompts: Sequence[Sequence[Batch]],
    samples: Sequence[Sample],
    options: EvalSection,
    device: torch.device,
) -> None:
    """Fill in ``latency`` and ``left_out``.

    Args:
        everyone: the variants, full first.
        prompts: single ones, for each variant.
        samples: what batches are made of, in turn.
    """
    tokens = 1 + options.timing_tokens
    peers = [v.name for v in everyone[1:] if isinstance(v, type(everyone[0]))]
    single = rounds([_timers(everyone, prompt) for prompt in prompts], options.repeats, tokens)
    found.latency = latencies(single, tokens, peers)
    for timed_alone in found.latency.values():
        timed_alone["batches"] = []
    taken = _peak((found.memory or {}).get(FULL), found.cache[FULL]) / _places(prompts[0])
    for size in sorted(set(options.timing_batch)):
        try:
            batch, timed = prompts[0], single
            if size > 1:
                batch = batches_of(everyone[0].inputs, everyone[1:], list(islice(cycle(samples), size)))
                _check_room(taken * _places(batch) * len({type(v) for v in everyone}), device)
                timed = rounds([_timers(everyone, batch)], options.repeats, tokens)
            held, peak = _cache_bytes(everyone, batch, tokens, device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found.left_out.append(size)
            console.warn(f"a batch of {size} does not fit in memory, so it is not timed")
            continue
        taken = _peak(peak, held[FULL]) / _places(batch)
        for name, row in throughput(timed, size, tokens, held, peers).items():
            found.latency[name]["batches"].append(row)


def _cache_bytes(
    everyone: Sequence[Variant], batch: Sequence[Batch], tokens: int, device: torch.device
) -> tuple[dict[str, int], Memory]:
    """Bytes of every variant's cache behind the answers, and the full model's peak memory."""
    held: dict[str, int] = {}

    def hold(variant: Variant, inputs: Batch) -> None:
        held[variant.name] = variant.cache_bytes(inputs, tokens)

    peak = costs.peak_of(partial(hold, everyone[0], batch[0]), device)
    for variant, inputs in zip(everyone[1:], batch[1:], strict=True):
        hold(variant, inputs)
    return held, peak


def _timers(everyone: Sequence[Variant], batch: Sequence[Batch]) -> dict[str, Timer]:
    return {v.name: partial(v.generation_times, inputs) for v, inputs in zip(everyone, batch, strict=True)}


def _places(batch: Sequence[Batch]) -> int:
    """Tokens of a batch's prompts, padding included."""
    return batch[0]["input_ids"].numel()


def _peak(memory: Memory | None, cache: int) -> float:
    """Bytes that a generation takes: what was seen, and the cache at least."""
    seen = memory or {}
    return max(cache, seen.get("device") or 0, seen.get("resident") or 0)


def _check_room(needed: float, device: torch.device) -> None:
    """Refuse what the machine's memory does not hold, before the system ends the process; a GPU says so itself.

    Raises:
        MemoryError: so many bytes are not free.
    """
    if device.type != "cuda" and needed > memory_available(device):
        raise MemoryError


def rounds(prompts: Sequence[Mapping[str, Timer]], repeats: int, tokens: int) -> dict[str, list[Seconds]]:
    """Times of every variant in each round, warm.

    Args:
        prompts: for each prompt the variants by name; rounds go round the prompts.
        repeats: counted rounds, behind one to warm up.
        tokens: that are generated.
    """
    names = list(prompts[0])
    found: dict[str, list[Seconds]] = {name: [] for name in names}
    for number in range(-1, repeats):
        first = number // len(prompts) % len(names)
        for name in names[first:] + names[:first]:
            seconds = prompts[number % len(prompts)][name](tokens)
            if number >= 0:
                found[name].append(seconds)
    return found


def latencies(timed: Rounds, tokens: int, peers: Collection[str]) -> dict[str, Latency]:
    """TTFT and TPOT of each variant.

    TTFT is the time to the first token from inputs on the device (vision tower, prefill, head), TPOT the time behind
    it for each further one.

    Args:
        timed: of ``tokens`` tokens.
        peers: variants that run on the full model's engine. Only theirs is the speed-up of pruning: the time of
            another engine says as much about the engine.
    """
    found: dict[str, Latency] = {}
    for name, row in timed.items():
        ttft, tpot = [first for first, _ in row], [(whole - first) / (tokens - 1) for first, whole in row]
        found[name] = {"ttft": _spread(ttft), "tpot": _spread(tpot)}
        if name in peers:
            found[name]["speed_up"] = speed_up([first for first, _ in timed[FULL]], ttft)
    return found


def throughput(
    timed: Rounds, size: int, tokens: int, cache: Mapping[str, int], peers: Collection[str]
) -> dict[str, BatchTiming]:
    """Tokens a second of each variant.

    Args:
        timed: of ``tokens`` tokens a row.
        size: rows of the batch.
        cache: bytes, by variant.
        peers: as for ``latencies``.
    """

    def decode(name: str) -> list[float]:
        return [whole - first for first, whole in timed[name]]

    def in_all(name: str) -> list[float]:
        return [whole for _, whole in timed[name]]

    found: dict[str, BatchTiming] = {}
    for name in timed:
        found[name] = {
            "batch": size,
            "tokens_per_second": _spread([size * tokens / seconds for seconds in in_all(name)]),
            "decode_tokens_per_second": _spread([size * (tokens - 1) / seconds for seconds in decode(name)]),
            "cache_bytes": cache[name],
        }
        if name in peers:
            found[name]["speed_up"] = speed_up(in_all(FULL), in_all(name))
            found[name]["decode_speed_up"] = speed_up(decode(FULL), decode(name))
    return found


def _spread(values: Sequence[float]) -> Time:
    quartiles = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "iqr": [quartiles[0], quartiles[2]]}
