"""Views of an evaluation result: terminal table, Markdown, HTML with the answers that differ, and a plot."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtwcli.report import BLUE, GREY, new_figure, save_figure

if TYPE_CHECKING:
    from rich.console import Group

    from vtwcli.data.sample import Sample

_MOST_SAMPLES = 60  # differing answers that the HTML report shows for each schedule


def evaluation_rows(result: dict[str, Any]) -> list[list[str]]:
    """The quality table: one row per task and schedule, as text."""
    rows = []
    for task, row in result["tasks"].items():
        for name, one in row.get("schedules", {}).items():
            interval = one["interval"]
            spread = f"[{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "-"
            rows.append(
                [
                    f"{task}: {row['metric']}",
                    str(row["judged"]),
                    name,
                    f"{row['full']['mean']:.3f}",
                    f"{one['mean']:.3f}",
                    f"{one['difference']:+.3f}",
                    spread,
                    f"{one['mcnemar']['p']:.2g}",
                ]
            )
    return rows


QUALITY_HEADER = ["task: metric", "n", "schedule", "full", "pruned", "change", "95 % interval", "p"]
COST_HEADER = ["schedule", "KL first", "KL answer", "top-1", "same", "FLOPs", "KV", "TTFT", "TPOT"]


def cost_rows(result: dict[str, Any]) -> list[list[str]]:
    """One row per schedule: closeness to the full model, and cost relative to it."""
    latency = result.get("run", {}).get("latency")
    rows = []
    for name, one in result["schedules"].items():
        cost, times = one["cost"], ["-", "-"]
        if latency:
            times = [
                f"{latency[name][kind]['median'] / latency['full'][kind]['median']:.2f}x"
                if latency["full"][kind]["median"]
                else "-"
                for kind in ("ttft", "tpot")
            ]
        rows.append(
            [
                name,
                f"{one['kl_first']:.2e}",
                f"{one['kl_answer']:.2e}",
                f"{one['top1_agreement']:.1%}",
                f"{one['exact_sequences']:.1%}",
                f"{cost['flops_ratio'][cost['convention']]:.1%}",
                f"{cost['kv_ratio']:.1%}",
                *times,
            ]
        )
    return rows


def evaluation_view(result: dict[str, Any]) -> Group:
    """The terminal view: quality by task, closeness and cost by schedule, gates."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for header, rows, words in (
        (QUALITY_HEADER, evaluation_rows(result), 1),
        (COST_HEADER, cost_rows(result), 1),
    ):
        table = Table(box=None, pad_edge=False, header_style="bold")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i < words else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        parts += [table, Text("")]
    parts.append(Text(cost_sentence(result)))
    parts += [Text(gate_sentence(gate)) for gate in result["gates"]]
    return Group(*parts)


def cost_sentence(result: dict[str, Any]) -> str:
    """What the cost columns mean, with convention and token counts."""
    cost = next(iter(result["schedules"].values()))["cost"]
    text = (
        f"p: McNemar's test. top-1: tokens whose first choice is the full model's; same: whole answers. "
        f"FLOPs ({cost['convention']}) of the prefill and KV cache as shares of the full model's at "
        f"{cost['visual_tokens']:.0f} visual + {cost['text_tokens']:.0f} text tokens"
    )
    latency = result.get("run", {}).get("latency")
    if latency:
        full = latency["full"]
        text += (
            f"; TTFT and TPOT measured, of {full['ttft']['median'] * 1e3:.1f} ms and "
            f"{full['tpot']['median'] * 1e3:.2f} ms (medians, interleaved)"
        )
    return text + "."


def gate_sentence(gate: dict[str, Any]) -> str:
    """One gate in words."""
    verdict = "passed" if gate["passed"] else "FAILED"
    where = f" on {gate['task']}" if gate["task"] else ""
    what = "drop" if gate["gate"] == "max_drop" else "mean KL"
    found = f"{what}{where} {gate['found']:.4g}, allowed {gate['allowed']:g}"
    return f"gate {gate['gate']} {verdict}: {gate['schedule']}: {found}"


