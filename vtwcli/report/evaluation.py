"""Views of an evaluation result: terminal table, Markdown, HTML with the answers that differ, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtwcli.io import files, text
from vtwcli.io.outputs import FOOTER, Outputs
from vtwcli.judge import gates
from vtwcli.report import pages
from vtwcli.report.plots import BLUE, GREY, new_panels, save_figure
from vtwcli.report.speed import latency_of, milliseconds, ratio, speed_sentences, throughput_table
from vtwcli.report.tables import Table, amount, html_table, markdown_table, terminal_table
from vtwcli.results.evaluation import Evaluation

if TYPE_CHECKING:
    from rich.console import Group

    from vtwcli.data.sample import Sample

_MOST_SAMPLES = 60  # differing answers that the HTML report shows for each schedule
_LEAST_SPAN = 0.02  # of the axis of scores
_LEAST_KL = 1e-9  # a schedule that changes nothing has a place on the log scale too


def tables(result: Evaluation) -> list[Table]:
    """What every view shows: quality by task, closeness to the full model, and cost; all but quality by schedule."""
    found = [quality_table(result), closeness_table(result), cost_table(result), throughput_table(result)]
    return [table for table in found if table[1]]


def quality_table(result: Evaluation) -> Table:
    """One row per task and schedule; no rows where no sample has a reference answer."""
    header = ["task", "n", "schedule", "full", "pruned", "change", "95 % interval", "p"]
    rows = []
    for task, row in result["tasks"].items():
        for name, one in row.get("schedules", {}).items():
            interval = one["interval"]
            spread = f"[{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "-"
            rows.append(
                [
                    task,
                    str(row["judged"]),
                    name,
                    f"{row['full']['mean']:.3f}",
                    f"{one['mean']:.3f}",
                    f"{one['difference']:+.3f}",
                    spread,
                    f"{one['mcnemar']['p']:.2g}" if one["mcnemar"] else "-",
                ]
            )
    return header, rows


def closeness_table(result: Evaluation) -> Table:
    """One row per schedule: how far it is from the full model, whatever the references say."""
    header = ["schedule", "KL first", "KL answer", "top-1", "same", "apart at", "worst task"]
    rows = []
    for name, one in result["schedules"].items():
        apart, drop = one["first_divergence"], one["worst_difference"]
        rows.append(
            [
                name,
                f"{one['kl_first']:.2e}",
                f"{one['kl_answer']:.2e}",
                f"{one['top1_agreement']:.1%}",
                f"{one['exact_sequences']:.1%}",
                "-" if apart is None else f"{apart:.1f}",
                "-" if drop is None or drop >= 0 else f"{one['worst_task']} {drop:+.3f}",
            ]
        )
    return header, rows


def cost_table(result: Evaluation) -> Table:
    """The full model's cost, and each schedule's: work promised, and what this machine makes of it."""
    latency, memory = latency_of(result), result.get("run", {}).get("memory")
    compared = any("speed_up" in row for row in latency.values())
    header = ["schedule", "FLOPs", "KV cache"]
    if latency:
        header += ["TTFT ms", "TPOT ms", "memory", "ideal"] + ["speed-up"] * compared

    def measured(name: str) -> list[str]:
        if not latency:
            return []
        held = (memory or {}).get(name) or {}
        size = held.get("device") if held.get("device") is not None else held.get("resident")
        return [
            milliseconds(latency[name]["ttft"]),
            milliseconds(latency[name]["tpot"]),
            "-" if size is None else amount(size, "B"),
        ]

    cost = next(iter(result["schedules"].values()))["cost"]
    full = [
        "full",
        amount(cost["flops_full"][cost["convention"]], ""),
        amount(cost["kv_bytes"]["full_measured"], "B"),
    ]
    rows = [[*full, *measured("full"), *["1x"] * (bool(latency) + compared)]]
    for name, one in result["schedules"].items():
        share = one["cost"]["flops_ratio"][one["cost"]["convention"]]
        row = [name, f"{share:.1%}", f"{one['cost']['kv_ratio']:.1%}", *measured(name)]
        if latency:
            row += [f"{1 / share:.2f}x", *[ratio(latency[name].get("speed_up"))] * compared]
        rows.append(row)
    return header, rows


def evaluation_view(result: Evaluation) -> Group:
    """The terminal view: the tables, what their columns mean, gates."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    for header, rows in tables(result):
        parts += [terminal_table(header, rows, left=header[:1]), Text("")]
    return Group(*parts, *(Text(words) for words in sentences(result)))


