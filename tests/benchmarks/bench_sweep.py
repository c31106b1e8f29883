"""How much less the sweep costs than the published search. Run by hand; prints a Markdown table.

    python tests/benchmarks/bench_sweep.py [--quick] [--layers 16 24 32] [--suffix 20 64 128] [--device cuda]

Measured in one process, one after the other and around again, on one thread: one plain forward; the published
search (VTW, arXiv 2405.05803: for each layer k a run with all tokens in layers 0..k-1 and text only from k on);
the sweep. On a CPU CPU time, on a GPU wall time. All layers of the model share one layer's weights, which changes
no amount of work. The bound is the ratio of the two searches' operations.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import shapes
import torch

from vtwcli.models.families import FAMILIES
from vtwcli.schedule.intervention import Intervention
from vtwcli.sweep.layers import Resident, capture, read_out
from vtwcli.sweep.sweep import SweepItem, sweep

PREFIX = 35


def build(shape: shapes.Shape, layers: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A model whose layers are one and the same; the vision tower is small, so that the text model is measured."""
    config = shapes.config(shape._replace(layers=1, vision_layers=1, vision_width=32))
    torch.manual_seed(0)
    model = shapes.AutoModelForImageTextToText.from_config(config, dtype=dtype).to(device).eval()
    text_model = model.model.language_model
    text_model.layers = torch.nn.ModuleList([text_model.layers[0]] * layers)
    text_model.config.num_hidden_layers = layers
    return model


@torch.no_grad()
def published(model: torch.nn.Module, inputs: dict, layers: int) -> torch.Tensor:
    """The KL curve [L] by one run per candidate layer, each layer working only on the tokens it needs."""
    family = FAMILIES["llava"]
    seen = capture(model, family, inputs)
    layer, rotary = model.model.language_model.layers[0], seen.kwargs[0]["position_embeddings"]
    text = (~seen.visual[0]).nonzero()[:, 0]
    short = tuple(x[:, text] for x in rotary)

    def run(k: int) -> torch.Tensor:
        hidden = seen.hidden
        for d in range(layers):
            if d == k:
                hidden = hidden[:, text]
            embeddings = rotary if d < k else short
            hidden = layer(hidden, attention_mask=None, position_embeddings=embeddings)
        return read_out(model, family, hidden[0, -1:]).double().log_softmax(-1)

    full = run(layers)
    curve = []
    for k in range(layers):
        pruned = run(k)
        curve.append((pruned.exp() * (pruned - full)).sum())
    return torch.stack(curve).cpu()


def operations(shape: shapes.Shape, layers: int, suffix: int) -> tuple[float, float, float]:
    """Operations of a plain forward, the published search and the sweep, head apart."""
    d, length, text = shape.width, PREFIX + shapes.IMAGE_TOKENS + suffix, PREFIX + suffix
    linear = 2 * (4 * d * d + 3 * d * shape.mlp)

    def full(n: int) -> float:
        return linear * n + 2 * d * n * n

    streams = sum(
        range(1, layers + 1)
    )  # layers that text-only runs or streams go through, over all candidates
    rows = linear * suffix + 4 * d * suffix * (PREFIX + suffix / 2)
    search = (sum(range(layers)) + layers) * full(length) + streams * full(text)
    return layers * full(length), search, layers * full(length) + streams * rows


def measure(jobs: list[Callable[[], object]], repeat: int, device: str) -> tuple[list[float], list]:
    """Seconds of each job, the median of interleaved repetitions, and what it returned."""
    seconds: list[list[float]] = [[] for _ in jobs]
    results: list = [None] * len(jobs)
    for _ in range(repeat):
        for i, job in enumerate(jobs):
            gc.collect()
            began = clock(device)
            results[i] = job()
            seconds[i].append(clock(device) - began)
    return [statistics.median(each) for each in seconds], results


def clock(device: str) -> float:
    """CPU seconds of this process, or wall seconds once the GPU has finished."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=shapes.SHAPES, default="7b")
    parser.add_argument("--quick", action="store_true", help="a small width: --shape quick --dtype float32")
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 24, 32])
    parser.add_argument("--suffix", type=int, nargs="+", default=[20, 64, 128])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name = "quick" if options.quick else options.shape
    dtype = torch.float32 if options.quick else getattr(torch, options.dtype)
    shape = shapes.SHAPES[name]
    print(
        f"Width {shape.width}, MLP {shape.mlp}, {str(dtype).removeprefix('torch.')}, {options.device}, "
        f"{PREFIX} prefix and {shapes.IMAGE_TOKENS} visual tokens; "
        f"{'wall' if options.device != 'cpu' else 'CPU'} seconds.\n"
    )
    print(
        "| layers | suffix | plain forward | published search | sweep | search / sweep | bound | sweep / plain |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for layers in options.layers:
        model = build(shape, layers, dtype, options.device)
        for suffix in options.suffix:
            inputs = shapes.inputs(PREFIX, suffix, dtype, options.device)
            rows = torch.tensor([[inputs["input_ids"].shape[1] - 1]])
            every = [Intervention("withdraw", k) for k in range(layers)]
            source = Resident(model, FAMILIES["llava"])

            def plain(model=model, inputs=inputs) -> None:
                with torch.no_grad():
                    model(**inputs, use_cache=False, logits_to_keep=1)

            def search(model=model, inputs=inputs, layers=layers) -> torch.Tensor:
                return published(model, inputs, layers)

            def one_pass(source=source, item=SweepItem(inputs, rows), every=every) -> torch.Tensor:
                return sweep(source, [item], every)[0].kl[:, 0]

            plain()  # the first run of a shape allocates
            (t_plain, t_search, t_sweep), (_, want, got) = measure(
                [plain, search, one_pass], options.repeat, options.device
            )
            torch.testing.assert_close(got, want, rtol=0.2, atol=1e-4 if dtype == torch.float32 else 1e-2)
            _, o_search, o_sweep = operations(shape, layers, suffix)
            print(
                f"| {layers} | {suffix} | {t_plain:.2f} | {t_search:.1f} | {t_sweep:.2f} | "
                f"{t_search / t_sweep:.1f}x | {o_search / o_sweep:.1f}x | {t_sweep / t_plain:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
