"""The front of the decoder's graph: what is visual is read off the embeddings, and what the library does not give is
computed from it.

Behind it the graph takes what transformers.js has: ``inputs_embeds`` [B, S, D + 1] whose last channel is 1 for visual
rows, ``attention_mask``, ``position_ids`` and the past, which is shorter from layer K on. The library keeps no mask
for those layers, so all rows of a batch must be alike there: no padding, and equally many visual tokens in each.
Anything else is refused by a ``Gather`` from a table of one entry, whose name says why.
Axes: B batch, S new rows of a stage, P past, T rows that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from vtwcli.export.web.graphs import Stage

PADDING = "refused: padding in a batch, ask questions of one length or one by one"
UNEQUAL = "refused: rows of a batch with different numbers of visual tokens, ask one by one"
ENDS = "refused: a prompt ends with a visual token, which leaves no token to predict the next one"

_LAST_BITS = 5e-10  # a share is rounded down where it is less than this below a whole number


def add_front(model: ir.Model, stages: Sequence[Stage], width: int) -> None:
    """Let the decoder's graph find its visual rows itself, in place.

    Args:
        model: as traced from ``graphs.decoder_graph``.
        stages: what is inside.
        width: D.
    """
    Front(model.graph).build(stages, width)


class Front:
    """Nodes that are put in front of a graph, and what they compute."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.inputs = {value.name: value for value in graph.inputs}
        self.outputs = {value.name: value for value in graph.outputs}
        self.nodes: list[ir.Node] = []
        self.constants: dict[Any, ir.Value] = {}

    def build(self, stages: Sequence[Stage], width: int) -> None:
        """Put everything in its place."""
        visual, safe = self._strip(width)
        self.safe = safe
        batch = self.op("Shape", self.inputs["attention_mask"], start=0, end=1)
        total = self.count(visual)  # of the prompt
        for i, stage in enumerate(stages):
            if stage.removal is not None:
                scores = self.scores(i - 1, visual)
                keep = self.keep(stage.removal, visual, total, scores)
                index = self.places(keep, batch)
                visual = self.op(
                    "GatherElements", self.op("Cast", visual, to=ir.DataType.INT64), index, axis=1
                )
                visual = self.op("Cast", visual, to=ir.DataType.BOOL)
                past = self.inputs[f"past_key_values.{stage.layers[0]}.key"]
                held = self.op("Add", self.op("Shape", past, start=2, end=3), self.length(visual))
                ones = self.op("Expand", self.ints([1]), self.op("Concat", batch, held, axis=0))
                self.give(f"keep_index_{i}", index)
                self.give(f"attended_{i}", ones)
            last = self.op("Sub", self.length(visual), self.ints([1]))
            one = self.op("Expand", last, self.op("Concat", batch, self.ints([1]), axis=0))
            if stage.frozen:
                text = self.places(self.op("Not", visual), batch)
                self.give(f"text_index_{i}", text)
                # the last row runs as text: that it comes here too says nothing, and keeps this one from being empty
                self.give(f"visual_index_{i}", self.op("Concat", one, self.places(visual, batch), axis=1))
            if stage.score:
                self.give(f"score_index_{i}", one)
        self.give("logits_index", self.op("Add", one, safe))
        self._finish()

    def _strip(self, width: int) -> tuple[ir.Value, ir.Value]:
        """Which rows are visual, bool [B, S]; and a zero [1] that can be had only of what is not refused."""
        old = self.inputs["inputs_embeds"]
        assert old.shape is not None and old.dtype is not None
        new = ir.Value(
            name="inputs_embeds",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([*old.shape[:2], width + 1]),
        )
        old.name = "stripped_embeds"
        self.graph.inputs[self.graph.inputs.index(old)] = new
        hidden = self.op("Slice", new, self.ints([0]), self.ints([width]), self.ints([2]))
        if old.dtype != ir.DataType.FLOAT:
            hidden = self.op("Cast", hidden, to=old.dtype)
        old.replace_all_uses_with(hidden)
        self.inputs["inputs_embeds"] = new
        channel = self.op("Slice", new, self.ints([width]), self.ints([width + 1]), self.ints([2]))
        half = self.constant(("half",), ir.tensor([0.5], dtype=ir.DataType.FLOAT))
        visual = self.op("Greater", self.op("Squeeze", channel, self.ints([2])), half)
        number = self.count(visual)
        most = self.op("ReduceMax", number, keepdims=0)
        least = self.op("ReduceMin", number, keepdims=0)
        final = self.op("Slice", visual, self.ints([-1]), self.ints([1 << 31]), self.ints([1]))
        attended = self.op("ReduceMin", self.inputs["attention_mask"], keepdims=0)
        safe = self.refuse(PADDING, self.op("Sub", self.ints([1]), attended))
        safe = self.op("Add", safe, self.refuse(UNEQUAL, self.op("Sub", most, least)))
        ends = self.op("ReduceMax", self.op("Cast", final, to=ir.DataType.INT64), keepdims=0)
        return visual, self.op("Add", safe, self.refuse(ENDS, ends))

    def refuse(self, why: str, number: ir.Value) -> ir.Value:
        """0 [1] where ``number`` is 0, else no value at all."""
        wrong = self.op("Cast", self.op("Cast", number, to=ir.DataType.BOOL), to=ir.DataType.INT64)
        wrong = self.op("Reshape", wrong, self.ints([1]))
        return self.op("Gather", self.ints([0]), wrong, name=why, axis=0)

    def keep(
        self,
        removal: Mapping[str, Any],
        visual: ir.Value,
        total: ir.Value,
        scores: ir.Value | None,
    ) -> ir.Value:
        """Which rows stay, bool [B, S], by the rule of ``vtwcli.ort.removal``."""
        text = self.op("Not", visual)
        if removal["action"] == "withdraw":
            return text
        select, present = removal["select"], self.count(visual)
        wanted = self.wanted(select, present, total)
        if select["score"] == "uniform":
            ordinal = self.op(
                "Sub",
                self.op("CumSum", self.op("Cast", visual, to=ir.DataType.INT64), self.scalar(1)),
                self.ints([1]),
            )
            at = self.op(
                "Mod", self.op("Mul", ordinal, wanted), self.op("Max", present, self.ints([1])), fmod=0
            )
            chosen = self.op("Less", at, wanted)
        else:
            assert scores is not None
            chosen = self.op("Less", self.rank(scores, visual), wanted)
        return self.op("Or", text, self.op("And", visual, chosen))

    def wanted(self, select: Mapping[str, Any], present: ir.Value, total: ir.Value) -> ir.Value:
        """How many visual tokens stay, [B, 1]; as ``kept_count``, in double like Python."""
        if select.get("count") is not None:
            return self.op("Min", present, self.ints([int(select["count"])]))
        share = select.get("share")
        base = self.op("Cast", present if share is None else total, to=ir.DataType.DOUBLE)
        number = self.op("Mul", base, self.double(select["ratio"] if share is None else share))
        if share is None:
            number = self.op("Ceil", number)
        else:
            number = self.op("Floor", self.op("Add", number, self.double(_LAST_BITS)))
        return self.op("Min", self.op("Cast", number, to=ir.DataType.INT64), present)

    def rank(self, scores: ir.Value, visual: ir.Value) -> ir.Value:
        """How many visual rows stand before each, by score and then by place, [B, S]."""
        mine, theirs = (self.op("Unsqueeze", scores, self.ints([axis])) for axis in (2, 1))
        rows = self.op("Squeeze", self.length(visual), self.ints([0]))
        place = self.op("Range", self.scalar(0), rows, self.scalar(1))
        earlier = self.op(
            "Less",
            self.op("Unsqueeze", place, self.ints([0])),
            self.op("Unsqueeze", place, self.ints([1])),
        )
        before = self.op(
            "Or",
            self.op("Greater", theirs, mine),
            self.op("And", self.op("Equal", theirs, mine), earlier),
        )
        before = self.op("And", before, self.op("Unsqueeze", visual, self.ints([1])))
        number = self.op("Cast", before, to=ir.DataType.INT64)
        return self.op("ReduceSum", number, self.ints([2]), keepdims=0)

    def scores(self, stage: int, visual: ir.Value) -> ir.Value | None:
        """The new rows' scores [B, S] from the stage before, if it takes some."""
        taken = self.outputs.pop(f"scores_{stage}", None)
        if taken is None:
            return None
        self.graph.outputs.remove(taken)
        first = self.op("Neg", self.length(visual))
        return self.op("Slice", taken, first, self.ints([1 << 31]), self.ints([1]))

    def places(self, which: ir.Value, batch: ir.Value) -> ir.Value:
        """Where rows are, [B, T], given that each row of the batch has as many."""
        found = self.op("NonZero", which)  # [2, B T]
        column = self.op("Slice", found, self.ints([1]), self.ints([2]), self.ints([0]))
        number = self.op("ReduceMax", self.count(which), keepdims=0)
        number = self.op(
            "Add", self.op("Reshape", number, self.ints([1])), self.safe
        )  # refuses before this can fail
        shape = self.op("Concat", batch, number, axis=0)
        return self.op("Reshape", column, shape, allowzero=1)

    def count(self, which: ir.Value) -> ir.Value:
        """How many of each row, [B, 1]."""
        number = self.op("Cast", which, to=ir.DataType.INT64)
        return self.op("ReduceSum", number, self.ints([1]), keepdims=1)

    def length(self, rows: ir.Value) -> ir.Value:
        """S of [B, S], as [1]."""
        return self.op("Shape", rows, start=1, end=2)

    def op(self, kind: str, *inputs: ir.Value, name: str | None = None, **attributes: Any) -> ir.Value:
        """The first output of a new node."""
        output = ir.Value(name=f"front_{len(self.nodes)}")
        node = ir.node(
            kind, inputs, attributes, outputs=[output], name=name or f"front_{len(self.nodes)}_{kind}"
        )
        self.nodes.append(node)
        return output

    def ints(self, values: Sequence[int]) -> ir.Value:
        """Whole numbers [n]."""
        return self.constant(tuple(values), ir.tensor(list(values), dtype=ir.DataType.INT64))

    def scalar(self, value: int) -> ir.Value:
        """A whole number without axes."""
        return self.constant(value, ir.tensor(value, dtype=ir.DataType.INT64))

    def double(self, value: float) -> ir.Value:
        """A number without axes, as Python's."""
        return self.constant(("double", value), ir.tensor(value, dtype=ir.DataType.DOUBLE))

    def constant(self, key: Any, tensor: ir.TensorProtocol) -> ir.Value:
        """A value of the graph, once for each key."""
        if key not in self.constants:
            value = ir.Value(
                name=f"front_constant_{len(self.constants)}",
                shape=ir.Shape(tensor.numpy().shape),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            tensor.name = value.name
            self.graph.register_initializer(value)
            self.constants[key] = value
        return self.constants[key]

    def give(self, name: str, value: ir.Value) -> None:
        """Let a value stand in the place of an input."""
        old = self.inputs.pop(name)
        old.replace_all_uses_with(value)
        self.graph.inputs.remove(old)

    def _finish(self) -> None:
        self.graph.insert_before(self.graph[0], self.nodes)
        self.graph.sort()
