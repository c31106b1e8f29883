"""Samples to model inputs: against sequences written by hand, and answers against a loop without a cache."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from tests.conftest import TEMPLATE, build_processor
from vtwcli.data.sample import Sample
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError
from vtwcli.measure.samples import read_samples
from vtwcli.models import inputs
from vtwcli.models.families import FAMILIES
from vtwcli.models.generation import generate_answers
from vtwcli.models.inputs import (
    UnusableSampleError,
    answer_ids,
    encode,
    encode_batch,
    end_ids,
    prompt_text,
    visual_mask,
)
from vtwcli.models.loading import LoadedModel, load
from vtwcli.recipe.recipe import ModelSection
from vtwcli.results.provenance import model_of

IMAGE = tiny.IMAGE_ID
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)


def picture(seed: int, size: tuple[int, int] = (12, 12)) -> Image.Image:
    """An image of random pixels; at 12x12 the processor neither resizes nor crops it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def sample(prompt: str, images: int = 1, id: str = "a", seed: int = 0) -> Sample:
    return Sample(id, "task", tuple(picture(seed + i) for i in range(images)), prompt)


@pytest.fixture(scope="module")
def loaded(tiny_dir) -> LoadedModel:
    return load(str(tiny_dir))


def with_template(loaded: LoadedModel, template: str | None, **changes) -> LoadedModel:
    return dataclasses.replace(loaded, processor=build_processor(template), **changes)


def ids_of(loaded: LoadedModel, text: str) -> list[int]:
    """Token ids character by character, but for the one word that the tokenizer knows; a backslash-n is one token."""
    vocabulary = loaded.processor.tokenizer.get_vocab()
    pieces = text.replace(" red", "\0").replace(" ", "Ġ").replace("\n", "Ċ")
    return [vocabulary["Ġred" if piece == "\0" else piece] for piece in pieces]


