"""Built-in tasks on small local copies: prompts, references, images and metrics word for word."""

import pytest

from tests import hub_layouts
from tests.hub_layouts import picture
from vtwcli.data.metrics import METRICS, scores
from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.data.tasks import DEFAULT_MIX, TASKS
from vtwcli.errors import NotFoundError, UsageError
from vtwcli.recipe.defaults import default_data

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."

# task -> (prompt, references, choices, images, meta) per row
EXPECTED = {
    "scienceqa": [
        (
            "Which of these states is farthest north?\nA. West Virginia\nB. Louisiana\nC. Arizona\nD. Oklahoma\n"
            + LETTER,
            ("A",),
            ("West Virginia", "Louisiana", "Arizona", "Oklahoma"),
            [1],
            {},
        ),
        (
            "Context: Hardness is how hard it is to scratch.\nWhich is harder?\nA. chalk\nB. quartz\n"
            + LETTER,
            ("B",),
            ("chalk", "quartz"),
            [2],
            {},
        ),
    ],
    "ai2d": [
        # "0" is a place here, although it is one of the options' texts as well.
        (
            "What eats the frog?\nA. snake\nB. 0\nC. grass\n" + LETTER,
            ("A",),
            ("snake", "0", "grass"),
            [3],
            {},
        ),
        ("Which is D?\nA. x\nB. y\nC. z\nD. w\n" + LETTER, ("D",), ("x", "y", "z", "w"), [4], {}),
    ],
    "mmmu": [
        (
            "Comparewith.\nA. TheB. Rubens's\nC. neither\n\n" + LETTER,
            ("B",),
            ("The <image 3>", "Rubens's", "neither"),
            [12, 11, 13],
            {"id": "validation_Art_1", "question_type": "multiple-choice"},
        ),
        (
            "How long is the side in?\n\n" + SHORT,
            ("1/4", "0.25"),
            (),
            [15],
            {"id": "validation_Math_2", "question_type": "open"},
        ),
    ],
    "gqa": [
        ("Is it overcast?\n" + SHORT, ("no",), (), [23], {}),
        ("Who wears a hat?\n" + SHORT, ("woman",), (), [21], {}),
        ("What colour is the sky?\n" + SHORT, ("blue",), (), [23], {}),
    ],
    "textvqa": [
        (
            "What is the brand of this nokia phone?\n" + SHORT,
            ("nokia",) * 8 + ("", "phone"),
            (),
            [31],
            {},
        ),
    ],
    "textvqa_ocr": [
        (
            "What is the brand of this nokia phone?\nReference OCR token: NOKIA, 3310\n" + SHORT,
            ("nokia",) * 8 + ("", "phone"),
            (),
            [31],
            {},
        ),
    ],
    "mme": [
        (
            f"Is the output {number}?\n" + SHORT,
            (answer,),
            (),
            [44],
            {"category": "code_reasoning", "question_id": "code_reasoning/0020.png"},
        )
        for number, answer in (("0", "Yes"), ("1", "No"))
    ],
    "pope": [
        ("Is there a snowboard in the image?\n" + SHORT, ("yes",), (), [41], {"category": "adversarial"}),
        ("Is there a car in the image?\n" + SHORT, ("no",), (), [42], {"category": "popular"}),
        ("Is there a dog in the image?\n" + SHORT, ("no",), (), [43], {"category": "random"}),
    ],
    "flickr30k": [
        (
            "Provide a one-sentence caption for the provided image.",
            tuple(f"Caption {n} of a dog." for n in range(5)),
            (),
            [51],
            {},
        ),
    ],
    "ocrbench": [
        (
            "what is written in the image?",
            ("CENTRE",),
            (),
            [61],
            {"dataset": "IIIT5K", "question_type": "Regular Text Recognition"},
        ),
        (
            "Please write out the expression of the formula in the image using LaTeX format.",
            ("\\frac { 1 } { 2 }",),
            (),
            [62],
            {"dataset": "HME100k", "question_type": "Handwritten Mathematical Expression Recognition"},
        ),
    ],
}
METRIC = {
    "scienceqa": "multiple_choice",
    "ai2d": "ai2d",
    "mmmu": "mmmu",
    "gqa": "exact_match",
    "textvqa": "vqa_soft",
    "textvqa_ocr": "vqa_soft",
    "mme": "mme",
    "pope": "pope",
    "flickr30k": "cider",
    "ocrbench": "ocrbench",
}
SPLIT = {"mmmu": "validation", "gqa": "testdev", "textvqa": "validation", "textvqa_ocr": "validation"}
LONGEST = {"scienceqa": 16, "ai2d": 16, "gqa": 16, "mme": 16, "flickr30k": 64}
LONGEST |= dict.fromkeys(("mmmu", "pope", "ocrbench"), 128)
PLACES = {"mmmu": [(7, 11, 19), (23,)]}  # of its images in the prompts


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    return {task: hub_layouts.write(task, tmp_path_factory.mktemp(task)) for task in TASKS}


