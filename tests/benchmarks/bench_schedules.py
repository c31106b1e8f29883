"""What many schedules in one pass cost, beside their operations and beside the runtime led along the answer.

    python tests/benchmarks/bench_schedules.py [--layers 9] [--suffix 20 64] [--repeat 3] [--threads 1]

Layers of a 7B model with random weights (each has its own memory, so that they come from there and not from a cache),
35 text tokens and 576 visual ones, ``suffix`` tokens behind them of which the last ``--answer`` are the answer's; the
candidates of ``vtw budget``, whose layers scale with the depth. Thresholds of contribution are quantiles of the model's
own. In one process, taking turns; medians of CPU time.

Operations are those of the rows that the trie's states run: projections and MLP, causal attention, the head. The bound
is their time at the rate of the plain forward pass in the same round. The other way executes each candidate along the
answer, token by token; ``--others`` of them are run and stand for all.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable

import shapes
import torch

from vtwcli.budget import candidates
from vtwcli.methods.method import Candidate
from vtwcli.methods.method import Shape as Sizes
from vtwcli.models.families import FAMILIES
from vtwcli.recipe.recipe import BudgetSection, ScheduleSection
from vtwcli.runtime import pruned
from vtwcli.sweep import schedules
from vtwcli.sweep.layers import Resident
from vtwcli.sweep.probes import LastRowProbe
from vtwcli.sweep.schedules import follow, plan_of
from vtwcli.sweep.sweep import SweepItem, sweep
from vtwcli.sweep.trie import Trie

PREFIX = 35
FAMILY = FAMILIES["llava"]


def build(shape: shapes.Shape, dtype: torch.dtype) -> torch.nn.Module:
    """A model with ``shape.layers`` equal layers and a small vision tower."""
    config = shapes.config(shape._replace(layers=1, vision_layers=1, vision_width=32))
    torch.manual_seed(0)
    model = shapes.AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    text_model = model.model.language_model
    for number in range(1, shape.layers):
        layer = copy.deepcopy(text_model.layers[0])
        layer.self_attn.layer_idx = number
        text_model.layers.append(layer)
    text_model.config.num_hidden_layers = shape.layers
    return model


def tried(model: torch.nn.Module, item: SweepItem, depth: int) -> list[Candidate]:
    """The candidates of ``vtw budget``; all of VisiPruner's choose tokens, as random weights would else not."""
    probe = LastRowProbe(10.0)
    sweep(Resident(model, FAMILY), [item], [], probes=[probe])
    sizes = torch.cat([row.contribution for row in probe.found[0, 0]]).double()
    shares = torch.tensor([0.5, 0.75, 0.9, 0.95, 0.98], dtype=torch.float64)
    options = BudgetSection(thresholds=sizes.quantile(shares).tolist())
    return candidates(Sizes(depth), options, ScheduleSection(layer_threshold=1.0))


