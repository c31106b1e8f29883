"""An exported model: from prompts to tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .errors import NotFinite, UsageError
from .images import image_features
from .removal import parts, remove
from .sampling import sample
from .sessions import Sessions
from .tokens import State, Tokens, grid_positions, last_places


class OnnxModel(Sessions):
    """An exported model, ready to generate.

    Args:
        directory: made by ``vtw export --format onnx``.
        device: ``cpu`` or ``cuda``.
        threads: of a session; 0 lets the backend choose.
        backend: what runs the graphs, ``onnx`` for ONNX Runtime or ``openvino``.

    Raises:
        NotFoundError: no manifest, or a graph that cannot be loaded.
        UsageError: a backend that is not installed, or a device that it does not have.
    """

    def __init__(
        self, directory: str | Path, device: str = "cpu", threads: int = 0, backend: str = "onnx"
    ) -> None:
        super().__init__(directory, device, threads, backend)

    def embed(self, input_ids: np.ndarray) -> np.ndarray:
        """Token embeddings [B, S, D]."""
        return self.run("embed_tokens", {"input_ids": input_ids})["inputs_embeds"].numpy()

    def features(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """The features of all images, in the order of their placeholders [rows, D]; None without images.

        Args:
            inputs: what the model's processor returns, as numpy arrays. ``image_features`` among them, from an
                earlier call, are taken as they are.

        Raises:
            UsageError: a video among the inputs.
        """
        return image_features(inputs, self.manifest["vision"], partial(self.run, "vision_encoder"))

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
        if visual[np.arange(len(visual)), last_places(attended)].any() and any(
            graph["removal"] or any(port["name"].endswith("text_index") for port in graph["inputs"])
            for graph in self.decoders
        ):
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
        for prefix, part in (("", inside), ("kept_", after)):
            if f"{prefix}text_index" in names:
                offered[f"{prefix}text_index"], offered[f"{prefix}visual_index"] = parts(part)
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