def load(text, **options):
    return load_data([DataSpec.parse(text)], limit=options.pop("limit", None), seed=0, **options)


def failure(error, text, **options):
    with pytest.raises(error) as caught:
        load(text, **options)
    return str(caught.value)


def test_every_task_has_a_test():
    assert set(EXPECTED) == set(METRIC) == set(TASKS)
    assert set(METRIC.values()) <= set(METRICS)


@pytest.mark.parametrize("task", list(TASKS))
def test_rows_become_samples(task, copies):
    mix = load(f"{task}:path={copies[task]}")
    split = SPLIT.get(task, "test")
    assert [sample.id for sample in mix.samples] == [
        f"{task}:{split}:{n}" for n in range(len(EXPECTED[task]))
    ]
    for sample, (prompt, references, choices, images, meta) in zip(mix.samples, EXPECTED[task], strict=True):
        assert (sample.prompt, sample.references, sample.choices) == (prompt, references, choices)
        assert (sample.task, sample.metric, sample.meta) == (task, METRIC[task], meta)
        assert (sample.longest, sample.system) == (LONGEST.get(task), None)
        assert [image.tobytes() for image in sample.images] == [picture(n).tobytes() for n in images]
        assert all(image.mode == "RGB" for image in sample.images)
    assert [sample.places for sample in mix.samples] == PLACES.get(task, [()] * len(mix.samples))
    (record,) = mix.sources
    assert record.get("max_new_tokens") == LONGEST.get(task)
    assert record["source"] == task and record["split"] == split
    assert record["path"].startswith(str(copies[task]))


@pytest.mark.parametrize("task", [task for task in TASKS if METRIC[task] != "cider"])
def test_the_reference_itself_is_right(task, copies):
    for sample in load(f"{task}:path={copies[task]}").samples:
        assert scores(sample.metric, [sample.references[0]], [sample]) == [1.0]
        wrong = "Yes" if sample.references[0].lower() == "no" else "no"
        assert scores(sample.metric, [wrong], [sample]) == [0.0]


@pytest.mark.parametrize("task", ["scienceqa", "gqa"])
def test_a_copy_without_its_card_is_read_by_folder(tmp_path, task):
    mix = load(f"{task}:path={hub_layouts.write(task, tmp_path, card=False)}")
    assert [sample.prompt for sample in mix.samples] == [row[0] for row in EXPECTED[task]]
    assert [s.images[0].tobytes() for s in mix.samples] == [
        picture(row[3][0]).tobytes() for row in EXPECTED[task]
    ]


def test_an_unknown_configuration(copies):
    assert failure(NotFoundError, f"gqa:path={copies['gqa']},config=other") == (
        f"{copies['gqa']}: cannot be read as a data set: BuilderConfig 'other' not found. "
        "Available: ['testdev_balanced_instructions', 'testdev_balanced_images']"
    )


def test_one_file_is_a_copy_too(copies):
    file = copies["ai2d"] / "data" / "test-00000-of-00001.parquet"
    mix = load(f"ai2d:path={file}")
    assert [sample.prompt for sample in mix.samples] == [row[0] for row in EXPECTED["ai2d"]]
    assert [sample.id for sample in mix.samples] == ["ai2d:0", "ai2d:1"]


def test_other_splits(copies):
    assert load(f"mmmu:path={copies['mmmu']},split=dev").sources[0]["split"] == "dev"
    message = failure(NotFoundError, f"mmmu:path={copies['mmmu']},split=test")
    assert message == f"{copies['mmmu']}: no split 'test'; splits: dev, validation"


