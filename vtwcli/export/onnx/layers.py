"""The parity check for a model that does not fit in memory: both sides run one layer at a time.

Torch streams its layers from the checkpoint and recomputes whole sequences without a cache. The graphs' engine runs
each layer as a piece cut out of the exported graph, over the prompt first and then token by token with its cache. Each
side goes on with its own hidden states, so the logits at the end carry every difference on the way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtwcli.data.sample import Sample
from vtwcli.export.onnx.parity import compare, merge
from vtwcli.io import console
from vtwcli.models.inputs import Encoded, encode
from vtwcli.models.loading import LoadedModel
from vtwcli.ort import OnnxModel, State, Tokens
from vtwcli.sweep.streaming import Streamed


def parity(
    loaded: LoadedModel, cut: int | None, exported: OnnxModel, samples: Sequence[Sample], steps: int
) -> dict[str, Any]:
    """Compare the graphs with the streamed model; the numbers of ``onnx_parity.compare``.

    The tokens behind the prompt are drawn, since the model's own are not known before its last layer has run.

    Args:
        loaded: the skeleton of the checkpoint, in float32.
        cut: the withdrawal layer; None for the full model.
        exported: the graphs.
        samples: questions.
        steps: positions compared per sample.
    """
    draw = torch.Generator().manual_seed(0)
    visual = set(loaded.placeholder_ids)
    known = min(len(loaded.processor.tokenizer), loaded.embedding_rows)
    text = torch.tensor([i for i in range(known) if i not in visual])
    forced = [text[torch.randint(len(text), (steps - 1,), generator=draw)] for _ in samples]
    prompts = [encode(loaded, sample) for sample in samples]
    whole = [encode(loaded, sample, ids) for sample, ids in zip(samples, forced, strict=True)]
    reference = torch_logits(loaded, cut, whole)
    logits = onnx_logits(exported, prompts, [ids.numpy() for ids in forced])
    return merge(
        [
            compare(theirs, ours, f"sample {sample.id!r}")
            for theirs, ours, sample in zip(reference, logits, samples, strict=True)
        ]
    )


@torch.no_grad()
def torch_logits(loaded: LoadedModel, cut: int | None, samples: Sequence[Encoded]) -> list[np.ndarray]:
    """Logits [n + 1, V] of each sample's last prompt token and the n forced tokens behind it."""
    source = Streamed(loaded)
    captures = source.captures([sample.inputs for sample in samples])
    hidden = [capture.hidden for capture in captures]
    stay = [torch.nonzero(~capture.visual[0])[:, 0] for capture in captures]
    with console.progress("parity: torch, layers", total=source.depth) as task:
        for d, layer in enumerate(source.layers()):
            for i, capture in enumerate(captures):
                kwargs = dict(capture.kwargs[d])
                if cut is not None and d >= cut:
                    if d == cut:
                        hidden[i] = hidden[i][:, stay[i]]
                    length = capture.hidden.shape[1]
                    kwargs = {name: _rows(value, stay[i], length) for name, value in kwargs.items()}
                    kwargs["attention_mask"] = _causal(len(stay[i]))
                out = layer(hidden[i], **kwargs)
                hidden[i] = out[0] if isinstance(out, tuple) else out
            task.advance()
    with source.head() as head:
        return [
            head(states[0, -(sample.length - sample.prompt_length + 1) :]).numpy()
            for states, sample in zip(hidden, samples, strict=True)
        ]


def _rows(value: Any, index: Tensor, length: int) -> Any:
    """Per-position arguments of a layer (positions, rotary tables) for some positions only."""
    if isinstance(value, tuple):
        return tuple(_rows(item, index, length) for item in value)
    if not isinstance(value, Tensor):
        return value
    axes = [axis for axis in range(value.ndim) if value.shape[axis] == length]
    return value.index_select(axes[0], index) if axes else value


def _causal(length: int) -> Tensor:
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(1, 1, length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)


@dataclass
class _Pass:
    """One forward pass of one sample, the prompt or a single token, on its way through the layers.

    Attributes:
        sample: index of the sample.
        hidden: what the next layer takes.
        tokens: where the pass's tokens are.
        feeds: what the graph that it is in is fed apart from hidden states: masks, positions, indices, and pasts of
            the right length, of which a layer's own is put in its place.
    """

    sample: int
    hidden: np.ndarray
    tokens: Tokens
    feeds: dict[str, Any]


