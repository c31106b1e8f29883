"""The code that an exported directory carries, so that it loads pruned where this package is not installed."""

from __future__ import annotations

import re
from pathlib import Path

from vtwcli.models.families import Family

MODELING = "modeling_vtw.py"
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")

_TEMPLATE = '''"""Loads {title} with the visual token schedule of config.json at work.

``AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)`` takes this class. Without the flag the
same files load as transformers' own, unpruned class.
"""

from transformers import GenerationMixin
from transformers import {architecture} as Base

from .vtw_loading import load, prepare_config
from .vtw_pruning import apply

# Releases of transformers before 5.10 copy the files that are named here, but not those that they name in turn.
{others}


class {architecture}(Base, GenerationMixin):
    """transformers' class of the same name under the schedule ``config.vtw["schedule"]``."""

    # GenerationMixin is named again because transformers subclasses remote code that does not name it.

    def __init__(self, config, *args, **kwargs):
        prepare_config(config)
        super().__init__(config, *args, **kwargs)
        apply(self, config.vtw["schedule"], config.vtw["layout"])

    @classmethod
    def from_pretrained(cls, name, *args, **kwargs):
        return load(cls, super().from_pretrained, name, *args, **kwargs)

    @classmethod
    def is_custom_code(cls):
        # Modules and weights are the library's, so the library's renaming of stored weights must apply.
        return False

    @classmethod
    def _can_set_experts_implementation(cls):
        # transformers looks for the answer in the source file of the class.
        return Base._can_set_experts_implementation()
'''


_PACKAGE = Path(__file__).parents[2]
_FIRST = ("runtime.loading", "runtime.pruning")  # what the model class imports
_IMPORT = re.compile(r"^(\s*from )vtwcli\.((?:runtime|schedule)\.(\w+)) import\b", re.MULTILINE)


def remote_code(family: Family) -> dict[str, str]:
    """File name -> text of the Python files for a family: a small model class, the runtime, and how it is loaded."""
    code = travelling_code()
    model = _TEMPLATE.format(
        title=family.title,
        architecture=family.architecture,
        others="\n".join(f"from .{name.removesuffix('.py')} import __name__ as _" for name in code),
    )
    return {MODELING: model, **code}


def travelling_code() -> dict[str, str]:
    """File name -> text of this package's modules that an export carries: those that its model class needs.

    They lie flat beside the model class and import each other as ``.vtw_NAME``. transformers finds what to copy by a
    search for lines with ``from .NAME import``, so that is all it is told.
    """
    found: dict[str, str] = {}
    waiting = list(_FIRST)
    while waiting:
        module = waiting.pop()
        name = f"vtw_{module.rpartition('.')[2]}.py"
        if name not in found:
            text = _PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
            waiting += [needed for _, needed, _ in _IMPORT.findall(text)]
            found[name] = _IMPORT.sub(r"\1.vtw_\3 import", text)
    return dict(sorted(found.items()))


def auto_map(family: Family) -> dict[str, str]:
    """The entry of config.json that leads transformers to the model class."""
    reference = f"{MODELING.removesuffix('.py')}.{family.architecture}"
    return dict.fromkeys(AUTO_CLASSES, reference)
