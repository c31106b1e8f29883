"""A model without memory for its weights, built from its config."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from vtwcli.errors import NotFoundError, first_line
from vtwcli.machine.libraries import quiet_libraries
from vtwcli.models.config import SIZES, ConfigFile, is_odd

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_NO_BUFFER_BYTES = 1 << 30  # of tables that are computed from the config; real ones take a few MiB


def bare_model(
    config: PretrainedConfig,
    dtype: torch.dtype,
    attn: str | None,
    trust_remote_code: bool,
    *,
    name: str,
    file: ConfigFile,
    stored: int | None,
) -> PreTrainedModel:
    """A model with all tensors on the meta device: it takes no memory, whatever sizes the config gives.

    Args:
        config: of the model; left as it is.
        dtype: of its tensors.
        attn: attention implementation of transformers, or None for its default.
        trust_remote_code: whether code that comes with the model may run.
        name: of the model, for messages.
        file: where the config was read.
        stored: tensors in the model's files; None for files without weights, such as an export to ONNX.

    Raises:
        NotFoundError: the config describes no model, or one of far more parameters than are stored.
    """
    from transformers import AutoModelForImageTextToText

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if attn is not None:
        options["attn_implementation"] = attn
    try:
        with (
            quiet_libraries(),
            warnings.catch_warnings(),
            _bounded(name, file, stored),
            torch.device("meta"),
        ):
            warnings.simplefilter("ignore")  # torch's, about tensors without elements
            model = AutoModelForImageTextToText.from_config(deepcopy(config), dtype=dtype, **options)
    except NotFoundError:
        raise
    except Exception as error:  # there is no telling what unusual settings make transformers raise
        if attn not in (None, "eager"):  # may be what is wrong; eager attention is everywhere
            raise
        raise NotFoundError(
            f"{file} describes no model that can be built{file.named(is_odd)}: {first_line(error)}"
        ) from error
    size = sum(buffer.nbytes for _, _, buffer in computed_buffers(model))
    if size > _NO_BUFFER_BYTES:
        large = file.named(lambda _, value: value >= 10**4)
        raise NotFoundError(f"{file} asks for tables of {size / 1e9:,.1f} GB beside the weights{large}")
    return model


def computed_buffers(model: PreTrainedModel) -> list[tuple[Any, str, torch.Tensor]]:
    """Owner, name and value of the buffers that no checkpoint holds: rotary tables, position ids..."""
    found = []
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf in module._non_persistent_buffers_set:
            found.append((module, leaf, buffer))
    return found


@contextmanager
def _bounded(name: str, file: ConfigFile, stored: int | None) -> Iterator[None]:
    """Stop the building of a model that has far more parameters than the checkpoint's files hold.

    Every layer is a Python object, also without memory for its weights: thousands of millions of them never end.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    # one stored tensor may be split in the model: q, k, v; gate, up
    limit, held = (50_000, 0) if stored is None else (1_000 + 10 * stored, stored)
    count = 0

    def registered(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            many = file.named(lambda name, value: value > max(held, 100) and SIZES.search(name))
            raise NotFoundError(
                f"{file} describes a model of more than {limit:,} tensors{many}; the weights of {name!r} hold {held:,}"
            )

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()