def test_a_default_split_that_is_not_there(tmp_path):
    folder = hub_layouts.write("mmmu", tmp_path, card=False)
    (folder / "data" / "validation-00000-of-00001.parquet").rename(
        folder / "data" / "test-00000-of-00001.parquet"
    )
    (folder / "data" / "dev-00000-of-00001.parquet").rename(folder / "data" / "train-00000-of-00001.parquet")
    message = failure(NotFoundError, f"mmmu:path={folder}")
    assert message.startswith(f"{folder}: no split 'validation'; splits: ")
    (folder / "data" / "train-00000-of-00001.parquet").unlink()
    assert load(f"mmmu:path={folder}").sources[0]["split"] == "test"  # there is no other one


def test_a_column_may_name_the_tasks(copies):
    mix = load(f"pope:path={copies['pope']},columns.task=category")
    assert [sample.task for sample in mix.samples] == ["adversarial", "popular", "random"]
    assert {sample.task for sample in load(f"scienceqa:path={copies['scienceqa']}").samples} == {"scienceqa"}


def test_prompt_metric_and_columns_can_be_replaced(tmp_path, copies):
    spec = rf"scienceqa:path={copies['scienceqa']},prompt={{question}}\n{{choices}}\n{{subject}}:,metric=mmmu,task=sq"
    sample = load(spec).samples[1]
    assert sample.prompt == "Which is harder?\nA. chalk\nB. quartz\nnatural science:"
    assert (sample.metric, sample.task) == ("mmmu", "sq")
    rows = {"ai2d": hub_layouts.ROWS["ai2d"]}
    path = hub_layouts.write("ai2d", tmp_path, rows) / "data" / "test-00000-of-00001.parquet"
    import pyarrow.parquet as parquet

    table = parquet.read_table(path)
    renamed = [{"question": "q", "image": "photo"}.get(name, name) for name in table.column_names]
    parquet.write_table(table.rename_columns(renamed).replace_schema_metadata(None), path)
    message = failure(NotFoundError, f"ai2d:path={path}")
    assert message == (
        f"{path}, row 0: no column 'question'; columns: q, options, answer, photo "
        "(name another one with columns.question=COLUMN)"
    )
    samples = load(f"ai2d:path={path},columns.question=q,columns.image=photo").samples
    assert [sample.prompt for sample in samples] == [row[0] for row in EXPECTED["ai2d"]]
    assert samples[0].images[0].tobytes() == picture(3).tobytes()


def test_a_gqa_question_without_its_image(tmp_path):
    rows = {**hub_layouts.ROWS, "gqa_images": hub_layouts.ROWS["gqa_images"][:2]}
    path = hub_layouts.write("gqa", tmp_path, rows)
    assert failure(NotFoundError, f"gqa:path={path}") == (
        f"{path} (testdev_balanced_instructions), row 0: column 'imageId': {path} (testdev_balanced_images) "
        "has no image 'n7' (--skip-bad leaves such rows out)"
    )
    mix = load(f"gqa:path={path}", skip_bad=True)
    assert [sample.prompt for sample in mix.samples] == [EXPECTED["gqa"][1][0]] and mix.skipped == 2


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("scienceqa", {"answer": 7}, "column 'answer' holds 7, but there are 2 choices"),
        ("scienceqa", {"choices": []}, "column 'choices' is not a list of choices"),
        ("scienceqa", {"image": None}, "column 'image' is empty"),
        ("scienceqa", {"answer": None}, "column 'answer' holds None, not the place of a choice"),
        ("ai2d", {"answer": "B"}, "column 'answer' holds 'B', not the place of a choice"),
        (
            "mmmu",
            {"options": "[oops", "question_type": "multiple-choice"},
            "column 'options' is not a list of choices",
        ),
        ("mmmu", {"image_1": None}, "column 'image_1' is empty"),
        ("textvqa", {"answers": ["", ""]}, "column 'answers' is empty"),
        ("flickr30k", {"caption": []}, "column 'caption' is empty"),
    ],
)
def test_bad_rows(tmp_path, task, change, message):
    good = hub_layouts.ROWS[task]
    path = hub_layouts.write(task, tmp_path, {task: [good[0], {**good[-1], **change}]})
    caught = failure(NotFoundError, f"{task}:path={path}")
    assert caught.endswith(f"row 1: {message} (--skip-bad leaves such rows out)")
    assert len(load(f"{task}:path={path}", skip_bad=True).samples) == 1


