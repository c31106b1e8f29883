"""Generation over exported ONNX graphs with ONNX Runtime.

This file needs numpy and onnxruntime only: an exported directory carries a copy of it beside its graphs.
Axes: B batch, S prompt, P past, T kept tokens, V vocabulary, D hidden size, N images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

try:
    from vtwcli.errors import NotFoundError, UsageError
except ImportError:  # beside an exported model the package need not be installed
    NotFoundError = UsageError = ValueError  # type: ignore[assignment,misc]

MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "vtw-onnx", 1
_TYPES = {"float32": np.float32, "float16": np.float16, "int64": np.int64, "bool": np.bool_}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class NotFinite(NotFoundError):
    """Logits that are NaN or infinite.

    Attributes:
        row: of the batch.
        what: what they are, without the row.
    """

    def __init__(self, row: int, what: str) -> None:
        super().__init__(f"row {row} of the batch: {what}")
        self.row, self.what = row, what


def is_export(directory: str | Path) -> bool:
    """Whether a directory holds an export to ONNX; nothing but its manifest is read."""
    file = Path(directory) / MANIFEST
    try:
        return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def has_device(device: str) -> bool:
    """Whether this ONNX Runtime runs on ``cpu`` or ``cuda``."""
    import onnxruntime

    return _PROVIDERS.get(device) in onnxruntime.get_available_providers()


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a forward pass are.

    Attributes:
        attended: which positions are no padding, bool [B, S].
        visual: which are visual tokens, bool [B, S].
        positions: position ids [B, S], or [3, B, S] where images have rows and columns.
    """

    attended: np.ndarray
    visual: np.ndarray
    positions: np.ndarray

    def last(self) -> np.ndarray:
        """The place of each row's last token, [B]."""
        width = self.attended.shape[1]
        return width - 1 - np.argmax(self.attended[:, ::-1], 1)

    def next_position(self) -> np.ndarray:
        """The position of the token that follows each row, [B]: one behind the largest."""
        reached = np.where(self.attended, self.positions, -1)
        return reached.reshape(-1, *self.attended.shape).max((0, 2)) + 1


@dataclass
class State:
    """What a generation carries from step to step.

    Attributes:
        masks: for each mask input which cached positions are no padding, [B, P] of 0 and 1.
        position: position of the next token, [B].
        cache: present keys and values by their input name, on the device of the session.
    """

    masks: dict[str, np.ndarray]
    position: np.ndarray
    cache: dict[str, Any] = field(default_factory=dict)

    def cache_lengths(self) -> list[int]:
        """Entries of each layer's keys, by layer."""
        keys = {name.split(".")[1]: value for name, value in self.cache.items() if name.endswith(".key")}
        return [int(keys[layer].shape()[2]) for layer in sorted(keys, key=int)]

    def cache_bytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(int(value.numpy().nbytes) for value in self.cache.values())

    def attend(self, name: str, attended: np.ndarray) -> np.ndarray:
        """Append new positions to a mask and return it whole."""
        new = attended.astype(np.int64)
        self.masks[name] = np.concatenate([self.masks[name], new], 1) if name in self.masks else new
        return self.masks[name]