def pixels_of(images) -> torch.Tensor:
    """CLIP's normalisation in double precision: (x / 255 - mean) / std, channels first."""
    stacked = np.stack([np.asarray(image, dtype=np.float64) for image in images]) / 255
    return torch.from_numpy(((stacked - MEAN) / STD).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_sample_becomes_the_prompt_written_by_hand(loaded, images):
    encoded = encode(loaded, sample("Is it red?", images))
    head, tail = ids_of(loaded, "USER: "), ids_of(loaded, "Is it red? ASSISTANT:")
    middle = ([IMAGE] * 9 + ids_of(loaded, "\n")) * images
    expected = [1, *head, *middle, *tail]
    assert encoded.inputs["input_ids"].tolist() == [expected]
    assert encoded.inputs["attention_mask"].tolist() == [[1] * len(expected)]
    assert encoded.prompt_length == encoded.length == len(expected)
    assert encoded.visual.dtype == torch.bool
    assert encoded.visual.tolist() == [token == IMAGE for token in expected]
    if images:
        assert encoded.inputs["pixel_values"].shape == (images, 3, 12, 12)
        expected_pixels = pixels_of(sample("", images).images)
        assert torch.allclose(encoded.inputs["pixel_values"].double(), expected_pixels, atol=1e-5)
    else:
        assert "pixel_values" not in encoded.inputs


def test_a_system_turn_comes_first(loaded):
    encoded = encode(loaded, dataclasses.replace(sample("red?", 0), system="Be brief."))
    assert encoded.inputs["input_ids"].tolist() == [[1, *ids_of(loaded, "Be brief. USER: red? ASSISTANT:")]]


def test_an_answer_goes_behind_the_prompt_and_is_never_visual(loaded):
    bare = encode(loaded, sample("red?"))
    answer = torch.tensor([5, IMAGE, 2])
    forced = encode(loaded, sample("red?"), answer)
    length = bare.prompt_length
    assert forced.prompt_length == length
    assert forced.length == length + 3
    assert forced.inputs["input_ids"][0].tolist() == [*bare.inputs["input_ids"][0].tolist(), 5, IMAGE, 2]
    assert forced.inputs["attention_mask"].tolist() == [[1] * (length + 3)]
    assert forced.visual.tolist() == [*bare.visual.tolist(), False, False, False]
    assert torch.equal(forced.inputs["pixel_values"], bare.inputs["pixel_values"])


@pytest.mark.parametrize(("model_type", "fill"), [("gemma3", 0), ("paligemma", 1)])
def test_token_types_continue_as_generation_continues_them(loaded, model_type, fill):
    from vtwcli.models.inputs import append

    family = dataclasses.replace(loaded, family=FAMILIES[model_type])
    inputs = {
        "input_ids": torch.tensor([[4, 5]]),
        "token_type_ids": torch.tensor([[1, 0]]),
        "mm_token_type_ids": torch.tensor([[1, 0]], dtype=torch.int32),
    }
    longer = append(family, inputs, torch.tensor([6, 7]))
    assert longer["input_ids"].tolist() == [[4, 5, 6, 7]]
    assert longer["token_type_ids"].tolist() == [[1, 0, fill, fill]]
    assert longer["mm_token_type_ids"].tolist() == [[1, 0, 0, 0]]
    assert longer["mm_token_type_ids"].dtype == torch.int32
    assert inputs["input_ids"].tolist() == [[4, 5]]
    # as transformers' generate does it, for the family's own model
    model = tiny.TINY[model_type].build(layers=1)
    kwargs = {"token_type_ids": inputs["token_type_ids"]}
    step = model._update_model_kwargs_for_generation({}, kwargs, num_new_tokens=1)
    assert step["token_type_ids"].tolist() == [[1, 0, fill]]


def test_pixels_take_the_model_s_dtype(tiny_dir):
    half = load(str(tiny_dir), dtype="bfloat16")
    encoded = encode(half, sample("red?"))
    assert encoded.inputs["pixel_values"].dtype == torch.bfloat16
    assert encoded.inputs["input_ids"].dtype == torch.long
    assert half.model(**encoded.inputs).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows_padded(loaded, side):
    rows = [
        sample("red?", 1),
        sample("no image", 0, seed=3),
        sample("two?", 2, seed=5),
        sample("x", 1, seed=9),
    ]
    batch = encode_batch(loaded, rows, side)
    singles = [encode(loaded, row) for row in rows]
    width = max(one.length for one in singles)
    for row, one in enumerate(singles):
        pad = [0] * (width - one.length)
        ids, ones = one.inputs["input_ids"][0].tolist(), [1] * one.length
        expected = (pad + ids, pad + ones) if side == "left" else (ids + pad, ones + pad)
        assert (batch["input_ids"][row].tolist(), batch["attention_mask"][row].tolist()) == expected
    pixels = [one.inputs["pixel_values"] for one in singles if "pixel_values" in one.inputs]
    assert torch.equal(batch["pixel_values"], torch.cat(pixels))


def test_the_visual_mask_knows_several_ids():
    ids = torch.tensor([[1, 98, 97, 2], [98, 98, 3, 4]])
    assert visual_mask(ids, (98, 97)).tolist() == [[False, True, True, False], [True, True, False, False]]
    assert visual_mask(ids, (98,))[0].tolist() == [False, True, False, False]
    assert not visual_mask(ids, ()).any()


# --- templates ---------------------------------------------------------------------------------------------------


def test_a_template_with_a_bos_gets_no_second_one(loaded):
    expected = encode(loaded, sample("red?")).inputs["input_ids"]
    own_bos = with_template(loaded, "{{ bos_token }}" + TEMPLATE)
    assert torch.equal(encode(own_bos, sample("red?")).inputs["input_ids"], expected)


def test_without_a_template_llava_has_its_own_prompt(loaded):
    bare = with_template(loaded, None)
    expected = [1, *ids_of(loaded, "USER: "), *[IMAGE] * 9, *ids_of(loaded, "\nred? ASSISTANT:")]
    assert encode(bare, sample("red?")).inputs["input_ids"].tolist() == [expected]
    assert answer_ids(bare, "red").tolist() == [*ids_of(loaded, " red"), 2]
    other = with_template(loaded, None, family=FAMILIES["llava_next"])
    with pytest.raises(NotFoundError) as caught:
        encode(other, sample("red?"))
    assert caught.value.message == f"the processor of {loaded.name!r} has no chat template"
    assert caught.value.hint == "copy chat_template.jinja of the base model beside the weights"


def test_a_failing_template_is_named(loaded):
    broken = with_template(loaded, "{{ raise_exception('only text here') }}")
    with pytest.raises(NotFoundError, match=r"^the chat template of .* fails: only text here"):
        encode(broken, sample("red?"))


IMAGE_PART = "{% if part['type'] == 'image' %}<image>{% endif %}"
USER = "{% if m['role'] == 'user' %}USER: {% for part in m['content'] %}"
# Templates of repositories on the Hub: an assistant's turn as plain text, and a text under another name.
PLAIN_ANSWER = (
    "{% for m in messages %}"
    + USER
    + IMAGE_PART
    + "{% if part['type'] == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% elif m.role == 'assistant' %}ASSISTANT:\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:\n{% endif %}"
)
TEXT_AS_CONTENT = (
    "{% for m in messages %}"
    + USER
    + IMAGE_PART
    + "{% if part['type'] == 'text' %}{{ part['content'] }}{% endif %}"
    "{% endfor %}ASSISTANT:{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}ai:{% endif %}"
IN_ORDER = (
    "{% for m in messages %}"
    + USER
    + IMAGE_PART
    + "{% if part['type'] == 'text' %}{{ part.text | trim }}{% endif %}"
    "{% endfor %} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "images", "prompt"),
    [
        (PLAIN_ANSWER, 1, "USER: <image>Is it red?ASSISTANT:\n"),
        (TEXT_AS_CONTENT, 1, "USER: <image>Is it red?ASSISTANT:"),
        (PLAIN, 0, "user: Is it red? ai:"),
    ],
)
def test_templates_of_other_ages_are_given_what_they_read(loaded, template, images, prompt):
    old = with_template(loaded, template)
    assert prompt_text(old, sample("Is it red?", images)) == prompt
    assert int(encode(old, sample("Is it red?", images)).visual.sum()) == 9 * images
    lead = " " if template is PLAIN else ""
    assert answer_ids(old, "red").tolist() == [*ids_of(loaded, lead + "red"), 2]


@pytest.mark.parametrize(
    "template",
    [
        PLAIN,
        "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
        "{% for m in messages %}{% for part in m.content %}{{ part }}{% endfor %}{% endfor %}",
        TEMPLATE.replace("part['text']", "part['words']"),
        TEMPLATE.replace("part['text']", "part['text'][:4]"),
        TEMPLATE.replace("part['text']", "part['text'] | upper"),
    ],
)
def test_a_template_that_changes_the_text_is_named(tiny_dir, tmp_path, template):
    shutil.copytree(tiny_dir, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    broken = load(str(tmp_path / "model"))
    with pytest.raises(UnusableSampleError) as caught:
        encode(broken, sample("Is it red?"))
    file = tmp_path / "model" / "chat_template.jinja"
    assert caught.value.message == f"the chat template {file} does not show the text of sample 'a' as it is"


def test_a_system_turn_that_is_dropped_is_missed(loaded):
    deaf = with_template(loaded, IN_ORDER)
    assert encode(deaf, sample("red?")).length
    with pytest.raises(UnusableSampleError, match=r"does not show the text.*leave out system"):
        encode(deaf, dataclasses.replace(sample("red?"), system="Be brief."))


def test_images_stand_in_their_places(loaded):
    two = dataclasses.replace(sample("Left: and right: red?", 2), places=(6, 17))
    in_order = with_template(loaded, IN_ORDER)
    expected = "USER: Left:<image>and right:<image>red? ASSISTANT:"
    assert prompt_text(in_order, two) == expected
    # LLaVA's own template puts images first; there the places are written into the text.
    assert prompt_text(loaded, two) == "USER: Left: <image>and right: <image>red? ASSISTANT:"
    bare = with_template(loaded, None)
    assert "Left: <image>and right: <image>red?" in prompt_text(bare, two)
    visual = encode(loaded, two).visual.int()
    assert int(visual.sum()) == 18 and int(visual.diff().clamp(min=0).sum()) == 2
    end = dataclasses.replace(sample("red?", 1), places=(4,))
    assert prompt_text(loaded, end) == "USER: red?<image> ASSISTANT:"
    first = TEMPLATE.replace("<image>\n", "<image>").replace(
        "{{ part['text'] }}", "{{ part['text'] | replace('<image>', '') }}"
    )
    with pytest.raises(UnusableSampleError, match="as it is, or images in their places in it"):
        encode(with_template(loaded, first), two)


def test_a_template_that_asks_for_the_date_gets_the_same_every_day(loaded):
    dated = "{% set day = strftime_now('%d %b %Y, %A %-d') %}{{ '\n' }}{{ day }} " + TEMPLATE
    asks = with_template(loaded, dated)
    assert prompt_text(asks, sample("red?")).startswith("\n01 Jan 2025, Wednesday 1 USER: <image>")
    assert model_of(asks)["template_date"] == "2025-01-01"
    assert "template_date" not in model_of(loaded)


def test_text_that_stands_for_images_is_refused_and_control_tokens_are_told(loaded, capfd):
    chat = with_template(loaded, TEMPLATE)
    chat.processor.start_image_token = "<unused97>"
    with pytest.raises(UnusableSampleError, match="contains the image placeholder '<unused97>'"):
        encode(chat, sample("red <unused97>?"))
    inputs.warn_of_control.cache_clear()
    for _ in range(2):
        encode(chat, sample("red </s> ?"))
    assert (
        capfd.readouterr().err.count(
            "some prompts contain '</s>', which the tokenizer reads as a control token"
        )
        == 1
    )


def test_a_forced_answer_spells_the_reference(loaded):
    with pytest.raises(UnusableSampleError) as caught:
        answer_ids(loaded, "~red~")  # the tokenizer has no such letter
    assert caught.value.message.startswith("the answer '~red~' behind the chat template ")
    assert caught.value.message.endswith(" becomes ' red'") or "<unk>" in caught.value.message
    chatty = with_template(loaded, TEMPLATE.replace("ASSISTANT: {{", "ASSISTANT: Surely {{"))
    with pytest.raises(UnusableSampleError, match="becomes ' Surely red'"):
        answer_ids(chatty, "red")


def test_reference_answers_continue_the_prompt(loaded):
    assert answer_ids(loaded, "red").tolist() == [*ids_of(loaded, " red"), 2]
    assert answer_ids(loaded, " red\n").tolist() == [*ids_of(loaded, " red"), 2]
    assert answer_ids(loaded, "a red one").tolist() == [*ids_of(loaded, " a red one"), 2]
    assert answer_ids(loaded, "ANSWER").tolist() == [*ids_of(loaded, " ANSWER"), 2]
    assert answer_ids(loaded, "red").dtype == torch.long
    prompt = encode(loaded, sample("?", 0)).inputs["input_ids"][0].tolist()
    whole = loaded.processor.tokenizer("USER: ? ASSISTANT: red</s>")["input_ids"]
    assert prompt + answer_ids(loaded, "red").tolist() == whole


def test_the_turn_ends_as_the_template_ends_it(loaded):
    """A chat model has several end tokens; the template closes a turn with one, the tokenizer calls another eos."""
    closing = TEMPLATE.replace("</s>", "<unk>\n")
    chat = with_template(loaded, closing, model=tiny.llava(layers=1))
    chat.model.generation_config.eos_token_id = [2, 3]
    assert end_ids(chat) == (2, 3)
    assert answer_ids(chat, "red").tolist() == [*ids_of(loaded, " red"), 3]
    chat.model.generation_config.eos_token_id = 2
    assert end_ids(chat) == (2,)
    assert answer_ids(chat, "red").tolist() == [*ids_of(loaded, " red"), 2]


def test_an_answer_that_would_merge_with_the_prompt_does_not(loaded):
    """The prompt ends in a space: generation goes on behind it, without the token of space and word."""
    spaced = with_template(loaded, TEMPLATE.replace("ASSISTANT:{% endif %}", "ASSISTANT: {% endif %}"))
    prompt = encode(spaced, sample("?", 0)).inputs["input_ids"][0].tolist()
    assert prompt[-1:] == ids_of(loaded, " ")
    assert answer_ids(spaced, "red").tolist() == [*ids_of(loaded, "red"), 2]


# --- generation --------------------------------------------------------------------------------------------------


def greedy(loaded: LoadedModel, one: Sample, steps: int, ends: tuple[int, ...]) -> list[int]:
    """Argmax token by token, the whole sequence anew each time."""
    inputs = encode(loaded, one).inputs
    ids, answer = inputs["input_ids"], []
    for _ in range(steps):
        logits = loaded.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs.get("pixel_values"),
            use_cache=False,
        ).logits
        answer.append(int(logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[answer[-1]]])], 1)
        if answer[-1] in ends:
            break
    return answer