def onnx_logits(
    exported: OnnxModel, prompts: Sequence[Encoded], forced: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """As ``torch_logits``, from the exported graphs cut into single layers."""
    passes: list[_Pass] = []
    states: list[State] = []
    for i, prompt in enumerate(prompts):
        hidden, tokens = exported.prompt({name: value.numpy() for name, value in prompt.inputs.items()})
        states.append(State({}, tokens.next_position()))
        passes.append(_Pass(i, hidden, tokens, {}))
        for token in forced[i]:
            passes.append(_Pass(i, exported.embed(token[None, None]), exported.next_tokens(states[i]), {}))
    exported.release()
    depth = exported.manifest["text"]["layers"]
    with console.progress(f"parity: {exported.engine.name}, layers", total=depth) as task:
        for graph in exported.decoders:
            for item in passes:
                item.feeds, item.tokens = exported.feeds(graph, item.hidden, item.tokens, states[item.sample])
                item.feeds |= _any_past(graph, item.feeds, item.hidden.shape[1])
            _walk(exported, graph, passes, task)
    return [
        np.concatenate([item.hidden[:, 0] for item in passes if item.sample == i]).astype(np.float32)
        for i in range(len(prompts))
    ]


def _walk(exported: OnnxModel, graph: Mapping[str, Any], passes: Sequence[_Pass], task: console.Task) -> None:
    """Take every pass through one decoder graph, layer by layer; what is left in ``hidden`` is its output."""
    lo, hi = graph["layers"]
    stream = graph["inputs"][0]["name"]
    result = graph["outputs"][0]["name"]
    borders = [
        stream,
        *(f"layer.{d}" for d in range(lo, hi - 1)),
        f"layer.{hi - 1}" if result == "logits" else result,
    ]
    for d, (into, out_of) in zip(range(lo, hi), itertools.pairwise(borders), strict=True):
        names = [f"past_key_values.{d}.{part}" for part in ("key", "value")]
        pasts: dict[int, list[np.ndarray]] = {}
        with _piece(exported, graph, into, [out_of, f"present.{d}.key", f"present.{d}.value"]) as run:
            for item in passes:
                past = dict(zip(names, pasts.get(item.sample, ()), strict=False))
                item.hidden, *pasts[item.sample] = run({**item.feeds, into: item.hidden, **past})
        task.advance()
    if result == "logits":
        with _piece(exported, graph, borders[-1], ["logits"]) as run:
            for item in passes:
                (item.hidden,) = run({**item.feeds, borders[-1]: item.hidden})


def _any_past(
    graph: Mapping[str, Any], feeds: Mapping[str, np.ndarray], length: int
) -> dict[str, np.ndarray]:
    """Zeros for every past: a piece may read the batch size or the length of the past off another layer's."""
    kept = feeds["keep_index"].shape[1] if "keep_index" in feeds else length
    full = length if "kept_attention_mask" in feeds else kept
    widths = {"past_length": feeds["attention_mask"].shape[1] - full}
    widths["kept_past_length"] = feeds.get("kept_attention_mask", feeds["attention_mask"]).shape[1] - kept
    empty = {}
    for port in graph["inputs"]:
        if port["name"].startswith("past_key_values."):
            _, heads, name, width = port["shape"]
            empty[port["name"]] = np.zeros((1, heads, widths[name], width), dtype=port["dtype"])
    return empty


@contextmanager
def _piece(exported: OnnxModel, graph: Mapping[str, Any], into: str, outputs: list[str]) -> Iterator[Any]:
    """A session for the part of a graph between a border and some outputs, with only its own weights loaded."""
    import onnx

    model = onnx.load(exported.directory / graph["file"], load_external_data=False)
    path = exported.directory / "piece.onnx"
    path.write_bytes(cut_out(model, into, outputs).SerializeToString())
    try:
        session = exported.open(path)

        def run(feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            found = session.run({name: feeds[name] for name in session.inputs}, outputs)
            return [found[name].numpy() for name in outputs]

        yield run
    finally:
        path.unlink(missing_ok=True)


def cut_out(model: Any, into: str, outputs: Sequence[str]) -> Any:
    """The part of an ONNX model that computes ``outputs`` from the value ``into`` and the model's other inputs.

    Weights in external files stay there. The types of borders inside the graph are taken from the hidden states'.
    """
    import onnx

    producers = {name: node for node in model.graph.node for name in node.output}
    wanted, needed, nodes = list(outputs), set(), {}
    while wanted:
        name = wanted.pop()
        node = producers.get(name)
        if name in needed or name == into or node is None:
            needed.add(name)
            continue
        needed.add(name)
        if id(node) not in nodes:
            nodes[id(node)] = node
            wanted += [value for value in node.input if value]
    ports = {port.name: port for port in (*model.graph.input, *model.graph.output)}
    kind = next(p for p in ports.values() if p.type.tensor_type.elem_type != onnx.TensorProto.INT64)

    def port(name: str) -> Any:
        if name in ports:
            return ports[name]
        return onnx.helper.make_tensor_value_info(name, kind.type.tensor_type.elem_type, [None, None, None])

    inputs = [port.name for port in model.graph.input if port.name in needed]
    part = onnx.helper.make_graph(
        [node for node in model.graph.node if id(node) in nodes],
        "piece",
        [port(name) for name in dict.fromkeys([into, *inputs])],
        [port(name) for name in outputs],
        [weight for weight in model.graph.initializer if weight.name in needed],
    )
    whole = onnx.helper.make_model(part, opset_imports=model.opset_import)
    whole.ir_version = model.ir_version
    return whole