class OnnxModel:
    """An exported model, ready to generate.

    Args:
        directory: made by ``vtw export --format onnx``.
        device: ``cpu`` or ``cuda``.
        threads: of a session; 0 lets ONNX Runtime choose.

    Raises:
        NotFoundError: no manifest, or a graph that cannot be loaded.
        UsageError: a device that this ONNX Runtime does not have.
    """

    def __init__(self, directory: str | Path, device: str = "cpu", threads: int = 0) -> None:
        self.directory = Path(directory)
        try:
            for file in self.directory.iterdir():
                if file.exists() and not (file.is_file() or file.is_dir()):  # whoever opens a pipe waits
                    raise ValueError(f"{file.name} is not a file")
            self.manifest: dict[str, Any] = json.loads(
                (self.directory / MANIFEST).read_text(encoding="utf-8")
            )
            if self.manifest["format"] != FORMAT or self.manifest["format_version"] != FORMAT_VERSION:
                raise ValueError("another format or version")
            self._graphs = {graph["role"]: graph for graph in self.manifest["graphs"]}
            self.decoders = [graph for graph in self.manifest["graphs"] if graph["layers"] is not None]
            if any(Path(graph["file"]).name != graph["file"] for graph in self.manifest["graphs"]):
                raise ValueError("a graph lies outside the directory")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise NotFoundError(f"{self.directory} is no exported ONNX model: {error}") from error
        self.device = device
        self._threads = threads
        self._sessions: dict[str, Any] = {}
        self._check_device()

    def _check_device(self) -> None:
        import onnxruntime

        if not has_device(self.device):
            raise UsageError(
                f"this ONNX Runtime has no device {self.device!r}"
                f" (it has {', '.join(onnxruntime.get_available_providers())})"
            )

    def session(self, role: str) -> Any:
        """The session of one graph, loaded when first used.

        Raises:
            NotFoundError: the file is missing or broken.
        """
        if role not in self._sessions:
            self._sessions[role] = self.open(self.directory / self._graphs[role]["file"])
        return self._sessions[role]

    def open(self, path: Path) -> Any:
        """A session for an ONNX file.

        Raises:
            NotFoundError: the file is missing or broken.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=[_PROVIDERS[self.device]])
        except Exception as error:  # onnxruntime's own exceptions have no common base
            raise NotFoundError(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from error

    def release(self) -> None:
        """Close all sessions; the next use opens them again."""
        self._sessions.clear()

    def run(self, role: str, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run one graph.

        Args:
            role: of the graph.
            feeds: input name -> numpy array, or value that an earlier run returned.

        Returns:
            Output name -> value that stays on the session's device; ``.numpy()`` fetches it.
        """
        from onnxruntime import OrtValue

        session, types = self.session(role), {p["name"]: p["dtype"] for p in self._graphs[role]["inputs"]}
        binding = session.io_binding()
        alive = []  # a binding does not keep its inputs alive
        for name, value in feeds.items():
            if isinstance(value, np.ndarray):
                value = np.ascontiguousarray(value, dtype=_TYPES[types[name]])
                value = OrtValue.ortvalue_from_numpy(value, self.device, 0)
            alive.append(value)
            binding.bind_ortvalue_input(name, value)
        for port in self._graphs[role]["outputs"]:
            binding.bind_output(port["name"], self.device)
        session.run_with_iobinding(binding)
        names = [port["name"] for port in self._graphs[role]["outputs"]]
        return dict(zip(names, binding.get_outputs(), strict=True))

    def embed(self, input_ids: np.ndarray) -> np.ndarray:
        """Token embeddings [B, S, D]."""
        return self.run("embed_tokens", {"input_ids": input_ids})["inputs_embeds"].numpy()

    def features(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """The features of all images, in the order of their placeholders [rows, D]; None without images.

        Args:
            inputs: what the model's processor returns, as numpy arrays. ``image_features`` among them, from an
                earlier call, are taken as they are.
        """
        if inputs.get("image_features") is not None:
            return inputs["image_features"]
        if any("video" in name for name in inputs):
            raise UsageError("exported graphs take images, no videos")
        if inputs.get("pixel_values") is None:
            return None
        return _ARRANGE[self.manifest["vision"]["arrange"]](self, inputs)

    def prefill(self, inputs: Mapping[str, Any]) -> tuple[np.ndarray, State]:
        """Run the prompt.

        Args:
            inputs: what the model's processor returns: ``input_ids`` and ``attention_mask`` [B, S], padded on
                either side, and the images' tensors.

        Returns:
            Logits behind each row's last token [B, V], and the state to go on with.

        Raises:
            UsageError: placeholders that do not match the images, or a prompt that is too long.
            NotFinite: logits that are not finite.
        """
        hidden, tokens = self.prompt(inputs)
        state = State({}, tokens.next_position())
        return self._decode(hidden, tokens, state), state

    def prompt(self, inputs: Mapping[str, Any]) -> tuple[np.ndarray, Tokens]:
        """The prompt's embeddings with the images' features in their places [B, S, D], and where its tokens are."""
        arrays = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
        input_ids = arrays["input_ids"].astype(np.int64)
        attended = arrays.get("attention_mask", np.ones_like(input_ids)) != 0
        self._check_length(input_ids.shape[1])
        if not attended.any(1).all():
            raise UsageError("a row of the batch has no tokens")
        visual = np.isin(input_ids, self.manifest["tokens"]["placeholder_ids"]) & attended
        last = input_ids.shape[1] - 1 - np.argmax(attended[:, ::-1], 1)
        if visual[np.arange(len(last)), last].any() and any(graph["removal"] for graph in self.decoders):
            raise UsageError(
                "a prompt ends with a visual token, which leaves no token to predict the next one"
            )
        hidden = self.embed(input_ids)
        features = self.features(arrays)
        count = 0 if features is None else len(features)
        if count != int(visual.sum()):
            raise UsageError(f"the prompt has {int(visual.sum())} visual tokens, the images give {count}")
        if features is not None:
            hidden[visual] = features
        if self.manifest["positions"] == "grid":
            grids = arrays.get("image_grid_thw", np.zeros((0, 3), dtype=np.int64))
            merge = self.manifest["vision"]["spatial_merge_size"]
            positions = grid_positions(visual, attended, grids, merge)
        else:
            positions = np.maximum(np.cumsum(attended, 1) - 1, 0)
        return hidden, Tokens(attended, visual, positions)

    def step(self, tokens: np.ndarray, state: State) -> np.ndarray:
        """Run one more token of each row, [B], and return the logits behind it, [B, V]; ``state`` moves on."""
        self._check_length(max(mask.shape[1] for mask in state.masks.values()) + 1)
        column = np.asarray(tokens, dtype=np.int64)[:, None]
        return self._decode(self.embed(column), self.next_tokens(state), state)

    def next_tokens(self, state: State) -> Tokens:
        """One text token per row, at the state's position; the position moves on."""
        positions = state.position[:, None]
        state.position = state.position + 1
        if self.manifest["positions"] == "grid":
            positions = np.repeat(positions[None], 3, 0)
        text = np.zeros((len(state.position), 1), dtype=bool)
        return Tokens(~text, text, positions)

    def _decode(self, hidden: Any, tokens: Tokens, state: State) -> np.ndarray:
        """Run the decoder graphs over new tokens, append to the state, and return the last logits [B, V]."""
        out: dict[str, Any] = {}
        first = not state.masks
        for graph in self.decoders:
            scores = out["scores"].numpy() if first and "scores" in out else None
            feeds, tokens = self.feeds(graph, hidden, tokens, state, scores)
            for port in graph["inputs"]:
                name = port["name"]
                if name.startswith("past_key_values."):
                    empty = (len(tokens.attended), port["shape"][1], 0, port["shape"][3])
                    feeds[name] = np.zeros(empty) if first else state.cache.pop(name)
            out = self.run(graph["role"], feeds)
            for name in [name for name in out if name.startswith("present.")]:
                state.cache[name.replace("present.", "past_key_values.")] = out.pop(name)
            hidden = out[graph["outputs"][0]["name"]]
        logits: np.ndarray = out["logits"].numpy()[:, 0].astype(np.float32)
        self._check_finite(logits, state)
        return logits

    def _check_finite(self, logits: np.ndarray, state: State) -> None:
        """Refuse logits that give no distribution; -inf alone is a token that the model never gives."""
        bad = np.flatnonzero(~np.isfinite(logits.max(-1)))
        if not len(bad):
            return
        row, kind = int(bad[0]), {"fp16": "float16"}.get(self.manifest["dtype"], "float32")
        caches = ((int(name.split(".")[1]), value.numpy()[row]) for name, value in state.cache.items())
        layers = [layer for layer, entries in caches if not np.isfinite(entries[:, -1]).all()]
        place = f", from what layer {min(layers)} reads on" if layers else ""
        raise NotFinite(row, f"the graphs' logits are not finite in {kind} (NaN or infinity){place}")

    def feeds(
        self,
        graph: Mapping[str, Any],
        hidden: Any,
        tokens: Tokens,
        state: State,
        scores: np.ndarray | None = None,
    ) -> tuple[dict[str, Any], Tokens]:
        """What a decoder graph is fed, apart from its cache; the state's masks grow by the new tokens.

        Args:
            graph: its entry of the manifest.
            hidden: embeddings, or hidden states of the graph before [B, S, D].
            tokens: where the S new tokens are.
            state: of the generation.
            scores: of the S tokens, from the graph before, where this graph's removal needs them [B, S].

        Returns:
            The feeds, and the tokens that come out.
        """
        names = {port["name"] for port in graph["inputs"]}
        offered: dict[str, Any] = {"inputs_embeds": hidden, "hidden_states": hidden}
        after = tokens
        if graph["removal"] is not None:
            offered["keep_index"], after = remove(tokens, graph["removal"], scores)
        inside = tokens if "kept_attention_mask" in names else after
        offered["position_ids"] = inside.positions
        for name, part in (("attention_mask", inside), ("kept_attention_mask", after)):
            if name in names:
                offered[name] = state.attend(graph["role"] + name, part.attended)
        offered["logits_index"] = offered["score_index"] = after.last()[:, None]
        return {name: value for name, value in offered.items() if name in names}, after

    def _check_length(self, length: int) -> None:
        longest = self.manifest["text"]["max_length"]
        if length > longest:
            raise UsageError(f"{length} tokens are more than the model's {longest}")

    def generate(
        self,
        inputs: Mapping[str, Any],
        max_new_tokens: int = 64,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_ids: Sequence[int] | None = None,
        on_token: Callable[[np.ndarray], None] | None = None,
    ) -> np.ndarray:
        """Generate answers.

        Args:
            inputs: see ``prefill``.
            max_new_tokens: at most so many.
            do_sample: draw from the distribution; otherwise the most likely token.
            temperature: divides the logits before drawing.
            top_k: draw among the k most likely tokens; 0 for all.
            top_p: draw among the most likely tokens that together have this probability.
            seed: of the draws.
            eos_ids: tokens that end an answer; None takes the model's own.
            on_token: called with the tokens [B] of each step.

        Returns:
            New tokens [B, n]; behind the end of an answer the padding token.
        """
        ends = list(self.manifest["tokens"]["eos_ids"] if eos_ids is None else eos_ids)
        random = np.random.default_rng(seed)
        logits, state = self.prefill(inputs)
        running = np.ones(len(logits), dtype=bool)
        columns: list[np.ndarray] = []
        while len(columns) < max_new_tokens:
            tokens = sample(logits, random, temperature, top_k, top_p) if do_sample else logits.argmax(-1)
            tokens = np.where(running, tokens, self.manifest["tokens"]["pad_id"])
            columns.append(tokens)
            if on_token is not None:
                on_token(tokens)
            running &= ~np.isin(tokens, ends)
            if not running.any() or len(columns) == max_new_tokens:
                break
            logits = self.step(tokens, state)
        return np.stack(columns, 1) if columns else np.zeros((len(logits), 0), dtype=np.int64)


def compact(keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each row's kept positions are, right-aligned.

    Args:
        keep: [B, S] bool.

    Returns:
        Indices [B, T] in rising order and their mask [B, T], bool; T is the largest number of any row, at least 1.
        Rows with fewer begin with masked places.
    """
    width = max(int(keep.sum(1).max()), 1)
    index = np.argsort(keep, 1, kind="stable")[:, keep.shape[1] - width :]
    return index, np.take_along_axis(keep, index, 1)


def remove(
    tokens: Tokens, removal: Mapping[str, Any], scores: np.ndarray | None
) -> tuple[np.ndarray, Tokens]:
    """Which tokens stay: all text, and of the visual ones those that a schedule's action keeps.

    Args:
        tokens: what there is.
        removal: the action, ``withdraw`` or ``keep``.
        scores: of each token [B, S], where the action needs them; None in a step without visual tokens.

    Returns:
        Their places [B, T] (see ``compact``), and the tokens that stay.
    """
    stay = tokens.attended & ~tokens.visual
    if removal["action"] == "keep" and tokens.visual.any():
        stay |= chosen(tokens.visual, removal["select"], scores)
    index, mask = compact(stay)
    rows = np.arange(len(index))[:, None]
    return index, Tokens(mask, tokens.visual[rows, index] & mask, tokens.positions[..., rows, index])


def chosen(visual: np.ndarray, select: Mapping[str, Any], scores: np.ndarray | None) -> np.ndarray:
    """The visual tokens that ``keep`` keeps, bool [B, S].

    Of n tokens ``count``, or the share ``ratio`` rounded up, stay: ``uniform`` ones the ceil(i n / m)-th for
    i = 0..m-1, otherwise those with the highest scores, the earlier among equals.
    """
    number = visual.sum(1)
    wanted = np.ceil(number * select["ratio"]) if "ratio" in select else np.minimum(number, select["count"])
    wanted = wanted.astype(np.int64)[:, None]
    if select["score"] == "uniform":
        ordinal = np.cumsum(visual, 1) - 1
        return visual & ((ordinal * wanted) % np.maximum(number, 1)[:, None] < wanted)
    assert scores is not None
    order = np.argsort(np.where(visual, -scores.astype(np.float64), np.inf), 1, kind="stable")
    rank = np.argsort(order, 1, kind="stable")
    return visual & (rank < wanted)


def sample(
    logits: np.ndarray,
    random: np.random.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> np.ndarray:
    """Draw one token per row from logits [B, V]; see ``OnnxModel.generate``."""
    if temperature <= 0:
        raise UsageError(
            f"a temperature of {temperature} is not above 0; for the most likely token do not sample"
        )
    drawn = []
    for row in logits.astype(np.float64) / temperature:
        order = np.argsort(-row, kind="stable")
        order = order[: top_k or None]
        weights = np.exp(row[order] - row[order[0]])
        weights /= weights.sum()
        before = np.cumsum(weights) - weights
        weights = np.where(before < top_p, weights, 0.0)
        weights[0] = weights[0] or 1.0
        drawn.append(order[random.choice(len(order), p=weights / weights.sum())])
    return np.array(drawn, dtype=np.int64)


def grid_positions(visual: np.ndarray, attended: np.ndarray, grids: np.ndarray, merge: int) -> np.ndarray:
    """Positions along time, row and column, [3, B, S]; text counts on, images hold their grid.

    An image of t x h x w merged patches that begins at position p has (p + time, p + row, p + column); the text
    behind it goes on at p + max(h, w). Qwen2-VL, arXiv:2409.12191.

    Args:
        visual: which positions are visual tokens [B, S].
        attended: which are no padding [B, S].
        grids: time, rows and columns of each image in patches [N, 3].
        merge: patches merged along each side of a visual token.
    """
    positions = np.zeros((3, *visual.shape), dtype=np.int64)
    image = iter(grids)
    for row in range(len(visual)):
        places = np.flatnonzero(attended[row])
        at, start = 0, 0
        while at < len(places):
            if not visual[row, places[at]]:
                positions[:, row, places[at]] = start
                at, start = at + 1, start + 1
                continue
            grid = next(image, None)
            if grid is None:
                raise UsageError("the prompt has more images than image_grid_thw")
            t, h, w = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
            block = places[at : at + t * h * w]
            if len(block) < t * h * w or not visual[row, block].all():
                raise UsageError(
                    f"an image of {t * h * w} visual tokens has fewer placeholders in the prompt"
                )
            positions[:, row, block] = start + np.indices((t, h, w)).reshape(3, -1)
            at, start = at + t * h * w, start + max(h, w)
    return positions


def _rows(model: OnnxModel, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """LLaVA: every image has the same number of features."""
    features = model.run("vision_encoder", {"pixel_values": inputs["pixel_values"]})["image_features"].numpy()
    return features.reshape(-1, features.shape[-1])


def _tiles(model: OnnxModel, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Idefics3 and SmolVLM: [B, n, 3, H, W] tiles; those that are all zero only fill up the batch."""
    pixels = inputs["pixel_values"].reshape(-1, *inputs["pixel_values"].shape[2:])
    real = (pixels != 0).any((1, 2, 3))
    size = model.manifest["vision"]["patch_size"]
    given = inputs.get(
        "pixel_attention_mask", np.ones((*inputs["pixel_values"].shape[:2], *pixels.shape[2:]))
    )
    mask = given.reshape(-1, *given.shape[2:])[real] != 0
    count, high, wide = mask.shape
    patches = mask.reshape(count, high // size, size, wide // size, size).any((2, 4))
    feeds = {"pixel_values": pixels[real], "patch_attention_mask": patches}
    features = model.run("vision_encoder", feeds)["image_features"].numpy()
    return features.reshape(-1, features.shape[-1])


def _patches(model: OnnxModel, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Qwen2-VL and Qwen2.5-VL: packed patches, run image by image so that attention stays small."""
    vision = model.manifest["vision"]
    out, start = [], 0
    for grid in inputs["image_grid_thw"].tolist():
        stop = start + math.prod(grid)
        feeds = {"pixel_values": inputs["pixel_values"][start:stop], **patch_feeds(grid, vision)}
        out.append(model.run("vision_encoder", feeds)["image_features"].numpy())
        start = stop
    return np.concatenate(out)


def patch_feeds(grid: Sequence[int], vision: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Where the patches of one image are and which of them see each other.

    Args:
        grid: time, rows, columns in patches.
        vision: ``spatial_merge_size`` m, and for towers with windows ``window``, their side in merged patches.
    """
    t, h, w = grid
    m = vision["spatial_merge_size"]
    rows, columns = (
        np.indices((h, w)).reshape(2, h // m, m, w // m, m).transpose(0, 1, 3, 2, 4).reshape(2, -1)
    )
    feeds = {
        "patch_positions": np.tile(np.stack([rows, columns], 1), (t, 1)),
        "segments": np.repeat(np.arange(t), h * w),
    }
    if vision.get("window"):
        size = vision["window"]
        time, high, wide = np.indices((t, h // m, w // m)).reshape(3, -1)
        across = -(-(w // m) // size)
        down = -(-(h // m) // size)
        window = (time * down + high // size) * across + wide // size
        order = np.argsort(window, kind="stable")
        feeds |= {"window_index": order, "windows": np.repeat(window[order], m * m)}
        # Patches stand in window order, frames one after the other: the segments stay as they are.
    return feeds


def _anyres(model: OnnxModel, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """LLaVA-NeXT and LLaVA-OneVision: the whole image and its tiles, [N, n, 3, H, W] padded along n."""
    vision = model.manifest["vision"]
    sizes = inputs["image_sizes"].tolist()
    single = inputs.get("batch_num_images")
    cut = [True] * len(sizes)
    if single is not None:  # OneVision cuts an image into tiles only where it is the only one of its prompt
        cut = [n == 1 for n in single.reshape(-1).tolist() for _ in range(n)]
    tile = vision["image_size"]
    resolutions = [best_resolution(size, vision["grid_pinpoints"]) for size in sizes]
    counts = [
        1 + (high // tile) * (wide // tile) if c else 1
        for (high, wide), c in zip(resolutions, cut, strict=True)
    ]
    pixels = inputs["pixel_values"]
    if pixels.ndim == 5:
        pixels = np.concatenate([image[:n] for image, n in zip(pixels, counts, strict=True)])
    out = model.run("vision_encoder", {"pixel_values": pixels})
    features, newline = out["image_features"].numpy(), out["image_newline"].numpy()
    starts = np.cumsum([0, *counts])
    packed = [
        pack(features[a:b], size, resolution, newline, vision)
        for a, b, size, resolution in zip(starts, starts[1:], sizes, resolutions, strict=False)
    ]
    return np.concatenate(packed)


def best_resolution(size: Sequence[int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The grid (height, width) that keeps most of an image's pixels and, among equals, wastes least."""
    high, wide = size

    def score(grid: Sequence[int]) -> tuple[int, int]:
        scale = min(grid[1] / wide, grid[0] / high)
        used = min(int(wide * scale) * int(high * scale), wide * high)
        return used, used - grid[0] * grid[1]

    best = max(pinpoints, key=score)
    return int(best[0]), int(best[1])


def pack(
    features: np.ndarray,
    size: Sequence[int],
    resolution: tuple[int, int],
    newline: np.ndarray,
    vision: Mapping[str, Any],
) -> np.ndarray:
    """One image's features in reading order [rows, D]: the whole image, then the tiles without their padding,
    with the new-line vector behind each line.

    Args:
        features: of the whole image and its tiles [n, T, D].
        size: the image's height and width.
        resolution: height and width of the grid of tiles.
        newline: [D].
        vision: ``image_size`` and ``patch_size`` of the tower; ``max_tiles``, where larger images are scaled down.
    """
    if len(features) == 1:
        return np.concatenate([features[0], newline[None]])
    side = vision["image_size"] // vision["patch_size"]
    down, across = resolution[0] // vision["image_size"], resolution[1] // vision["image_size"]
    grid = features[1:].reshape(down, across, side, side, -1).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(down * side, across * side, -1)
    high, wide = grid.shape[:2]
    if size[1] / size[0] > wide / high:
        edge = (high - int(round(size[0] * (wide / size[1]), 7))) // 2
        grid = grid[edge : high - edge]
    else:
        edge = (wide - int(round(size[1] * (high / size[0]), 7))) // 2
        grid = grid[:, edge : wide - edge]
    if vision.get("max_tiles"):
        ratio = math.sqrt(grid.shape[0] * grid.shape[1] / (vision["max_tiles"] * side**2))
        if ratio > 1.1:
            grid = shrink(grid, int(grid.shape[0] // ratio), int(grid.shape[1] // ratio))
    lines = np.broadcast_to(newline, (grid.shape[0], 1, grid.shape[2]))
    grid = np.concatenate([grid, lines.astype(grid.dtype)], 1)
    return np.concatenate([features[0], grid.reshape(-1, grid.shape[-1])])


def shrink(grid: np.ndarray, high: int, wide: int) -> np.ndarray:
    """Bilinear interpolation of [H, W, D] to [high, wide, D], pixel centres at one half, edges repeated."""

    def taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place = np.maximum((np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5, 0)
        low = np.minimum(place.astype(np.int64), old - 1)
        return low, np.minimum(low + 1, old - 1), (place - low).astype(np.float32)

    top, bottom, down = taps(grid.shape[0], high)
    left, right, across = taps(grid.shape[1], wide)
    values = grid.astype(np.float32)
    down, across = down[:, None, None], across[None, :, None]
    upper = values[top][:, left] * (1 - across) + values[top][:, right] * across
    lower = values[bottom][:, left] * (1 - across) + values[bottom][:, right] * across
    return (upper * (1 - down) + lower * down).astype(grid.dtype)


_ARRANGE: dict[str, Callable[[OnnxModel, Mapping[str, np.ndarray]], np.ndarray]] = {
    "rows": _rows,
    "tiles": _tiles,
    "patches": _patches,
    "anyres": _anyres,
}
