"""What must be installed to load a model's processor: told in the cards of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vtwcli.models.families import Family
from vtwcli.models.jsonfiles import TOKENIZER

_ALSO = {"smolvlm": "num2words"}  # for words about videos, asked for in any case
_SENTENCEPIECE = "tokenizer.model"


def processor_packages(family: Family, path: Path) -> dict[str, str]:
    """Packages beside transformers and torch that ``AutoProcessor`` wants, each with the part that wants it.

    The answer is the same whether or not they are installed here.

    Args:
        family: of the model.
        path: the directory of its tokenizer.
    """
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    packages = {"pillow": "images"}
    processor: Any = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(family.model_type, ""), None)
    # a class that wants what is not installed is a stand-in, which names it otherwise than the class itself
    wanted: Any = getattr(processor, "_backends", None) or getattr(processor, "__backends", ())
    images = IMAGE_PROCESSOR_MAPPING_NAMES.get(family.model_type)
    if "torchvision" in map(str, wanted):
        packages["torchvision"] = "the processor"
    elif images and not images.get("pil"):
        packages["torchvision"] = "the image processor"
    elif hasattr(processor, "get_attributes") and "video_processor" in processor.get_attributes():
        packages["torchvision"] = "the video part"
    if family.model_type in _ALSO:
        packages[_ALSO[family.model_type]] = "the processor"
    if (path / _SENTENCEPIECE).is_file() and not (path / TOKENIZER[0]).is_file():
        packages["sentencepiece"] = "the tokenizer"
    return packages
