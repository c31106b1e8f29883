"""A model for lmms-eval: ``--model vtw --model_args pretrained=MODEL,layer=K`` (or ``schedule=FILE``, ``method=NAME``).

lmms-eval finds ``manifest`` by the entry-point group ``lmms_eval.models``; nothing else imports this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from vtwcli.errors import UsageError

if TYPE_CHECKING:
    from vtwcli.recipe.recipe import ModelSection
    from vtwcli.schedule.schedule import Schedule

_MOST_TOKENS = 1024  # of an answer where the task does not say


def manifest() -> ModelManifest:
    """What lmms-eval registers: the name ``vtw`` and the class behind it."""
    return ModelManifest("vtw", chat_class_path="vtwcli.lmms_eval.Pruned")


class Pruned(lmms):
    """A model under a schedule, answering chat messages with images, in batches, greedily unless the task samples.

    As lmms-eval's own wrapper of Hugging Face models does, the chat template makes the prompt, and a task's ``until``
    is left to the model's end tokens.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        schedule: str | None = None,
        layer: int | str | None = None,
        method: str | None = None,
        batch_size: int | str | None = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool | str = False,
        system_prompt: str | None = None,
        **unknown: Any,
    ) -> None:
        """Load the model and set it to run pruned.

        Args:
            pretrained: a directory, a Hub id or ``demo``; an exported directory brings its schedule along.
            schedule: file of a schedule or a calibration result.
            layer: withdraw at this layer, in place of a file.
            method: a method by name, with its defaults for this model's depth.
            batch_size: prompts that are answered together.
            device, dtype: as ``vtw eval`` takes them.
            attn_implementation: attention of transformers.
            trust_remote_code: run code that comes with the model.
            system_prompt: text of a system turn, or a file that holds it.

        Raises:
            UsageError: an argument that is not known, or more than one schedule.
        """
        super().__init__()
        from vtwcli.export.hf.export import baked_schedule
        from vtwcli.models.loading import load
        from vtwcli.recipe.recipe import ModelSection
        from vtwcli.runtime import apply

        asked = sorted(set(unknown) - {"max_batch_size"})
        if asked:
            raise UsageError(f"--model_args {asked[0]}: unknown", "see vtw docs lmms")
        if sum(one is not None for one in (schedule, layer, method)) > 1:
            raise UsageError("--model_args: give one of schedule, layer and method")
        trusted = str(trust_remote_code).lower() in ("true", "1")
        section = ModelSection(name=pretrained, trust_remote_code=trusted)
        chosen = _schedule(section, schedule, layer, method)
        self.batch_size = int(batch_size or 1)
        self.system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else None
        self._loaded = load(
            pretrained,
            device=device or "auto",
            dtype=dtype,
            attn=attn_implementation,
            trust_remote_code=trusted,
        )
        if chosen is None and self._loaded.checkpoint is not None:
            chosen = baked_schedule(self._loaded.checkpoint.config)
        self.pruning = None if chosen is None else apply(self._loaded.model, chosen)

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer requests whose arguments are (context, messages of a document, settings, document, task, split).

        Raises:
            UsageError: a request with video or audio.
        """
        from tqdm import tqdm

        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="vtw", disable=self.rank != 0) as bar:
            for places in self._batches(requests):
                found = self._answer([requests[place] for place in places])
                for place, one in zip(places, found, strict=True):
                    context, settings = requests[place].args[0], requests[place].args[2]
                    self.cache_hook.add_partial("generate_until", (context, settings), one.text)
                    answers[place] = one
                bar.update(len(places))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: tasks that generate are what pruning is measured by."""
        raise UsageError("vtw answers; it does not score given answers", "choose a task that generates")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered."""
        raise UsageError("vtw does not answer in several rounds")

    def _batches(self, requests: Sequence[Any]) -> Iterator[list[int]]:
        """Places of requests that are answered together: of equal settings, at most ``batch_size`` each."""
        by_settings: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[2].items())), []).append(place)
        for places in by_settings.values():
            for start in range(0, len(places), self.batch_size):
                yield places[start : start + self.batch_size]

    def _answer(self, requests: Sequence[Any]) -> list[GenerationResult]:
        import torch

        loaded, texts, images = self._loaded, [], []
        for request in requests:
            _, to_messages, _, document, task, split = request.args
            turns = to_messages(self.task_dict[task][split][document])
            if self.system_prompt:
                turns = self._apply_system_prompt(turns, self.system_prompt)
            messages = ChatMessages(messages=turns)
            pictures, videos, sounds = messages.extract_media()
            if videos or sounds:
                raise UsageError(f"task {task!r}: vtw takes images, not video or audio")
            texts.append(
                loaded.processor.apply_chat_template(
                    messages.to_hf_messages(), tokenize=False, add_generation_prompt=True
                )
            )
            images.append([picture.convert("RGB") for picture in pictures])
        tokenizer = loaded.processor.tokenizer
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        shown = {"images": images} if any(images) else {}
        inputs = loaded.processor(text=texts, padding=True, return_tensors="pt", **shown).to(loaded.device)
        inputs = {
            name: one.to(loaded.dtype) if one.is_floating_point() else one for name, one in inputs.items()
        }
        settings = requests[0].args[2]
        sampled = {"do_sample": False}
        if settings.get("temperature"):
            sampled = {
                "do_sample": True,
                "temperature": settings["temperature"],
                "top_p": settings.get("top_p"),
            }
        with torch.no_grad():
            output = loaded.model.generate(
                **inputs,
                max_new_tokens=settings.get("max_new_tokens", _MOST_TOKENS),
                num_beams=settings.get("num_beams") or 1,
                pad_token_id=tokenizer.pad_token_id,
                **sampled,
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        said = tokenizer.batch_decode(new, skip_special_tokens=True)
        counts = [int((row != tokenizer.pad_token_id).sum()) for row in new]
        return [
            GenerationResult(text.strip(), TokenCounts(output_tokens=count))
            for text, count in zip(said, counts, strict=True)
        ]


def _schedule(
    model: ModelSection, schedule: str | None, layer: int | str | None, method: str | None
) -> Schedule | None:
    """The schedule that ``--model_args`` name; None where they name none."""
    from vtwcli.recipe.recipe import Recipe
    from vtwcli.recipe.schedules import schedules_of

    given = {"schedule": None if schedule is None else Path(schedule), "layer": layer, "method": method}
    found = schedules_of(given, Recipe(), model)
    return found[0][1] if found else None
