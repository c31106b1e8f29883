"""What an ONNX export reads: a loaded model or a checkpoint's files, one parameter at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtwcli.errors import UsageError
from vtwcli.models.checkpoint import Checkpoint
from vtwcli.models.families import Family
from vtwcli.models.loading import LoadedModel
from vtwcli.models.processor import load_processor


@dataclass(frozen=True)
class Source:
    """What an export needs to know of a model, loaded or not.

    Attributes:
        name: what the user asked for.
        revision: the Hub commit, or None.
        config: the transformers config.
        family: its row of the family table.
        read: names of a parameter -> its values.
        loaded: the model in float32, if it is there.
        checkpoint: its files, if it has any.
    """

    name: str
    revision: str | None
    config: Any
    family: Family
    read: Callable[[Sequence[str]], Tensor]
    loaded: LoadedModel | None
    checkpoint: Checkpoint | None

    @classmethod
    def of(cls, model: LoadedModel | Checkpoint) -> Source:
        """The source for either form.

        Raises:
            UsageError: a model without files that is not in float32, or quantized weights that only their library
                unpacks.
        """
        files = model.checkpoint if isinstance(model, LoadedModel) else model
        quantization = files.quantization if files is not None else None
        if quantization is not None and quantization.sealed is not None:
            raise UsageError(
                f"{model.name} is quantized, and no graphs can be made of it: {quantization.sealed}",
                "export the model from which it was quantized, with --quantize int8 or int4",
            )
        if isinstance(model, LoadedModel):
            checkpoint = model.checkpoint
            real = not any(parameter.is_meta for parameter in model.model.parameters())
            if real and model.dtype == torch.float32 and quantization is None:
                state = model.model.state_dict()
                return cls(
                    model.name,
                    model.revision,
                    model.config,
                    model.family,
                    lambda names: state[names[0]],
                    model,
                    checkpoint,
                )
            if checkpoint is None:
                raise UsageError("the export compares with torch in float32", "load the model in float32")
        else:
            checkpoint = model
        read = file_reader(checkpoint)
        return cls(
            checkpoint.name, checkpoint.revision, checkpoint.config, checkpoint.family, read, None, checkpoint
        )

    @property
    def depth(self) -> int:
        """Number of decoder layers L."""
        return int(self.config.get_text_config().num_hidden_layers)

    @property
    def public_name(self) -> str:
        """What a manifest calls the model: of a Hub id without the revision, of a local path the last part."""
        return self.name.partition("@")[0] if self.revision is not None else Path(self.name).name

    def skeleton(self, dtype: torch.dtype) -> Any:
        """The model without weights, with a config of its own."""
        trust = self.checkpoint is not None and self.checkpoint.trust_remote_code
        config = copy.deepcopy(self.config)
        path = self.checkpoint.path if self.checkpoint is not None else Path()
        return Checkpoint(self.name, path, None, config, self.family, trust).skeleton(dtype, "sdpa")

    def processor(self) -> Any:
        """The processor.

        Raises:
            NotFoundError: the checkpoint has none.
        """
        if self.loaded is not None:
            return self.loaded.processor
        assert self.checkpoint is not None
        return load_processor(self.checkpoint)

    def generation_config(self) -> Any:
        """The generation config that comes with the model."""
        from transformers import GenerationConfig

        if self.loaded is not None:
            return self.loaded.model.generation_config
        assert self.checkpoint is not None
        try:
            return GenerationConfig.from_pretrained(self.checkpoint.path, local_files_only=True)
        except OSError:
            return GenerationConfig.from_model_config(self.config)


def file_reader(checkpoint: Checkpoint) -> Callable[[Sequence[str]], Tensor]:
    """A function that reads one parameter from the checkpoint's files."""
    stored = checkpoint.key_map

    def read(names: Sequence[str]) -> Tensor:
        place = next((stored[name] for name in names if name in stored), None)
        if place is None:
            raise UsageError(
                f"{checkpoint.name}: {names[0]!r} is not stored as the model holds it",
                "export the loaded model",
            )
        return place.read()

    return read
