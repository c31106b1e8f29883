"""Chat templates and what they make of a sample: the forms in which they want it, and whether its text got through.

Templates come with models, of many ages. Some read a message's content as a list of parts, some as plain text, some
put images where they like; written for another form than they are given, they drop the text or print a list as Python
writes it, without an error. So the forms are tried one after the other, and what comes out is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

from vtwcli.data.sample import Sample
from vtwcli.models.templates import template_of

TODAY = datetime(2025, 1, 1)
"""What templates are told that ask for today's date, so that a run can be repeated another day."""

_DIRECTIVES = ("-d", "-m", "-e", "-H", "-I", "-M", "-S", *"aAbBcdeHIjmMpSuUwWxXyY")
_PRINTED = re.compile(
    r"""['"]type['"]\s*:\s*['"](?:text|image)['"]"""
)  # a list of parts as Python or JSON writes it

Message = dict[str, Any]


def fixed_date(processor: Any) -> str | None:
    """The date that the template is told (ISO 8601), if it asks for today's."""
    template = template_of(processor)
    return TODAY.date().isoformat() if template is not None and "strftime_now" in template else None


def dated(template: str) -> str:
    """A template that knows ``TODAY`` for today's date."""
    if "strftime_now" not in template:
        return template
    said = [(f"%{one}", TODAY.strftime(f"%{one}")) for one in _DIRECTIVES]
    steps = "".join(f' | replace("{directive}", "{text}")' for directive, text in said)
    return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n{template}"


def media_tokens(processor: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """The strings that stand for images and videos in a prompt, longest first; text must not contain them.

    Args:
        processor: a processor, which names its tokens in attributes.
        ids: of the placeholders in ``input_ids``.
    """
    tokens = {str(value) for name, value in vars(processor).items() if name.endswith("_token") and value}
    tokens |= {str(token) for token in processor.tokenizer.convert_ids_to_tokens(list(ids)) if token}
    return tuple(sorted(tokens, key=lambda token: (-len(token), token)))


def conversations(sample: Sample, answer: str | None, image_token: str | None) -> Iterator[list[Message]]:
    """The turns of a sample in the forms in which templates want them, the usual one first.

    Args:
        sample: the user's turn, and the system's before it.
        answer: text of an assistant's turn behind it.
        image_token: what stands for an image in text; where a template moves images, their places are written so.
    """
    usual, parts = _content(sample), _parts(sample.prompt)
    doubled = [part | {"content": part["text"]} if "text" in part else part for part in usual]

    def turns(content: Any, others: Any) -> list[Message]:
        said = [("system", others(sample.system))] if sample.system else []
        said.append(("user", content))
        if answer is not None:
            said.append(("assistant", others(answer)))
        return [{"role": role, "content": text} for role, text in said]

    yield turns(usual, _parts)
    yield turns(usual, str)
    yield turns(doubled, _parts)
    yield turns(doubled, str)
    if not sample.images:
        yield turns(sample.prompt, str)
    if sample.places and image_token:
        parts = _parts(written(sample, image_token))
        yield turns(parts, _parts)
        yield turns(parts, str)


def written(sample: Sample, image_token: str) -> str:
    """A sample's prompt with ``image_token`` in the places of its images."""
    return image_token.join(_pieces(sample))


def shows(prompt: str, sample: Sample, tokens: Collection[str]) -> bool:
    """Whether a rendered prompt holds a sample's texts as they are, and images in the places that the sample gives.

    White space around a turn's text does not count. ``tokens`` are those of ``media_tokens``.
    """
    pieces = [re.escape(piece.strip()) for piece in _pieces(sample)]
    image = ".*?(?:" + "|".join(map(re.escape, tokens)) + ").*?"
    found = re.search(image.join(pieces), prompt, re.DOTALL)
    if found is None or (sample.system and sample.system.strip() not in prompt):
        return False
    return not printed_list(prompt, sample.prompt + (sample.system or ""))


def printed_list(text: str, said: str) -> bool:
    """Whether a template printed a list of parts; ``said`` is the text that it was given."""
    return len(_PRINTED.findall(text)) > len(_PRINTED.findall(said))


def _parts(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]


def _pieces(sample: Sample) -> list[str]:
    """The prompt cut at the places of its images; whole where they come before it."""
    ends = [0, *sample.places, len(sample.prompt)]
    return [sample.prompt[a:b] for a, b in pairwise(ends)]


def _content(sample: Sample) -> list[dict[str, Any]]:
    images = [{"type": "image", "image": image} for image in sample.images]
    if not sample.places:
        return [*images, *_parts(sample.prompt)]
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(_pieces(sample)):
        content += [images[number - 1]] if number else []
        content += _parts(piece) if piece else []
    return content