def sentences(result: Evaluation) -> list[str]:
    """What the tables leave unsaid: further numbers of a metric, what the columns mean, gates."""
    cost = next(iter(result["schedules"].values()))["cost"]
    found = [*_metrics(result), *_further_numbers(result)]
    about = result["model"]
    if about.get("baseline", about["name"]) != about["name"]:
        graphs = {
            "onnx": ", ONNX graphs; torch runs the full model",
            "openvino": ", ONNX graphs in OpenVINO; torch runs the full model",
        }.get(about["backend"], "")
        found.append(f"full is {about['baseline']}; it is compared with {about['name']}{graphs}.")
    meaning = (
        "95 % interval: paired bootstrap; p: McNemar's test. KL(pruned ‖ full) in nats; top-1: tokens whose first "
        "choice is the full model's; same: whole answers; apart at: mean token at which the others part."
    )
    shares = "; ".join(
        f"{convention} "
        + ", ".join(f"{one['cost']['flops_ratio'][convention]:.1%}" for one in result["schedules"].values())
        for convention in cost["flops_ratio"]
    )
    work = (
        f"FLOPs: of the prefill by the convention {cost['convention']}, at {cost['visual_tokens']:.0f} visual + "
        f"{cost['text_tokens']:.0f} text tokens ({shares}). KV cache: behind the prompt."
    )
    found += [meaning, work]
    found += speed_sentences(result)
    return found + [gates.sentence(gate) for gate in result["gates"]]


def _metrics(result: Evaluation) -> list[str]:
    """Which metric judges which task."""
    by_metric: dict[str, list[str]] = {}
    for task, row in result["tasks"].items():
        if "schedules" in row:
            by_metric.setdefault(row["metric"], []).append(task)
    words = "; ".join(f"{metric} for {', '.join(tasks)}" for metric, tasks in by_metric.items())
    return [f"Metrics: {words}."] if words else []


def _further_numbers(result: Evaluation) -> list[str]:
    """Metrics of more than one number, such as POPE's F1 and share of yes."""
    found = []
    for task, row in result["tasks"].items():
        full: Mapping[str, object] = row.get("full", {})
        columns: dict[str, Mapping[str, object]] = {"full": full, **row.get("schedules", {})}
        for key in full:
            if key == "mean" or not all(isinstance(one.get(key), float) for one in columns.values()):
                continue
            values = [f"{name} {one[key]:.3f}" for name, one in columns.items()]
            found.append(f"{task}, {key.replace('_', ' ')}: {', '.join(values)}.")
    return found


def markdown(result: Evaluation) -> str:
    """The tables in Markdown, for a model card or a job's summary page."""

    parts = [
        f"## {text.markdown(result['model']['name'])}: full against pruned",
        *(text.paragraph(words) for words in verdicts(result)),
        *(markdown_table(*one) for one in tables(result)),
        *(text.paragraph(words) for words in sentences(result)),
    ]
    return "\n\n".join(parts) + "\n"


def write_evaluation(
    result: Evaluation, samples: Sequence[Sample], outputs: Outputs, trace: str | None = None
) -> None:
    """Write a result and its views, all or nothing.

    Args:
        result: the document of ``evaluate``.
        samples: the evaluated samples in the result's order.
        outputs: where ``result``, ``trace``, ``plot``, ``page`` and ``markdown`` go; None leaves one out.
        trace: the lines of the trace.
    """
    with outputs.publish() as new:
        new.text("result", files.document(result))
        if trace is not None:
            new.text("trace", trace)
        new.text_view("markdown", lambda: f"{markdown(result)}\n{FOOTER}")
        new.text_view("page", lambda: html_report(result, samples))
        new.view("plot", lambda path: plot_quality(result, path))


def verdicts(result: Evaluation) -> list[str]:
    """One sentence a schedule: what it changes and what it saves."""
    found = []
    for name, one in result["schedules"].items():
        drop, worst = one["worst_difference"], one["worst_task"]
        if drop is None:
            change = "no task has reference answers"
        elif drop >= 0:
            change = "no task's score falls"
        else:
            change = f"the score of {worst} changes most, by {drop:+.3f}"
        share = one["cost"]["flops_ratio"][one["cost"]["convention"]]
        found.append(
            f"{name}: {change}; {one['exact_sequences']:.1%} of the answers are the full model's to the token, mean "
            f"KL {one['kl_answer']:.2g} nats; prefill FLOPs {share:.1%}, KV cache {one['cost']['kv_ratio']:.1%}."
        )
    return found