def test_a_missing_local_copy(tmp_path):
    assert failure(NotFoundError, f"gqa:path={tmp_path}/no") == f"{tmp_path}/no: no such file or directory"
    assert failure(UsageError, f"gqa:path={tmp_path},revision=main") == (
        "data source 'gqa': a local path has no revision"
    )


def test_the_default_mix():
    assert [spec.source for spec in default_data("llava-hf/llava-1.5-7b-hf")] == list(DEFAULT_MIX)
    kinds = {TASKS[name].metric for name in DEFAULT_MIX}
    assert kinds == {"multiple_choice", "exact_match", "ocrbench", "cider"}


@pytest.mark.parametrize(
    ("task", "model_type", "row", "ending"),
    [
        ("scienceqa", "idefics2", 1, "B. quartz\nAnswer:"),
        ("textvqa", "perception_lm", 0, "phone?\nProvide a short and direct response."),
        ("ocrbench", "perception_lm", 0, "image?\nProvide a short and direct response."),
        ("pope", "perception_lm", 0, "image?\nYour response must be concise."),
        ("mme", "perception_lm", 0, "Is the output 0? Please answer yes or no."),
        ("mmmu", "qwen3_vl", 0, "C. neither\nAnswer with the option letter only."),
        (
            "mmmu",
            "qwen3_vl_moe",
            1,
            "?\nOptions:\n\nPlease select the correct answer from the options above.",
        ),
        ("gqa", "qwen3_vl", 0, SHORT),
        ("scienceqa", "llava", 1, LETTER),
    ],
)
def test_models_that_lmms_eval_asks_otherwise(task, model_type, row, ending, copies):
    sample = load(f"{task}:path={copies[task]}", model_type=model_type).samples[row]
    assert sample.prompt.endswith(ending)
    if task == "mmmu":  # as one text behind all images, in the order of their numbers
        assert sample.prompt.startswith("Question: ") and "<image 1>" in sample.prompt
        assert sample.places == () and len(sample.images) == (3, 1)[row]
        assert sample.images[0].tobytes() == picture((11, 15)[row]).tobytes()


def test_an_image_that_is_named_twice_is_shown_once(tmp_path):
    row = hub_layouts.ROWS["mmmu"][0] | {
        "question": "See <image 1> and again <image 1>.",
        "options": "['a', 'b']",
    }
    path = hub_layouts.write("mmmu", tmp_path, {"mmmu": [row]})
    [sample] = load(f"mmmu:path={path}").samples
    assert sample.prompt.startswith("Seeand again <image 1>.\nA. a") and sample.places == (3,)
    assert len(sample.images) == 1


def test_answer_lengths_and_prompts_by_source(copies):
    text = f"gqa:path={copies['gqa']},system=Be brief.\\nVery.,image=pad,limit=1"
    [sample] = load(text).samples
    assert (sample.longest, sample.system) == (16, "Be brief.\nVery.")
    [image] = sample.images
    assert image.size == (6, 6)  # 6 x 5 pixels, and a row of the mean colour
    assert [image.getpixel((0, y)) == (122, 116, 104) for y in range(6)] == [False] * 5 + [True]
    assert load(text + ",max_new_tokens=3").samples[0].longest == 3
    assert load(text + ",max_new_tokens=3", own_lengths=False).samples[0].longest is None
    asked = rf"textvqa:path={copies['textvqa']},prompt={{question}} {{ocr_tokens}}"
    assert load(asked).samples[0].prompt == "what is the brand of this Nokia phone? NOKIA, 3310"


def test_own_prompts_are_other_samples(copies):
    plain, asked = (load(f"gqa:path={copies['gqa']}{more}") for more in ("", ",system=Be brief."))
    assert not set(plain.fingerprints) & set(asked.fingerprints)


def test_mme_draws_both_questions_of_a_picture(tmp_path):
    rows = [
        {
            "question_id": f"count/{n // 2}.png",
            "image": picture(n // 2),
            "question": f"Are there {n} things? Please answer yes or no.",
            "answer": ("Yes", "No")[n % 2],
            "category": "count",
        }
        for n in range(40)
    ]
    path = hub_layouts.write("mme", tmp_path, {"mme": rows})
    for seed in range(3):
        mix = load_data([DataSpec.parse(f"mme:path={path}")], limit=6, seed=seed)
        pictures = [sample.meta["question_id"] for sample in mix.samples]
        assert len(pictures) == 6 and all(pictures.count(one) == 2 for one in pictures)
