"""The code that an exported directory carries, so that it loads pruned where this package is not installed."""

from __future__ import annotations

from pathlib import Path

from vtwcli.models.families import Family

MODELING = "modeling_vtw.py"
RUNTIME = "vtw_pruning.py"
LOADING = "vtw_loading.py"
AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")

_TEMPLATE = '''"""Loads {title} with the visual token schedule of config.json at work.

``AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)`` takes this class. Without the flag the
same files load as transformers' own, unpruned class.
"""

from transformers import GenerationMixin
from transformers import {architecture} as Base

from .vtw_loading import load, prepare_config
from .vtw_pruning import apply


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


def remote_code(family: Family) -> dict[str, str]:
    """File name -> text of the Python files for a family: a small model class, the runtime, and how it is loaded."""
    from vtwcli.runtime import loading, pruning

    model = _TEMPLATE.format(title=family.title, architecture=family.architecture)
    texts = {name: Path(module.__file__ or "") for name, module in ((RUNTIME, pruning), (LOADING, loading))}
    return {MODELING: model, **{name: file.read_text(encoding="utf-8") for name, file in texts.items()}}


def auto_map(family: Family) -> dict[str, str]:
    """The entry of config.json that leads transformers to the model class."""
    reference = f"{MODELING.removesuffix('.py')}.{family.architecture}"
    return dict.fromkeys(AUTO_CLASSES, reference)