def plot_quality(result: Evaluation, path: Path) -> None:
    """Write ``quality_figure``; the format follows the suffix of ``path`` (png, svg, pdf)."""
    save_figure(quality_figure(result), path)


def quality_figure(result: Evaluation) -> Any:
    """Quality against cost, one point a schedule: the worst task's change, and KL, over the share of prefill FLOPs.

    The first panel is left out where no sample has a reference answer.
    """
    judged = any(one["worst_difference"] is not None for one in result["schedules"].values())
    figure, axes = new_panels(1 + judged)
    for name, one in result["schedules"].items():
        share = 100 * one["cost"]["flops_ratio"][one["cost"]["convention"]]
        points = [(axes[-1], max(one["kl_answer"], _LEAST_KL))]
        worst, drop = one["worst_task"], one["worst_difference"]
        if worst is not None and drop is not None:
            points.append((axes[0], drop))
            interval = result["tasks"][worst]["schedules"][name]["interval"]
            if interval:
                axes[0].vlines(share, *interval, color=BLUE, lw=1, alpha=0.6)
        for axis, value in points:
            axis.plot(share, value, "o", color=BLUE, ms=6)
            axis.annotate(name, (share, value), xytext=(5, 5), textcoords="offset points", fontsize=8)
    if judged:
        axes[0].axhline(0, color=GREY, lw=0.8, ls="--")
        axes[0].set_ylabel("worst task, pruned - full")
    axes[-1].set_yscale("log")
    axes[-1].set_ylabel("KL(pruned ‖ full), nats")
    axes[-1].set_xlabel("prefill FLOPs, % of the full model")
    for axis in axes:
        axis.margins(0.12)
    if judged:
        low, high = axes[0].get_ylim()
        if high - low < _LEAST_SPAN:  # nothing changes: an axis in 1e-17 would look as if something did
            axes[0].set_ylim(-_LEAST_SPAN / 2, _LEAST_SPAN / 2)
    axes[0].set_title(f"{result['model']['name']}: quality against cost", fontsize=11, loc="left")
    return figure


def html_report(result: Evaluation, samples: Sequence[Sample]) -> str:
    """One self-contained page: the tables, and the samples whose answers differ, the largest KL first.

    Args:
        samples: the evaluated samples in the result's order, for their images.
    """
    title = f"{result['model']['name']}: full against pruned"
    body = [
        f"<h1>{pages.text(title)}</h1>",
        "<ul>" + "".join(f"<li>{pages.text(words)}</li>" for words in verdicts(result)) + "</ul>",
        pages.picture(lambda: quality_figure(result), "quality against cost"),
        *(html_table(*one) for one in tables(result)),
        *(f"<p>{pages.text(words)}</p>" for words in sentences(result)),
    ]
    for name in result["schedules"]:
        differing = [
            (sum(row["pruned"][name]["kl"]) / len(row["pruned"][name]["kl"]), i, row)
            for i, row in enumerate(result["samples"])
            if row["pruned"][name]["first_divergence"] is not None
        ]
        differing.sort(key=lambda entry: (-entry[0], entry[1]))
        total = len(result["samples"])
        body.append(f"<h2>{pages.text(name)}: {len(differing)} of {total} answers differ</h2>")
        if len(differing) > _MOST_SAMPLES:
            body.append(f"<p>The {_MOST_SAMPLES} with the largest KL:</p>")
        for kl, i, row in differing[:_MOST_SAMPLES]:
            images = "".join(f'<img alt="" src="{_data_uri(image)}">' for image in samples[i].images)
            facts = [
                ("question", row["question"]),
                ("full", row["full"]),
                ("pruned", row["pruned"][name]["answer"]),
                ("reference", " / ".join(row["references"]) or "-"),
                ("mean KL", f"{kl:.3g} nats"),
            ]
            body.append(f"<article>{images}{pages.facts(facts)}</article>")
    return pages.page(result["model"]["name"], _STYLE, body)


def _data_uri(image: Any) -> str:
    small = image.copy()
    small.thumbnail((336, 336))
    buffer = BytesIO()
    small.convert("RGB").save(buffer, "PNG")
    return pages.png_uri(buffer.getvalue())


_STYLE = """
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid light-dark(#ddd, #444) }
th:first-child, td:first-child { text-align: left }
article { display: flex; flex-wrap: wrap; gap: 1rem; padding: .8rem 0; align-items: start;
  border-bottom: 1px solid light-dark(#ddd, #444) }
article img { width: 168px; image-rendering: auto; border: 1px solid light-dark(#ddd, #444) }
"""
