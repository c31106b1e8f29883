"""A torchvision that is installed but cannot be imported, as one that was built for another torch.

transformers asks only whether it is installed, and then fails wherever it imports it.
"""

from __future__ import annotations

import re
import sys
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from vtwcli.errors import typed_line

_APART = 15
"""torchvision 0.28 belongs to torch 2.13, and so on for every release of torch 2."""


@cache
def hide_if_broken() -> str | None:
    """Make this process take a torchvision that cannot be imported for one that is not installed.

    Importing takes a second, so it is asked where a model is about to be loaded, and only if it is installed.

    Returns:
        Why it cannot be imported, or None if it can or is not there.
    """
    name = "torchvision"
    if name in sys.modules or find_spec(name) is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module(name)
    except Exception as error:  # whatever a build for another torch stumbles over
        for part in [module for module in sys.modules if module.startswith(f"{name}.")]:
            del sys.modules[part]
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own mark for: there is none
        asked = sys.modules.get("transformers.utils.import_utils")
        for function in vars(asked).values() if asked else ():
            if hasattr(function, "cache_clear"):
                function.cache_clear()  # what it found out before
        return typed_line(error)
    return None


def advice() -> str:
    """Where a torchvision comes from that works: its number, and the index that has builds for the torch in use."""
    import torch

    number = re.match(r"2\.(\d+)", torch.__version__)
    fitting = f"torchvision 0.{int(number.group(1)) + _APART}" if number else "the torchvision"
    return f"install {fitting} that is built for torch {torch.__version__}, from the same index as torch"
