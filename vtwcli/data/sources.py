"""From data specifications to samples: the mix that calibration, analysis and evaluation share."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from vtwcli.data.cells import BadRow, Row, listed, text
from vtwcli.data.drawing import Drawing, ranges, sample_content
from vtwcli.data.metrics import METRICS
from vtwcli.data.reading import Check, plain_reading, sample_of
from vtwcli.data.rows import SUFFIXES, Rows
from vtwcli.data.sample import Sample
from vtwcli.data.spec import DataSpec, source_names
from vtwcli.data.stores import joined, open_hub, open_local
from vtwcli.data.tasks import TASKS, TaskRow
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.io import console
from vtwcli.io.documents import nearest

DEMO_SPLITS = ("calibration", "test")


@dataclass(frozen=True)
class DataMix:
    """Samples of several sources, and what was read to get them.

    Attributes:
        samples: source by source, each in reading order.
        fingerprints: content hash of each sample, in the same order (``sample_fingerprint``).
        sources: per source its ``source``, ``tasks`` (name to number of samples), where it was read
            (``repository``, ``config``, ``revision`` or ``path``; ``split``), ``choice`` (how samples were drawn),
            ``rows`` (0-based row numbers used, as ranges), ``skipped``, ``duplicates`` (rows that were passed over
            because they equal one that is used), ``fingerprint`` (over ids and contents) and, where the task says
            so, ``max_new_tokens`` (the longest answer).
        skipped: unreadable rows left out, over all sources.
        excluded: samples that came up and were passed over because they were not wanted.
    """

    samples: tuple[Sample, ...]
    fingerprints: tuple[str, ...]
    sources: tuple[dict[str, Any], ...]
    skipped: int
    excluded: int = 0


def load_data(
    specs: Sequence[DataSpec],
    *,
    limit: int | None,
    seed: int,
    skip_bad: bool = False,
    exclude: Collection[str] = (),
    check: Check | None = None,
    model_type: str | None = None,
    own_lengths: bool = True,
) -> DataMix:
    """Read the samples of a mix.

    Samples are drawn uniformly with the seed: from all rows of local data, from the first rows (a stated
    number) of a remote data set, so that a small calibration does not fetch a large set. ``order: first``
    takes the first rows instead. ``limit`` counts per task, so that a source with several tasks (``demo``, or
    a file with a task column) has as many samples of each.

    Args:
        specs: the sources; their own ``limit`` takes precedence.
        limit: samples per task, or None for all.
        seed: of the draw, at least 0.
        skip_bad: leave out rows that cannot be read, and count them, instead of failing.
        exclude: fingerprints of samples that must not come up, for example those of a calibration.
        check: raises ``BadRow`` for a sample that the model cannot use; its row then counts as a bad one.
        model_type: of the model that is asked, in transformers; some built-in tasks have a prompt of its own for it.
        own_lengths: whether samples say how long their answers may be.

    Raises:
        UsageError: contradicting options, or two sources that give the same rows.
        NotFoundError: a source or a task is missing, unreadable or empty, or a row is bad.
    """
    samples: list[Sample] = []
    prints: list[str] = []
    sources: list[dict[str, Any]] = []
    excluded = 0
    contents: dict[str, str] = {}
    for spec, name in zip(specs, source_names(specs, ("demo", *TASKS)), strict=True):
        first = spec.order == "first"
        drawing = Drawing(spec.limit or limit, seed, first=first, exclude=exclude, known=contents)
        reading = (TASKS.get(spec.source) or plain_reading(spec)).of(model_type)
        longest = (spec.max_new_tokens or reading.longest) if own_lengths else None
        record = _read(spec, name, replace(reading, longest=longest), drawing, skip_bad, check)
        chosen = drawing.chosen()
        contents |= {sample_content(sample, fingerprint): sample.id for _, fingerprint, sample in chosen}
        known = {sample.id for sample in samples}
        for _, _, sample in chosen:
            if sample.id in known:
                raise UsageError(f"data source {spec.source!r} is in the mix twice: both give {sample.id!r}")
        samples += [sample for _, _, sample in chosen]
        prints += [content for _, content, _ in chosen]
        sources.append(record)
        excluded += drawing.excluded
    skipped = sum(entry["skipped"] for entry in sources)
    return DataMix(tuple(samples), tuple(prints), tuple(sources), skipped, excluded)


def identify(spec: DataSpec, *, limit: int, seed: int, skip_bad: bool = False) -> dict[str, Any]:
    """What tells a source's samples from others without fetching any from afar.

    Of local data the record that ``load_data`` makes of the chosen samples, of a Hub data set its commit.

    Raises:
        UsageError, NotFoundError: as ``load_data``.
    """
    drawing = Drawing(spec.limit or limit, seed, first=spec.order == "first")
    if spec.source == "demo" or (rows := _open(spec, drawing)).remote:
        return {"source": spec.source} | ({} if spec.source == "demo" else rows.record)
    return load_data([spec], limit=limit, seed=seed, skip_bad=skip_bad).sources[0]


def _read(
    spec: DataSpec, name: str, reading: TaskRow, drawing: Drawing, skip_bad: bool, check: Check | None
) -> dict[str, Any]:
    """Read one source, which ids call ``name``, into the drawing; its record for result files."""
    if spec.metric is not None and spec.metric not in METRICS:
        close = nearest(spec.metric, METRICS)
        hint = f"did you mean {close!r}?" if close else f"known metrics: {', '.join(METRICS)}"
        raise UsageError(f"data source {spec.source!r}: unknown metric {spec.metric!r}", hint)
    rows = _open(spec, drawing)
    most = None
    if rows.remote and drawing.limit is not None:
        most = max(reading.buffer, 2 * drawing.limit)
    found: dict[str, None] = {}
    seen = skipped = 0
    complaint: NotFoundError | None = None
    with console.progress(f"reading {spec.source}", most) as bar:
        for place, row in enumerate(islice(rows.rows, most)):
            seen += 1
            bar.advance()
            try:
                if isinstance(row, BadRow):
                    raise row
                task = spec.task or _task_of(spec, reading, row)
                found[task] = None
                if spec.tasks is None or task in spec.tasks:
                    make = partial(sample_of, spec, name, reading, rows, check, place, task, row)
                    together = row.get(reading.together) if reading.together else None
                    drawing.offer(place, task, make, together)
            except BadRow as bad:
                complaint = NotFoundError(
                    f"{rows.where}, row {place}: {bad.message}", bad.hint or "--skip-bad leaves such rows out"
                )
                if not skip_bad:
                    raise complaint from None
                skipped += 1
            if len(found) == 1 and drawing.full and not _has_tasks(spec, row):
                break
    for task in spec.tasks or ():
        if not drawing.kept.get(task):
            raise NotFoundError(
                f"{rows.where}: no samples of the task {task!r}; tasks: {listed(found) or 'none'}"
            )
    chosen = drawing.chosen()
    if not chosen and drawing.excluded:
        raise NotFoundError(
            f"{rows.where}: all {drawing.excluded} samples are among those to leave out",
            "they were calibrated on: give more data, or calibrate on fewer with a smaller limit",
        )
    if not chosen and drawing.duplicates:
        raise NotFoundError(
            f"{rows.where}: all {drawing.duplicates} rows equal rows of another source of the mix",
            "leave it out",
        )
    if bare := [task for task, kept in drawing.kept.items() if not kept and drawing.excluded]:
        console.warn(f"{rows.where}: no samples besides those to leave out for {', '.join(bare)}")
    if not chosen:
        reason = f"; {skipped} rows skipped, the last because: {complaint.message}" if complaint else ""
        raise NotFoundError(f"{rows.where}: no samples{reason}")
    digest = hashlib.sha256()
    for place, fingerprint, sample in chosen:
        digest.update(f"{place}:{sample_content(sample, fingerprint)}\n".encode())
    whole = "first" if most is not None and seen == most else "all"
    draw = "first rows" if spec.order == "first" else f"seeded draw from {whole} {seen} rows"
    return {
        "source": spec.source,
        "tasks": {task: len(kept) for task, kept in drawing.kept.items() if kept},
        "choice": draw,
        **rows.record,
        "rows": ranges([place for place, _, _ in chosen]),
        "skipped": skipped,
        "duplicates": drawing.duplicates,
        "fingerprint": digest.hexdigest(),
        **({} if reading.longest is None else {"max_new_tokens": reading.longest}),
    }


def place(spec: DataSpec) -> Literal["demo", "local", "task", "hub"]:
    """Where a source's rows are; nothing is opened.

    Raises:
        UsageError: a path where none belongs.
        NotFoundError: there is nothing of that name.
    """
    if spec.source == "demo":
        return "demo"
    row, path = TASKS.get(spec.source), Path(spec.path or spec.source).expanduser()
    if spec.path is not None and row is None:
        raise UsageError(
            f"data source {spec.source!r}: path is for built-in tasks", "use the path as the source"
        )
    if spec.path is not None or (row is None and path.exists()):
        if spec.revision is not None:
            raise UsageError(f"data source {spec.source!r}: a local path has no revision")
        return "local"
    if row is not None:
        return "task"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec.source) and path.suffix.lower() not in SUFFIXES:
        return "hub"
    known = ("demo", *TASKS)
    close = nearest(spec.source, known)
    raise NotFoundError(
        f"data source {spec.source!r}: no such file, directory or built-in task",
        f"did you mean {close!r}?"
        if close
        else f"built-in: {', '.join(known)}; a Hub data set is OWNER/NAME",
    )


def _open(spec: DataSpec, drawing: Drawing) -> Rows:
    """Open the rows of a source, wherever they are."""
    where, row = place(spec), TASKS.get(spec.source)
    if where == "demo":
        return _demo(spec, drawing)
    config = spec.config or (row.config if row else None)
    default = row.split if row else None
    if where == "local":
        path = Path(spec.path or spec.source).expanduser()
        rows = open_local(path, config, spec.split, default)
        if row and row.join and path.is_dir():
            images = open_local(path, row.join.config, rows.record["split"], None)
            rows = joined(rows, images, row.join.key, row.join.id)
        return rows
    if row is not None:
        rows = open_hub(row.repository, config, spec.split, default, spec.revision)
        if row.join:
            read = rows.record
            images = open_hub(read["repository"], row.join.config, read["split"], None, read["revision"])
            rows = joined(rows, images, row.join.key, row.join.id)
        return rows
    return open_hub(spec.source, config, spec.split, None, spec.revision)


def _demo(spec: DataSpec, drawing: Drawing) -> Rows:
    """Generated scenes that the demo model has not seen in training; the two splits share none either."""
    from vtwcli.data import scenes

    for option in ("path", "config", "revision"):
        if getattr(spec, option) is not None:
            raise UsageError(f"data source 'demo': {option} does not apply to generated data")
    tasks = spec.tasks or scenes.DEFAULT_TASKS
    for task in tasks:
        if task not in scenes.ALL_TASKS:
            close = nearest(task, scenes.ALL_TASKS)
            hint = f"did you mean {close!r}?" if close else f"tasks: {', '.join(scenes.ALL_TASKS)}"
            raise UsageError(f"data source 'demo': unknown task {task!r}", hint)
    split = spec.split or DEMO_SPLITS[0]
    if split not in DEMO_SPLITS:
        raise UsageError(f"data source 'demo': unknown split {split!r}", f"splits: {', '.join(DEMO_SPLITS)}")
    if drawing.limit is None:
        raise UsageError("data source 'demo': generated data has no end", "give a limit")
    seed = (2 * drawing.seed + DEMO_SPLITS.index(split)) % 2**30
    examples = scenes.examples("eval", drawing.limit * len(tasks), seed, tasks)
    rows: Iterator[Row | BadRow] = (
        Row(vars(example), id=f"{example.task}:{example.id.removeprefix('eval:')}") for example in examples
    )
    return Rows(rows, "demo", None, False, {"split": split, "choice": f"generated from seed {seed}"})


def _has_tasks(spec: DataSpec, row: Row | BadRow) -> bool:
    """Whether a column says which task a row belongs to."""
    if spec.task is not None or isinstance(row, BadRow):
        return False
    return spec.columns.task is not None or (spec.source not in TASKS and "task" in row)


def _task_of(spec: DataSpec, reading: TaskRow, row: Row) -> str:
    return text(row, spec.columns.task or "task") if _has_tasks(spec, row) else reading.name