class Operations:
    """Counts what rows of a model cost, and what a trie's states run.

    Attributes:
        done: operations of the last pass.
    """

    def __init__(self, shape: shapes.Shape) -> None:
        self.width, self.mlp = shape.width, shape.mlp
        self.done = 0

    def layer(self, rows: int, read: int, entries: int = 0) -> int:
        """``rows`` that read so many columns in all, and ``entries`` more rows of which keys and values are wanted."""
        linear = 4 * self.width**2 + 3 * self.width * self.mlp
        return 2 * (rows * linear + entries * 2 * self.width**2) + 4 * self.width * read

    def head(self, rows: int) -> int:
        """Logits of so many rows."""
        return 2 * rows * self.width * shapes.VOCABULARY

    def plain(self, depth: int, length: int, heads: int) -> int:
        """A forward pass."""
        return depth * self.layer(length, length * (length + 1) // 2) + self.head(heads)

    def counting(self) -> type[Trie]:
        """A trie that adds up what its states' rows and the full stream's cost."""
        counts = self

        class Counting(Trie):
            def step(self, d: int, layer: torch.nn.Module) -> None:
                super().step(d, layer)
                last, mask = d == self.depth - 1, id(self.capture.kwargs[d].get("attention_mask"))
                if d == 0:
                    counts.done = 0
                length, rows = self.capture.hidden.shape[1], len(self.rows[0])
                if last:
                    read = int((self.rows + 1).sum())
                    counts.done += counts.layer(rows, read, length - rows) + counts.head(rows)
                else:
                    counts.done += counts.layer(length, length * (length + 1) // 2)
                for state in dict.fromkeys(self.states):
                    changed = len(state.layout.rows)
                    if changed:
                        pattern = self.layouts.pattern(state.layout, state.effects, mask, last)
                        run, read = len(pattern.own), int(pattern.own.sum() + pattern.full.sum())
                        read += int(pattern.ghost.sum())
                        counts.done += counts.layer(run, read, changed - run) + counts.head(run * last)

        return Counting


@torch.no_grad()
def forced(model: torch.nn.Module, inputs: dict, answer: torch.Tensor, one: Candidate) -> None:
    """The runtime led along an answer, as ``generate`` is: the prompt, then a token at a time."""
    with pruned(model, one.schedule):
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        length = inputs["input_ids"].shape[1]
        for step, token in enumerate(answer.tolist()):
            out = model(
                input_ids=torch.tensor([[token]]),
                past_key_values=out.past_key_values,
                position_ids=torch.tensor([[length + step]]),
                use_cache=True,
            )


def timed(jobs: dict[str, Callable[[], object]], repeat: int) -> dict[str, list[float]]:
    """CPU seconds of each job, taking turns; the first round is not counted, it allocates."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(repeat + 1):
        for name, job in jobs.items():
            if number == 0 and name == "other":
                continue
            gc.collect()
            began = time.process_time()
            job()
            if number:
                seconds[name].append(time.process_time() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=shapes.SHAPES, default="7b")
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--suffix", type=int, nargs="+", default=[20, 64])
    parser.add_argument("--answer", type=int, default=8, help="tokens of the answer, the last of the suffix")
    parser.add_argument("--others", type=int, default=5, help="candidates that are run the other way")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    shape = shapes.SHAPES[options.shape]._replace(layers=options.layers)
    model, count = build(shape, dtype), Operations(shape)
    schedules.Trie = count.counting()
    print(
        f"{shape.layers} layers, width {shape.width}, MLP {shape.mlp}, {options.dtype}, {PREFIX} prefix and "
        f"{shapes.IMAGE_TOKENS} visual tokens, an answer of {options.answer}; CPU seconds.\n"
    )
    print(
        "| suffix | candidates | plain forward | operations / plain | one pass | bound | one pass / bound "
        "| one by one | one by one / one pass |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for suffix in options.suffix:
        inputs = shapes.inputs(PREFIX, suffix, dtype)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        length, told = inputs["input_ids"].shape[1], options.answer
        # a token behind the prompt's last is compared too, but the answer's last is not read
        item = SweepItem(inputs, torch.arange(length - told, length)[None])
        prompt = {name: x[:, : length - told + 1] if x.ndim == 2 else x for name, x in inputs.items()}
        answer = inputs["input_ids"][0, length - told + 1 :]
        chosen = tried(model, item, shape.layers)
        plans = [plan_of(one.schedule, shape.layers, FAMILY) for one in chosen]
        some = [chosen[(2 * i + 1) * len(chosen) // (2 * options.others)] for i in range(options.others)]

        def plain(inputs=inputs, told=told) -> None:
            with torch.no_grad():
                model(**inputs, use_cache=False, logits_to_keep=told)

        def one_pass(item=item, plans=plans) -> None:
            follow(Resident(model, FAMILY), [item], plans)

        def other(prompt=prompt, answer=answer, some=some) -> None:
            for one in some:
                forced(model, prompt, answer, one)

        seconds = timed({"plain": plain, "one pass": one_pass, "other": other}, options.repeat)
        times = count.done / count.plain(shape.layers, length, told)
        rounds = zip(seconds["one pass"], seconds["plain"], strict=True)
        over = statistics.median(mine / (times * base) for mine, base in rounds)
        base, mine, handful = (statistics.median(each) for each in seconds.values())
        others = handful * len(chosen) / len(some)
        print(
            f"| {suffix} | {len(chosen)} | {base:.2f} | {times:.2f} | {mine:.1f} | {times * base:.1f} "
            f"| {over:.2f}x | {others:.0f} | {others / mine:.1f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
