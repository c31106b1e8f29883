"""The libraries under this one: their versions, and how much of what they say is let through."""

from __future__ import annotations

import logging
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from io import StringIO

from vtwcli import __version__


class Settings:
    """What this process tells.

    Attributes:
        quiet: no progress and no words but warnings and errors.
        verbose: more of them, and those of the libraries.
        unwritten: why not all results came out on stdout.
        kept: says what is left if the work is interrupted now, and how to go on.
    """

    quiet = False
    verbose = False
    unwritten: OSError | None = None
    kept: Callable[[], str] | None = None


settings = Settings()


def versions() -> dict[str, str]:
    """Versions of the tool and of the libraries that its numbers depend on."""
    libraries = ("torch", "transformers", "datasets", "numpy", "safetensors")
    return {
        "vtwcli": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
    }


def quiet_imports() -> None:
    """Hold back what torchao says when transformers imports it, for any model: kernels of other machines that it cannot
    load, and torch's word on how it registers types."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_libraries(bars: bool = False) -> Iterator[None]:
    """Hold back the warnings of transformers and huggingface_hub unless ``--verbose``; errors come through.

    Transformers does not ask on the terminal whether a directory's code may run: --trust-remote-code has said it.

    Args:
        bars: leave their progress bars on.
    """
    from huggingface_hub.utils import logging as hub
    from transformers import dynamic_module_utils
    from transformers.utils import logging as own

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    if settings.verbose:
        yield
        return
    quiet_imports()
    level, hub_level = own.get_verbosity(), hub.get_verbosity()
    hide = own.is_progress_bar_enabled() and not bars
    own.set_verbosity_error()
    hub.set_verbosity_error()
    if hide:
        own.disable_progress_bar()
    try:
        yield
    finally:
        own.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if hide:
            own.enable_progress_bar()


@contextmanager
def quiet_quantizers() -> Iterator[None]:
    """Hold back what libraries of quantized weights write to stderr as they load them, bars above all, unless
    ``--verbose``; and what bitsandbytes says at every step afterwards. Failures come as exceptions."""
    if settings.verbose:
        yield
        return
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with redirect_stderr(StringIO()):
        yield


@contextmanager
def quiet_exporters() -> Iterator[None]:
    """Hold back the ONNX exporter's warnings and log lines; failures come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
