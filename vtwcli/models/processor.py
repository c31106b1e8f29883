"""The processor that comes with a model: tokenizer, image processor and chat template."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from vtwcli.errors import NotFoundError, first_line
from vtwcli.machine.libraries import quiet_libraries
from vtwcli.models.broken_torchvision import advice as torchvision_advice
from vtwcli.models.broken_torchvision import hide_if_broken
from vtwcli.models.checkpoint import Checkpoint
from vtwcli.models.families import Family
from vtwcli.models.jsonfiles import PROCESSOR, TEMPLATES, TOKENIZER, broken

# how transformers names a package that it misses
_PACKAGE = (
    r"pip install ([\w.-]*\w)|requires the (\w+) library|optional dependencies: (\w+)"
    r"|requires `(\w+)` to be installed"
)


def load_processor(checkpoint: Checkpoint) -> Any:
    """The processor that comes with a checkpoint.

    Raises:
        NotFoundError: there is none, or it cannot be read.
    """
    from transformers import AutoProcessor

    code = checkpoint.trust_remote_code
    reader = AutoProcessor if code else _without_video(checkpoint.family) or AutoProcessor
    try:
        with quiet_libraries():
            processor = reader.from_pretrained(checkpoint.path, trust_remote_code=code, local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also a panic of the tokenizers library, which is no Exception
        package = re.search(_PACKAGE, str(error))
        missing = next(filter(None, package.groups())).lower() if package else None
        broken_torchvision = hide_if_broken()
        if broken_torchvision and "torchvision" in str(error).lower():
            raise NotFoundError(
                f"the processor of {checkpoint.name!r} needs torchvision, and the installed one cannot be imported: "
                f"{broken_torchvision}",
                torchvision_advice(),
            ) from error
        if package is not None or isinstance(error, ImportError):
            raise NotFoundError(
                f"the processor of {checkpoint.name!r} needs a package that is not installed: {first_line(error)}",
                torchvision_advice()
                if missing == "torchvision"
                else f"install it: pip install {missing}"
                if missing
                else None,
            ) from error
        raise _broken_processor(checkpoint, error) from error
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise _no_processor(checkpoint, f"no {part.replace('_', ' ')}")
    if getattr(processor, "patch_size", 0) is None:
        raise _no_processor(checkpoint, "processor_config.json does not give patch_size")
    named = getattr(processor, "chat_template", None)
    if isinstance(
        named, list
    ):  # as tokenizers have them; a processor looks for them by name, and saves them so
        try:
            processor.chat_template = {one["name"]: one["template"] for one in named}
        except (TypeError, KeyError) as error:
            raise _no_processor(checkpoint, "its list of chat templates has no names") from error
    return processor


def _without_video(family: Family) -> Any:
    """The family's processor class without its video part, where that part needs torchvision and there is none.

    Images are all that is read here. None where the whole class can be used, or cannot be taken apart.
    """
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return None
    base = getattr(transformers, PROCESSOR_MAPPING_NAMES.get(family.model_type, ""), None)
    if base is None or getattr(
        base, "is_dummy", False
    ):  # a dummy stands for a class that wants another package
        return None
    parts = base.get_attributes()
    if parts[-1] != "video_processor":  # the class hands its parts on by their places
        return None

    class NoVideo(transformers.ProcessorMixin):
        """Stands behind the class, which may hand on its parts by their names."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("video_processor", None)
            super().__init__(*args, **kwargs)

    class ImagesOnly(base, NoVideo):  # type: ignore[misc, valid-type]
        video_processor = SimpleNamespace(num_frames=None, fps=None)  # SmolVLM asks for these of images too

        @classmethod
        def get_attributes(cls) -> list[str]:
            return parts[:-1]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            return super().from_args_and_dict(args, {**processor_dict, "video_processor": None}, **kwargs)

    ImagesOnly.__name__ = base.__name__  # is saved with the processor
    return ImagesOnly


def _broken_processor(checkpoint: Checkpoint, error: BaseException) -> NotFoundError:
    """Why a processor cannot be read, with the file that is to blame where it can be told."""
    from tokenizers import Tokenizer
    from transformers import AutoImageProcessor, AutoTokenizer

    path = checkpoint.path
    if found := broken(path, (*TOKENIZER, *PROCESSOR, *TEMPLATES[1:])):
        return found
    readers: list[tuple[Any, tuple[str, ...]]] = [
        (lambda: Tokenizer.from_file(str(path / TOKENIZER[0])), TOKENIZER[:1]),
        (lambda: AutoTokenizer.from_pretrained(path, local_files_only=True), TOKENIZER[1:]),
        (lambda: AutoImageProcessor.from_pretrained(path, local_files_only=True), PROCESSOR),
    ]
    for read, names in readers:
        there = [name for name in names if (path / name).is_file()]
        if there:
            try:
                with quiet_libraries():
                    read()
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as reason:
                return _no_processor(checkpoint, f"{' or '.join(there)}: {first_line(reason)}")
    return _no_processor(checkpoint, first_line(error))


def _no_processor(checkpoint: Checkpoint, reason: str) -> NotFoundError:
    return NotFoundError(
        f"{checkpoint.name!r} has no usable processor: {reason}",
        "copy the tokenizer and processor files (tokenizer.json, processor_config.json, ...) of the base model "
        "beside the weights",
    )
