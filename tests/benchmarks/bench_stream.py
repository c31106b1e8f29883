"""Memory and time of calibrating a streamed model. Run by hand; prints a Markdown table.

    python tests/benchmarks/bench_stream.py [--full] [--samples 2] [--directory DIR] [--device cuda]

Writes a LLaVA-shaped checkpoint of random bfloat16 weights, about 1 GB, or with ``--full`` the true shape of
LLaVA-1.5-7B, about 13.5 GB of shards (kept in ``--directory`` for the next time, else deleted). Then a fresh process
sweeps withdrawal at every layer over the samples, reading from files that were put out of the page cache. Peak
memory is the whole process's, libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PREFIX, SUFFIX = 35, 20


def child(options: argparse.Namespace) -> None:
    """Sweep in this process and print the figures as one line of JSON."""
    import shapes
    import torch

    from vtwcli.machine.memory import peak_memory
    from vtwcli.models.hub import resolve
    from vtwcli.models.loading import LoadedModel
    from vtwcli.schedule.intervention import Intervention
    from vtwcli.sweep.streaming import Streamed
    from vtwcli.sweep.sweep import SweepItem, sweep

    torch.set_num_threads(options.threads)
    before = peak_memory()["rss"]
    began, cpu = time.perf_counter(), time.process_time()
    checkpoint = resolve(str(options.directory))
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    model = checkpoint.skeleton(dtype)
    loaded = LoadedModel(
        model, None, checkpoint.family, checkpoint.name, None, checkpoint.path, device, dtype, checkpoint
    )
    source = Streamed(loaded)
    items = []
    for seed in range(options.samples):
        inputs = shapes.inputs(PREFIX, SUFFIX, dtype, options.device, seed)
        items.append(SweepItem(inputs, torch.tensor([[inputs["input_ids"].shape[1] - 1]])))
    results = sweep(source, items, [Intervention("withdraw", k) for k in range(source.depth)])
    figures = {
        "wall": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
        "computing": sum(result.seconds for result in results),
        "imports": before,
        **source.seconds,
        **peak_memory(),
        "bytes": checkpoint.total_bytes,
        "layers": source.depth,
        "finite": all(bool(result.kl.isfinite().all()) for result in results),
    }
    print(json.dumps(figures))


def evict(directory: Path) -> None:
    """Ask the system to forget the files' pages, so that they are read from the disk."""
    os.sync()
    for file in directory.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the true shape of LLaVA-1.5-7B")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="where the checkpoint is, or is written and kept")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.directory = options.directory or Path(scratch) / "model"
        # Written by a process of its own, so that this one stays small.
        write = (
            "import shapes, sys, pathlib; "
            f"shapes.write_checkpoint(pathlib.Path(sys.argv[1]), shapes.SHAPES[{'7b' if options.full else '1gb'!r}])"
        )
        here = Path(__file__).parent
        subprocess.run([sys.executable, "-c", write, str(options.directory.resolve())], cwd=here, check=True)
        if not options.warm:
            evict(options.directory)
        again = [sys.executable, __file__, "--child", "--directory", str(options.directory)]
        for name in ("samples", "dtype", "device", "threads"):
            again += [f"--{name}", str(getattr(options, name))]
        figures = json.loads(subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout)
    if not figures["finite"]:
        raise SystemExit("the curve is not finite")
    rows = [
        ("checkpoint", f"{figures['bytes'] / 1e9:.2f} GB, {figures['layers']} layers"),
        ("samples", f"{options.samples} of {PREFIX} + 576 + {SUFFIX} tokens"),
        ("type, device, threads", f"{options.dtype}, {options.device}, {options.threads}"),
        ("peak resident memory", f"{figures['rss'] / 1e9:.2f} GB"),
        ("of which libraries", f"{figures['imports'] / 1e9:.2f} GB"),
        ("wall time", f"{figures['wall']:.1f} s"),
        ("CPU time", f"{figures['cpu']:.1f} s"),
        ("images and embeddings", f"{figures['encoding']:.1f} s"),
        ("computing layers", f"{figures['computing']:.1f} s"),
        ("reading layers, beside it", f"{figures['reading']:.1f} s"),
        ("waiting for the reader", f"{figures['waiting']:.1f} s"),
        ("reading the head", f"{figures['head']:.1f} s"),
    ]
    if "cuda" in figures:
        rows.insert(4, ("peak GPU memory", f"{figures['cuda'] / 1e9:.2f} GB"))
    print("| | |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
