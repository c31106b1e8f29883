"""Views of what an evaluation timed. A ratio stands where it is a difference; else the numbers stand side by side."""

from __future__ import annotations

from collections.abc import Iterator

from vtwcli.judge.statistics import FEWEST, beyond_noise
from vtwcli.report.tables import Table, amount
from vtwcli.results.evaluation import (
    BatchTiming,
    Evaluation,
    Latency,
    Rate,
    SpeedUp,
    Time,
    TimePerToken,
    batch_sizes,
)

Timed = tuple[str, SpeedUp, str, str]
"""What was compared, how, and the schedule's number and the full model's as text."""


def latency_of(result: Evaluation) -> dict[str, Latency]:
    """By variant; nothing where nothing was timed."""
    return result.get("run", {}).get("latency") or {}


def milliseconds(row: Time | TimePerToken) -> str:
    """Median and half the interquartile range."""
    low, high = row["iqr"]
    return f"{row['median'] * 1e3:.2f} ±{(high - low) / 2 * 1e3:.2f}"


def ratio(found: SpeedUp | None) -> str:
    """A speed-up and its interval; ``noise`` where that holds 1, ``-`` where there is none."""
    if found is None or found["interval"] is None:
        return "-"
    low, high = found["interval"]
    return f"{found['ratio']:.2f}x [{low:.2f}, {high:.2f}]" if beyond_noise(found) else "noise"


def throughput_table(result: Evaluation) -> Table:
    """One row per batch and variant; no rows where single prompts only were timed."""
    latency = latency_of(result)
    header = ["schedule", "batch", "tokens/s", "decode tokens/s", "peak cache"]
    compared = any("speed_up" in row for _, row in _batches(result))
    if compared:
        header += ["speed-up", "decode speed-up"]
    rows = []
    sizes = batch_sizes(latency["full"]) if latency else []
    for place, size in enumerate(sizes if max(sizes, default=1) > 1 else []):
        for name in ("full", *result["schedules"]):
            row = latency[name]["batches"][place]
            cells = [name, str(size), _rate(row["tokens_per_second"]), _rate(row["decode_tokens_per_second"])]
            cells.append(amount(row["cache_bytes"], "B"))
            if compared:
                pair = (row.get("speed_up"), row.get("decode_speed_up"))
                cells += ["1x", "1x"] if name == "full" else map(ratio, pair)
            rows.append(cells)
    return header, rows


def speed_sentences(result: Evaluation) -> list[str]:
    """What the columns of times mean, and which numbers are no difference."""
    latency = latency_of(result)
    if not latency:
        return []
    timed = list(_compared(result))
    found = [
        "TTFT, TPOT: median ± half the interquartile range, interleaved. memory: the prefill's peak above what is "
        "held before. ideal: the speed-up that FLOPs promise."
    ]
    if timed:
        found[0] = (
            found[0][:-1] + "; speed-up: TTFT's, which includes the vision tower, with its 95 % interval."
        )
    if throughput_table(result)[1]:
        found.append(
            "tokens/s: of all rows of a batch together, prompts included; decode: behind the first token; peak cache: "
            "keys and values behind prompts and answers."
        )
    noise = [
        f"{what}, {mine} against {full} (ratio {how['interval'][0]:.2f} to {how['interval'][1]:.2f})"
        for what, how, mine, full in timed
        if how["interval"] and not beyond_noise(how)
    ]
    if noise:
        found.append(f"No difference beyond noise: {'; '.join(noise)}.")
    if any(how["interval"] is None for _, how, _, _ in timed):
        found.append(
            f"Fewer than {FEWEST} rounds show no speed-up that could be told from noise; --repeats asks for more."
        )
    engine = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}.get(result["model"].get("backend", "torch"))
    if engine is not None:
        found.append(
            f"{engine}'s times stand beside torch's: two engines, whose ratio is no speed-up of pruning."
        )
    if left_out := result.get("run", {}).get("batches_left_out"):
        found.append(f"Batches that do not fit in memory: {', '.join(map(str, left_out))}.")
    return found


def _compared(result: Evaluation) -> Iterator[Timed]:
    """Every ratio that was measured and is shown."""
    latency = latency_of(result)
    for name in result["schedules"]:
        if (how := latency[name].get("speed_up")) is not None:
            ttft, full_ttft = latency[name]["ttft"], latency["full"]["ttft"]
            yield f"TTFT ms of {name}", how, milliseconds(ttft), milliseconds(full_ttft)
    for name, row in _batches(result) if throughput_table(result)[1] else ():
        [whole] = [one for one in latency["full"]["batches"] if one["batch"] == row["batch"]]
        kinds = (
            ("tokens/s", row.get("speed_up"), row["tokens_per_second"], whole["tokens_per_second"]),
            (
                "decode tokens/s",
                row.get("decode_speed_up"),
                row["decode_tokens_per_second"],
                whole["decode_tokens_per_second"],
            ),
        )
        for what, how, mine, full in kinds:
            if how is not None:
                yield f"{what} of {name} at batch {row['batch']}", how, _rate(mine), _rate(full)


def _batches(result: Evaluation) -> Iterator[tuple[str, BatchTiming]]:
    latency = latency_of(result)
    for name in result["schedules"] if latency else ():
        for row in latency[name].get("batches", ()):
            yield name, row


def _rate(row: Rate) -> str:
    low, high = row["iqr"]
    return f"{_number(row['median'])} ±{_number((high - low) / 2)}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