SAMPLES = [
    sample("red?", 1, "a"),
    sample("no image", 0, "b"),
    sample("two?", 2, "c", 5),
    sample("x", 1, "d", 9),
]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generated_answers_are_the_argmax_of_full_recomputes(loaded, batch_size):
    free = dataclasses.replace(loaded, model=tiny.llava())
    expected = [greedy(free, one, 6, ()) for one in SAMPLES]
    end = expected[0][3]  # some token of the first answer becomes an end token
    assert len({tuple(answer) for answer in expected}) == len(SAMPLES)
    free.model.generation_config.eos_token_id = [end, 2]
    stopped = [greedy(free, one, 6, (end, 2)) for one in SAMPLES]
    assert stopped[0][-1] == end
    answers = generate_answers(free, SAMPLES, 6, batch_size)
    assert [ids.tolist() for _, ids in answers] == stopped
    for (text, ids), _ in zip(answers, SAMPLES, strict=True):
        assert text == loaded.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_generation_config_cannot_bend_the_answers_and_comes_back(loaded):
    plain = dataclasses.replace(loaded, model=tiny.llava())
    expected = generate_answers(plain, SAMPLES[:1], 6)[0][1].tolist()
    config = plain.model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.do_sample, config.temperature = (
        5.0,
        1,
        True,
        9.0,
    )
    config.suppress_tokens, config.min_new_tokens = [expected[0]], 5
    bent = plain.model.generate(**encode(plain, SAMPLES[0]).inputs, max_new_tokens=6)[0, -6:].tolist()
    assert bent != expected
    assert generate_answers(plain, SAMPLES[:1], 6)[0][1].tolist() == expected
    assert plain.model.generation_config is config


