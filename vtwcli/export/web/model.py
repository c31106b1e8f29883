"""An exported directory run in Python the way that transformers.js runs it: same graphs, same feeds, same order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vtwcli.export.web.graphs import DECODER, GRIDS
from vtwcli.ort import NotFinite, NotFoundError, UsageError
from vtwcli.ort.tokens import grid_positions

_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


@dataclass
class State:
    """What the library carries from step to step: the past, and by how much positions are off its length [B]."""

    past: dict[str, np.ndarray]
    delta: np.ndarray

    def cache_lengths(self) -> list[int]:
        """Entries of each layer's keys, by layer."""
        keys = {int(name.split(".")[1]): value for name, value in self.past.items() if name.endswith(".key")}
        return [keys[layer].shape[2] for layer in sorted(keys)]


class WebModel:
    """The three graphs.

    Args:
        directory: what ``export_web`` made.
        manifest: of it.

    Raises:
        NotFoundError: a graph that cannot be loaded.
    """

    def __init__(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        self.manifest = manifest
        self.sessions = {graph["role"]: _open(directory / graph["file"]) for graph in manifest["graphs"]}

    def run(self, role: str, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Outputs of a graph by name; it is fed what it has inputs for.

        Raises:
            UsageError: the graph refuses them.
        """
        session = self.sessions[role]
        given: dict[str, np.ndarray] = {
            port.name: np.ascontiguousarray(feeds[port.name], dtype=_TYPES[port.type])
            for port in session.get_inputs()
        }
        try:
            values = session.run(None, given)
        except Exception as error:  # onnxruntime's own exceptions have no common base
            words = str(error)
            if "refused: " in words:
                raise UsageError(words[words.index("refused: ") :].partition("'")[0]) from error
            raise
        return dict(zip([port.name for port in session.get_outputs()], values, strict=True))

    def prefill(self, inputs: Mapping[str, Any]) -> tuple[np.ndarray, State]:
        """Run the prompt.

        Args:
            inputs: ``input_ids`` and ``attention_mask`` [B, S], and what the library's image processor returns.

        Returns:
            Logits behind the last token [B, V], and the state to go on with.

        Raises:
            UsageError: what the graph refuses, or placeholders that do not match the images.
            NotFinite: logits that are not finite.
        """
        arrays = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
        ids = arrays["input_ids"]
        attended = arrays.get("attention_mask", np.ones_like(ids))
        hidden = self.run("embed_tokens", {"input_ids": ids})["inputs_embeds"]
        visual = np.isin(ids, self.manifest["tokens"]["placeholder_ids"])
        if arrays.get("pixel_values") is not None:
            if (grid := arrays.get("image_grid_thw")) is not None:
                arrays |= dict.fromkeys(GRIDS.values(), grid)
            if self.manifest["vision"]["arrange"] == "anyres":  # whole images, without tiles
                pixels = arrays["pixel_values"]
                arrays["pixel_values"] = pixels.reshape(-1, *pixels.shape[-3:])
            features = self.run("vision_encoder", arrays)["image_features"]
            features = features.reshape(-1, features.shape[-1])
            if len(features) != int(visual.sum()):
                raise UsageError(
                    f"the prompt has {int(visual.sum())} visual tokens, the images give {len(features)}"
                )
            hidden[visual] = features
        if self.manifest["positions"] == "grid":
            grids = arrays.get("image_grid_thw", np.zeros((0, 3), dtype=np.int64))
            positions = grid_positions(
                visual, attended != 0, grids, self.manifest["vision"]["spatial_merge_size"]
            )
            reached = positions.max((0, 2))
        else:
            positions = np.where(attended != 0, np.cumsum(attended, 1) - 1, 1)
            reached = positions.max(1)
        state = State({}, reached + 1 - ids.shape[1])
        return self._decode(hidden, attended, positions, state), state

    def step(self, tokens: np.ndarray, state: State) -> np.ndarray:
        """Run one more token of each row, [B], and return the logits behind it, [B, V]; ``state`` moves on."""
        column = np.asarray(tokens, dtype=np.int64)[:, None]
        length = state.cache_lengths()[0]  # the library looks at layer 0 alone
        positions = (length + state.delta)[:, None]
        if self.manifest["positions"] == "grid":
            positions = np.repeat(positions[None], 3, 0)
        hidden = self.run("embed_tokens", {"input_ids": column})["inputs_embeds"]
        return self._decode(hidden, np.ones((len(column), length + 1), dtype=np.int64), positions, state)

    def _decode(
        self, hidden: np.ndarray, attended: np.ndarray, positions: np.ndarray, state: State
    ) -> np.ndarray:
        past = state.past or {
            port.name: np.zeros((len(hidden), port.shape[1], 0, port.shape[3]), dtype=_TYPES[port.type])
            for port in self.sessions[DECODER].get_inputs()
            if port.name.startswith("past_key_values.")
        }
        feeds = {"inputs_embeds": hidden, "attention_mask": attended, "position_ids": positions, **past}
        out = self.run(DECODER, feeds)
        state.past = {
            name.replace("present", "past_key_values"): value
            for name, value in out.items()
            if name.startswith("present")
        }
        logits = out["logits"][:, -1].astype(np.float32)
        if len(bad := np.flatnonzero(~np.isfinite(logits.max(-1)))):
            raise NotFinite(int(bad[0]), "the graphs' logits are not finite (NaN or infinity)")
        return logits


def as_the_library(inputs: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers.js's processor would make of the same images, as torch tensors.

    LLaVA-OneVision's is the one difference: the library does not cut images into tiles, as the model itself does not
    where a prompt has several.

    Args:
        inputs: of one prompt, from the model's own processor.
        manifest: of the export.
    """
    import torch

    given = dict(inputs)
    if manifest["vision"]["arrange"] != "anyres" or given.get("pixel_values") is None:
        return given
    vision, ids = manifest["vision"], given["input_ids"][0]
    visual = torch.isin(ids, torch.tensor(manifest["tokens"]["placeholder_ids"]))
    begins = visual & ~torch.cat([visual.new_zeros(1), visual[:-1]])
    rows = math.prod([vision["image_size"] // vision["patch_size"]] * 2) + 1
    repeats = torch.where(begins, rows, torch.where(visual, 0, 1))
    given["input_ids"] = ids.repeat_interleave(repeats)[None]
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    pixels = given["pixel_values"]
    given["pixel_values"] = pixels[:, :1] if pixels.ndim == 5 else pixels
    given["batch_num_images"] = torch.tensor([max(2, len(pixels))])  # from two on nothing is cut into tiles
    return given


def _open(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is refused raises; it need not be printed too
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise NotFoundError(f"{path} cannot be loaded: {str(error).strip().partition(chr(10))[0]}") from error
