"""Memory and time of an ONNX export. Run by hand; prints a Markdown table.

    python tests/benchmarks/bench_onnx_memory.py [--full] [--dtype fp16] [--parity] [--directory DIR]

Writes a LLaVA-shaped checkpoint of random bfloat16 weights, about 1 GB, or with ``--full`` the true shape of
LLaVA-1.5-7B, about 13.5 GB (kept in ``--directory`` for the next time, else deleted). Then a fresh process exports it
with the visual tokens leaving in the middle; with ``--parity`` another one exports and compares layer by layer, as it
does where the model does not fit in memory. Peak memory is the whole process's, libraries included.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def child(options: argparse.Namespace) -> None:
    """Export in this process and print the figures as one line of JSON."""
    sys.path.insert(0, str(ROOT))
    import torch

    from vtwcli.export.onnx import export
    from vtwcli.models.hub import resolve

    torch.set_num_threads(options.threads)
    libraries = peak()
    checkpoint = resolve(str(options.directory))
    source = export.Source.of(checkpoint)
    cut = source.depth // 2
    began, cpu = time.perf_counter(), time.process_time()
    report: dict = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        if options.parity:
            export.memory_available = lambda device: 0  # so that the model does not fit
            report = export.export_onnx(checkpoint, cut, Path(folder) / "out", dtype=options.dtype, steps=4)
        else:
            cuts = [{"at": cut, "action": "withdraw"}]
            export.write_graphs(source, cuts, Path(folder), dtype=options.dtype, opset=20, merged=False)
        written = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    figures = {
        "wall": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
        "libraries": libraries,
        "rss": peak(),
        "bytes": checkpoint.total_bytes,
        "written": written,
        "layers": source.depth,
        "report": report.get("parity", {}),
    }
    print(json.dumps(figures))


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_model(directory: Path, shape: str) -> None:
    """The checkpoint and a processor for it."""
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    import shapes

    from tests.conftest import build_processor

    shapes.write_checkpoint(directory, shapes.SHAPES[shape])
    processor = build_processor(image_token_id=shapes.IMAGE_ID)
    processor.image_processor.size = {"shortest_edge": 336}
    processor.image_processor.crop_size = {"height": 336, "width": 336}
    processor.patch_size = 14
    processor.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="the true shape of LLaVA-1.5-7B")
    parser.add_argument("--dtype", choices=["fp32", "fp16"], default="fp16")
    parser.add_argument("--parity", action="store_true", help="also compare layer by layer")
    parser.add_argument("--directory", type=Path, help="where the checkpoint is, or is written and kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--step", choices=["write", "export"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = "7b" if options.full else "1gb"
    if options.step == "write":
        return write_model(options.directory, shape)
    if options.step == "export":
        return child(options)
    with tempfile.TemporaryDirectory() as scratch:
        options.directory = (options.directory or Path(scratch) / "model").resolve()
        again = [sys.executable, __file__, "--directory", str(options.directory), "--dtype", options.dtype]
        again += (
            ["--threads", str(options.threads)] + ["--full"] * options.full + ["--parity"] * options.parity
        )
        # Each step has a process of its own, so that its memory is its own.
        subprocess.run([*again, "--step", "write"], check=True)
        done = subprocess.run([*again, "--step", "export"], check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(done.stdout)
    rows = [
        ("checkpoint", f"{figures['bytes'] / 1e9:.2f} GB bfloat16, {figures['layers']} layers"),
        ("written", f"{figures['written'] / 1e9:.2f} GB {options.dtype}"),
        ("peak resident memory", f"{figures['rss'] / 1e9:.2f} GB"),
        ("of which libraries", f"{figures['libraries'] / 1e9:.2f} GB"),
        ("wall time", f"{figures['wall']:.0f} s"),
        ("CPU time", f"{figures['cpu']:.0f} s"),
    ]
    if result := figures["report"]:
        rows.append(
            ("parity", f"{result['method']}, {result['agreement']:.0%} of {result['positions']} tokens")
        )
        rows.append(("mean KL to torch float32", f"{result['mean_kl']:.1e} nats"))
    print("| | |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")
    return None


if __name__ == "__main__":
    main()