# --- failures ----------------------------------------------------------------------------------------------------


def test_prompts_that_do_not_fit(loaded):
    long = sample("x" * 600, 0, "long:1")
    for encoding in (encode, lambda loaded, one: encode_batch(loaded, [one])):
        with pytest.raises(NotFoundError) as caught:
            encoding(loaded, long)
        assert (
            caught.value.message == "sample 'long:1' is 618 tokens long, more than the model's 512 positions"
        )
    room = 512 - encode(loaded, sample("x", 0)).length
    assert encode(loaded, sample("x", 0), torch.full((room,), 5)).length == 512
    with pytest.raises(NotFoundError, match="is 513 tokens long"):
        encode(loaded, sample("x", 0), torch.full((room + 1,), 5))


def test_of_a_batch_the_bad_sample_is_named(loaded):
    batch = [sample("red?"), sample("x" * 600, 0, "long:1"), sample("x", id="c")]
    with pytest.raises(UnusableSampleError, match=r"^sample 'long:1' is 618 tokens long"):
        encode_batch(loaded, batch)


def test_a_thin_picture_is_refused_before_it_grows(loaded):
    thin = Sample("thin:1", "t", (Image.new("RGB", (200_000, 1)),), "red?")
    with pytest.raises(
        UnusableSampleError, match="sample 'thin:1': a picture of 200000 x 1 pixels is too thin"
    ):
        encode(loaded, thin)