def markdown(result: dict[str, Any]) -> str:
    """Both tables in Markdown, for a model card or a job's summary page."""

    def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        lines = [header, ["---"] * len(header), *rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )

    parts = [
        f"## {result['model']['name']}: full against pruned",
        table(QUALITY_HEADER, evaluation_rows(result)),
        table(COST_HEADER, cost_rows(result)),
        cost_sentence(result),
        *(gate_sentence(gate) for gate in result["gates"]),
    ]
    return "\n\n".join(parts) + "\n"


def plot_quality(result: dict[str, Any], path: Path) -> None:
    """Quality against cost, one point a schedule: worst task's difference over the share of prefill FLOPs."""
    figure, axis = new_figure()
    axis.axhline(0, color=GREY, lw=0.8, ls="--")
    for name, one in result["schedules"].items():
        cost = one["cost"]["flops_ratio"][one["cost"]["convention"]]
        drop = one["worst_difference"] if one["worst_difference"] is not None else -one["kl_answer"]
        axis.plot(100 * cost, drop, "o", color=BLUE, ms=6)
        axis.annotate(name, (100 * cost, drop), xytext=(5, 5), textcoords="offset points", fontsize=8)
    judged = any(one["worst_difference"] is not None for one in result["schedules"].values())
    axis.set_xlabel("prefill FLOPs, % of the full model")
    axis.set_ylabel("metric of the worst task, pruned - full" if judged else "-KL(pruned ‖ full), nats")
    axis.margins(0.12)
    axis.set_title(f"{result['model']['name']}: quality against cost", fontsize=11, loc="left")
    save_figure(figure, path)


def html_report(result: dict[str, Any], samples: Sequence[Sample]) -> str:
    """One self-contained page: the tables, and the samples whose answers differ, the largest KL first.

    Args:
        samples: the evaluated samples in the result's order, for their images.
    """

    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        return f"<table>{cells('th', header)}{''.join(cells('td', row) for row in rows)}</table>"

    body = [
        f"<h1>{html.escape(result['model']['name'])}: full against pruned</h1>",
        table(QUALITY_HEADER, evaluation_rows(result)),
        table(COST_HEADER, cost_rows(result)),
        f"<p>{html.escape(cost_sentence(result))}</p>",
        *(f"<p>{html.escape(gate_sentence(gate))}</p>" for gate in result["gates"]),
    ]
    for name in result["schedules"]:
        differing = [
            (sum(row["pruned"][name]["kl"]) / len(row["pruned"][name]["kl"]), i, row)
            for i, row in enumerate(result["samples"])
            if row["pruned"][name]["first_divergence"] is not None
        ]
        differing.sort(key=lambda entry: (-entry[0], entry[1]))
        total = len(result["samples"])
        body.append(f"<h2>{html.escape(name)}: {len(differing)} of {total} answers differ</h2>")
        if len(differing) > _MOST_SAMPLES:
            body.append(f"<p>The {_MOST_SAMPLES} with the largest KL:</p>")
        for kl, i, row in differing[:_MOST_SAMPLES]:
            images = "".join(f'<img alt="" src="{_data_uri(image)}">' for image in samples[i].images)
            lines = [
                ("question", row["question"]),
                ("full", row["full"]),
                ("pruned", row["pruned"][name]["answer"]),
                ("reference", " / ".join(row["references"]) or "-"),
                ("mean KL", f"{kl:.3g} nats"),
            ]
            said = "".join(f"<dt>{key}</dt><dd>{html.escape(value)}</dd>" for key, value in lines)
            body.append(f"<article>{images}<dl>{said}</dl></article>")
    return _PAGE.format(title=html.escape(result["model"]["name"]), body="\n".join(body))


def _data_uri(image: Any) -> str:
    small = image.copy()
    small.thumbnail((336, 336))
    buffer = BytesIO()
    small.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
article {{ display: flex; gap: 1rem; padding: .8rem 0; border-bottom: 1px solid #ddd; align-items: start }}
img {{ width: 168px; image-rendering: auto; border: 1px solid #ddd }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; margin: 0 }}
dt {{ color: #6b6b6b }} dd {{ margin: 0; white-space: pre-wrap }}
</style></head><body>
{body}
</body></html>
"""