@dataclasses.dataclass
class Options:
    limit: int = 10
    seed: int = 0
    skip_bad: bool = False
    positions: str = "first"
    answers: str = "auto"
    longest: int = 4


def test_skipping_reaches_what_the_model_cannot_be_asked(tiny_dir, tmp_path):
    picture(0).save(tmp_path / "a.png")
    questions = ["red?", "x" * 600, "what is <unused97>", "two?", "x" * (512 - 18)]
    rows = [{"image": "a.png", "question": q, "answer": "red"} for q in questions]
    rows[3]["answer"] = "~"
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, data = ModelSection(name=str(tiny_dir)), [DataSpec(source=str(tmp_path / "qa.jsonl"))]

    def left(**options) -> tuple[list[str], int]:
        mix = read_samples(model, data, Options(skip_bad=True, **options))
        return [s.id.rpartition(":")[2] for s in mix.samples], mix.skipped

    assert len(read_samples(model, data, Options()).samples) == 5
    assert left() == (["0", "2", "3"], 2)  # the picture takes nine tokens more
    assert left(positions="answer", answers="reference") == (["0", "2"], 3)
    rows[4]["question"] = "x" * (512 - 28)  # fits alone, but not with an answer of four tokens
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert left() == (["0", "2", "3", "4"], 1)
    assert left(positions="answer") == (["0", "2", "3"], 2)


def test_placeholders_and_images_must_agree(loaded):
    with pytest.raises(
        NotFoundError, match=r"^the prompt of sample 'a' contains the image placeholder '<image>'"
    ):
        encode(loaded, sample("what is <image>?"))
    silent = with_template(loaded, TEMPLATE.replace("<image>", ""))
    with pytest.raises(
        NotFoundError, match=r"^the processor cannot encode sample 'a': The total number of <image>"
    ):
        encode(silent, sample("red?"))
    wrong = dataclasses.replace(loaded, processor=build_processor(image_token_id=97))
    with pytest.raises(NotFoundError) as caught:
        encode(wrong, sample("red?"))
    assert caught.value.message == "sample 'a' has 1 images, but its encoded prompt has 0 visual tokens"
    fewer = dataclasses.replace(loaded, processor=build_processor())
    fewer.processor.patch_size = 6  # four placeholders for nine visual tokens
    with pytest.raises(NotFoundError, match=r"^the model refuses the inputs of sample 'a': Image features"):
        generate_answers(fewer, [sample("red?"), sample("x", id="b")], 2, batch_size=2)


def test_no_files_are_written(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate_answers(loaded, SAMPLES[:1], 2)
    assert list(Path.cwd().iterdir()) == []
