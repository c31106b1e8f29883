"""Local and generated sources: what becomes a sample, which rows are drawn, and every way to fail."""

import base64
import csv
import io
import json
import random
import sys
from collections import Counter
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from vtwcli.data import scenes
from vtwcli.data.cells import BadRow
from vtwcli.data.drawing import Drawing, ranges, sample_content, sample_fingerprint
from vtwcli.data.metrics import scores
from vtwcli.data.sample import Sample
from vtwcli.data.sources import load_data
from vtwcli.data.spec import DataSpec
from vtwcli.errors import NotFoundError, UsageError


def picture(number: int) -> Image.Image:
    """An image that no other number gives."""
    return Image.new("RGB", (4, 3), (number % 256, number // 256, 7))


def encoded(number: int) -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with six pictures, 0.png to 5.png."""
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    return tmp_path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def qa(count=6, **more):
    return [
        {"image": f"{n}.png", "question": f"Question {n}?", "answer": f"answer {n}", **more}
        for n in range(count)
    ]


def load(*texts, limit=None, seed=0, **options):
    return load_data([DataSpec.parse(text) for text in texts], limit=limit, seed=seed, **options)


def failure(error, *texts, **options):
    with pytest.raises(error) as caught:
        load(*texts, **options)
    assert caught.value.exit_code == {NotFoundError: 4, UsageError: 2}[error]
    return str(caught.value)


def check_qa(mix, name):
    """The six rows of ``qa``, every value, in reading order."""
    assert [sample.id for sample in mix.samples] == [f"{name}:{n}" for n in range(6)]
    for n, sample in enumerate(mix.samples):
        assert (sample.prompt, sample.references, sample.metric) == (
            f"Question {n}?",
            (f"answer {n}",),
            "exact_match",
        )
        (image,) = sample.images
        assert image.mode == "RGB" and image.size == (4, 3) and image.tobytes() == picture(n).tobytes()


# --- kinds of files --------------------------------------------------------------------------------------


def test_json_lines(folder):
    write_lines(folder / "qa.jsonl", qa())
    mix = load("qa.jsonl")
    check_qa(mix, "qa.jsonl")
    assert {sample.task for sample in mix.samples} == {"qa"}
    assert mix.sources == (
        {
            "source": "qa.jsonl",
            "tasks": {"qa": 6},
            "choice": "seeded draw from all 6 rows",
            "path": "qa.jsonl",
            "split": None,
            "rows": "0-5",
            "skipped": 0,
            "duplicates": 0,
            "fingerprint": mix.sources[0]["fingerprint"],
        },
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_json(folder, wrapped):
    rows = qa()
    (folder / "qa.json").write_text(json.dumps({"version": 1, "data": rows} if wrapped else rows))
    check_qa(load("qa.json"), "qa.json")


@pytest.mark.parametrize(("name", "delimiter"), [("qa.csv", ","), ("qa.tsv", "\t")])
def test_tables_keep_text_as_it_is(folder, name, delimiter):
    rows = qa()
    with (folder / name).open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    check_qa(load(name), name)
    answers = ["None", "NA", "007", "true", "2020-01-01", "1,000"]
    with (folder / name).open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerows([["image", "question", "answer"], *(["0.png", "?", answer] for answer in answers)])
    assert [sample.references for sample in load(name).samples] == [(answer,) for answer in answers]


def test_parquet_with_image_records_bytes_or_paths(folder):
    rows = qa()
    for n, row in enumerate(rows):
        row["image"] = {"bytes": encoded(n), "path": None} if n % 2 else {"bytes": None, "path": f"{n}.png"}
    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "qa.parquet")
    check_qa(load("qa.parquet"), "qa.parquet")
    for n, row in enumerate(rows):
        row["image"] = encoded(n)
    pa.parquet.write_table(pa.Table.from_pylist(rows), folder / "qa.parquet")
    check_qa(load("qa.parquet"), "qa.parquet")


def test_paths_are_relative_to_the_file(folder, monkeypatch, tmp_path_factory):
    (folder / "sub").mkdir()
    write_lines(folder / "sub" / "qa.jsonl", [{**row, "image": f"../{row['image']}"} for row in qa()])
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    path = folder / "sub" / "qa.jsonl"
    check_qa(load(str(path)), "qa.jsonl")


@pytest.mark.parametrize("nested", [False, True])
def test_image_folder_with_metadata(folder, nested):
    place = folder / "album" / "test" if nested else folder / "album"
    place.mkdir(parents=True)
    for n in range(6):
        (place / f"{n}.png").write_bytes(encoded(n))
    write_lines(place / "metadata.jsonl", [{"file_name": row.pop("image"), **row} for row in qa()])
    mix = load("album")
    check_qa(mix, "album:test" if nested else "album")
    assert mix.samples[0].task == "album"
    if nested:
        assert failure(NotFoundError, "album:split=tests") == (
            "album: no split 'tests'; splits: test (did you mean 'test'?)"
        )
    else:
        assert failure(NotFoundError, "album:split=test") == (
            "album/metadata.jsonl: a single file has no split 'test'"
        )


def test_directories_that_datasets_wrote(folder):
    import datasets

    rows = {
        "image": [picture(n) for n in range(6)],
        "question": [f"Question {n}?" for n in range(6)],
        "answer": [f"answer {n}" for n in range(6)],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    (folder / "hub").mkdir()
    data.to_parquet(folder / "hub" / "test-00000-of-00001.parquet")
    data.select([0]).to_parquet(folder / "hub" / "train-00000-of-00001.parquet")
    mix = load("hub")
    check_qa(mix, "hub:test")
    assert mix.sources[0]["path"] == "hub" and mix.sources[0]["split"] == "test"
    assert len(load("hub:split=train").samples) == 1
    data.save_to_disk("saved")
    check_qa(load("saved"), "saved:all")
    datasets.DatasetDict({"train": data.select([0]), "validation": data}).save_to_disk("splits")
    check_qa(load("splits"), "splits:validation")
    assert failure(NotFoundError, "splits:split=test").startswith(
        "splits: no split 'test'; splits: train, validation"
    )


def test_class_folders_give_label_names(folder):
    for label in ("cat", "dog"):
        (folder / "pets" / "train" / label).mkdir(parents=True)
        (folder / "pets" / "train" / label / "a.png").write_bytes(encoded(len(label)))
    mix = load("pets:prompt=Which animal?,columns.answer=label")
    assert [(s.prompt, s.references) for s in mix.samples] == [
        ("Which animal?", ("cat",)),
        ("Which animal?", ("dog",)),
    ]


def test_images_inside_an_archive(folder):
    import zipfile

    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        archive.write("5.png")
    row = {"image": f"zip://5.png::{folder / 'pictures.zip'}", "question": "?", "answer": "x"}
    write_lines(folder / "qa.jsonl", [row])
    assert load("qa.jsonl").samples[0].images[0].tobytes() == picture(5).tobytes()


# --- columns, prompts, choices ---------------------------------------------------------------------------


def test_other_column_names(folder):
    rows = [{"photo": r["image"], "q": r["question"], "gold": r["answer"], "kind": "k"} for r in qa()]
    write_lines(folder / "qa.jsonl", rows)
    mix = load(
        "qa.jsonl:columns.image=photo,columns.question=q,columns.answer=gold,columns.task=kind,metric=anls"
    )
    assert [(s.prompt, s.references, s.task, s.metric) for s in mix.samples] == [
        (f"Question {n}?", (f"answer {n}",), "k", "anls") for n in range(6)
    ]
    assert mix.samples[5].images[0].tobytes() == picture(5).tobytes()


def test_answers_may_be_several_or_absent(folder):
    rows = [
        {"image": "0.png", "question": "a", "answers": ["x", "y", ""]},
        {"image": "0.png", "question": "b", "answers": 7},
    ]
    write_lines(folder / "qa.jsonl", rows)
    assert [s.references for s in load("qa.jsonl").samples] == [("x", "y", ""), ("7",)]
    write_lines(folder / "qa.jsonl", [{"image": "0.png", "question": "a"}])
    assert load("qa.jsonl").samples[0].references == ()


def test_numbers_are_written_as_people_write_them(folder):
    values = [5, 5.0, 2.5, 1e6, -3.0, 0.1, 1e300]
    rows = [{"image": "0.png", "question": f"{i}?", "answer": value} for i, value in enumerate(values)]
    write_lines(folder / "qa.jsonl", rows)
    expected = [("5",), ("5",), ("2.5",), ("1000000",), ("-3",), ("0.1",), ("1e+300",)]
    assert [s.references for s in load("qa.jsonl").samples] == expected
    table = pa.table(
        {
            "image": ["0.png"] * 4,
            "question": pa.array([1.0, 2.0, 3.0, 4.0]),
            "answer": pa.array([0.1, 5.0, 16777216.0, None], pa.float32()),
            "answers": pa.array([[Decimal("5.00")], [Decimal("0.50")], [None, Decimal(7)], [None]]),
        }
    )
    table = table.set_column(3, "answers", pa.array([[5.0, float("nan")], [0.5], [7.0], [float("nan")]]))
    pa.parquet.write_table(table, folder / "qa.parquet")
    assert [s.references for s in load("qa.parquet", skip_bad=True).samples] == [
        ("0.1",),
        ("5",),
        ("16777216",),
    ]
    samples = load("qa.parquet:columns.answer=answers", skip_bad=True).samples
    assert [s.references for s in samples] == [("5",), ("0.5",), ("7",)]
    assert [s.prompt for s in samples] == ["1", "2", "3"]


@pytest.mark.parametrize("name", ["qa.jsonl", "qa.parquet"])
def test_vqa_s_own_list_of_records(folder, name):
    records = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate("aab")
    ]
    row = {"image": "0.png", "question": "?", "answers": records}
    if name == "qa.jsonl":
        write_lines(folder / name, [row])
    else:
        pa.parquet.write_table(pa.Table.from_pylist([row]), folder / name)
    (sample,) = load(f"{name}:metric=vqa_soft").samples
    assert (sample.references, sample.metric) == (("a", "a", "b"), "vqa_soft")
    write_lines(folder / "qa.jsonl", [{**row, "answers": {"answer": ["a", "b"], "answer_id": [0, 1]}}])
    assert load("qa.jsonl").samples[0].references == ("a", "b")
    write_lines(folder / "qa.jsonl", [{**row, "answers": [{"text": "a"}]}])
    assert "column 'answers' holds a dict among its texts" in failure(NotFoundError, "qa.jsonl")


def test_own_data_s_answers_are_judged_where_the_metric_has_a_meaning(folder):
    write_lines(folder / "qa.jsonl", [{"image": "0.png", "question": "?", "answer": 5.0}])
    (sample,) = load("qa.jsonl").samples
    assert scores(sample.metric, ("5", "5.0", "50", "5.", "six"), [sample] * 5) == [
        1,
        1,
        0,
        1,
        0,
    ]
    write_lines(folder / "qa.jsonl", [{"image": "0.png", "question": "?", "answer": "maybe"}])
    assert "row 0: the metric pope judges yes and no, but the answer is 'maybe'" in failure(
        NotFoundError, "qa.jsonl:metric=pope"
    )


@pytest.mark.parametrize(
    ("choices", "answer", "letter"),
    [
        (["3", "5", "7"], 5, "B"),  # numbers as well: a text that is there is meant before a place
        ([3, 5, 7], 5.0, "B"),
        (["red", "blue"], 1.0, "B"),
        (["red", "blue"], "blue", "B"),
        (["red", "blue"], " Blue ", "B"),
        (["red", "blue"], "b", "B"),
        (["red", "blue"], 1, "B"),
        (["red", "blue"], "0", "A"),
        (["2", "1", "0"], "0", "C"),  # a text that is there is meant before a place
        (["B", "A"], "A", "B"),
        ("['red', 'blue']", "blue", "B"),  # as a CSV file writes it
    ],
)
def test_choices(folder, choices, answer, letter):
    write_lines(
        folder / "qa.jsonl", [{"image": "0.png", "question": "Which?", "choices": choices, "answer": answer}]
    )
    (sample,) = load("qa.jsonl").samples
    texts = ["red", "blue"] if isinstance(choices, str) else choices
    lines = "".join(f"{name}. {text}\n" for name, text in zip("ABC", texts, strict=False))
    assert sample.prompt == f"Which?\n{lines}Answer with the option's letter from the given choices directly."
    assert (sample.references, sample.metric) == ((letter,), "multiple_choice")
    assert sample.choices == tuple(map(str, texts))


def test_rows_without_choices_stay_open_questions(folder):
    rows = [
        {"image": "0.png", "question": "Which?", "choices": ["a", "b"], "answer": "a"},
        {"image": "0.png", "question": "What?", "choices": None, "answer": "c"},
    ]
    write_lines(folder / "qa.jsonl", rows)
    assert [(s.metric, s.references) for s in load("qa.jsonl").samples] == [
        ("multiple_choice", ("A",)),
        ("exact_match", ("c",)),
    ]


def test_prompt_templates(folder):
    row = {
        "image": "0.png",
        "question": "Which?",
        "choices": ["a", "b"],
        "answer": "a",
        "hint": "none",
        "n": 3,
    }
    write_lines(folder / "qa.jsonl", [row])
    spec = r"qa.jsonl:prompt={hint}/{n}\n{question}\n{choices}, {not a field} {}"
    assert load(spec).samples[0].prompt == "none/3\nWhich?\nA. a\nB. b, {not a field} {}"
    assert failure(NotFoundError, "qa.jsonl:prompt={quest}") == (
        "qa.jsonl, row 0: no column 'quest'; columns: image, question, choices, answer, hint, n "
        "(did you mean 'question'?)"
    )


def test_image_marks_in_questions_are_dropped(folder):
    write_lines(folder / "qa.jsonl", [{"image": "0.png", "question": "<image>\nWhat?", "answer": "x"}])
    assert load("qa.jsonl").samples[0].prompt == "What?"


def test_marks_of_images_are_honoured_in_their_places(folder):
    two = ["0.png", "1.png"]
    rows = [
        {"image": two, "question": "Left: <image> and right: <image> What differs?"},
        {"image": "0.png", "question": "What is this? <image>"},
        {"image": two, "question": "<image>\n<image>\nWhat differs?"},
        {"image": two, "question": "<image> One. <image> Two."},
        {"image": two, "question": "What is alike?"},
    ]
    write_lines(folder / "qa.jsonl", rows)
    mix = load("qa.jsonl")
    assert [(s.prompt, s.places) for s in mix.samples] == [
        ("Left:  and right:  What differs?", (6, 18)),
        ("What is this? ", (14,)),
        ("What differs?", ()),
        (" One.  Two.", (0, 6)),
        ("What is alike?", ()),
    ]
    first = mix.samples[0]
    moved = Sample(first.id, first.task, first.images, first.prompt, first.references)
    assert sample_fingerprint(first) != sample_fingerprint(moved)
    for question, images, marks in (("<image> <image>?", "0.png", 2), ("Here: <image>?", two, 1)):
        write_lines(folder / "qa.jsonl", [{"image": images, "question": question}])
        assert failure(NotFoundError, "qa.jsonl") == (
            f"qa.jsonl, row 0: the prompt has {marks} marks <image>, but the row has {3 - marks} images: "
            "write one for each image, or none (--skip-bad leaves such rows out)"
        )


def test_pictures_in_base64(folder):
    noise = Image.frombytes("RGB", (256, 256), random.Random(0).randbytes(256 * 256 * 3))
    stream = io.BytesIO()
    noise.save(stream, "PNG")
    text = base64.b64encode(stream.getvalue()).decode()
    assert len(text) > 2**17  # what the csv module takes for a cell
    row = {"image": text, "question": "?", "answer": "x"}
    write_lines(folder / "qa.jsonl", [row])
    for name, delimiter in (("qa.csv", ","), ("qa.tsv", "\t")):
        with (folder / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(row), delimiter=delimiter)
            writer.writeheader()
            writer.writerow(row)
    pa.parquet.write_table(pa.Table.from_pylist([row]), folder / "qa.parquet")
    for name in ("qa.jsonl", "qa.csv", "qa.tsv", "qa.parquet"):
        assert load(name).samples[0].images[0].tobytes() == noise.tobytes()
    write_lines(folder / "bad.jsonl", [{**row, "image": text[: 2**17]}])
    message = failure(NotFoundError, "bad.jsonl")
    assert message.startswith("bad.jsonl, row 0: column 'image': cannot decode 'iVBOR") and len(message) < 400


def test_a_cell_of_a_table_has_a_bound(folder, monkeypatch):
    from vtwcli.data import rows

    monkeypatch.setattr(rows, "CELL", 1000)
    before = csv.field_size_limit(1000)
    try:
        lines = ["image,question,answer", "0.png,first,x", f"0.png,{'q' * 1001},x", "0.png,last,x"]
        (folder / "qa.csv").write_text("\n".join(lines) + "\n")
        assert failure(NotFoundError, "qa.csv") == (
            "qa.csv, row 1: line 3 is not a row of a table: field larger than field limit (1000) "
            "(--skip-bad leaves such rows out)"
        )
        assert [s.prompt for s in load("qa.csv", skip_bad=True).samples] == ["first", "last"]
    finally:
        csv.field_size_limit(before)


def test_several_images_and_their_form(folder):
    turned = Image.new("L", (4, 3), 9)
    exif = turned.getexif()
    exif[274] = 6  # orientation: the camera was turned by a quarter
    turned.save(folder / "turned.jpg", exif=exif)
    Image.new("RGBA", (2, 2), (1, 2, 3, 0)).save(folder / "clear.png")
    row = {"image": ["turned.jpg", "clear.png", "0.png"], "question": "?", "answer": "x"}
    write_lines(folder / "qa.jsonl", [row])
    (sample,) = load("qa.jsonl").samples
    assert [image.mode for image in sample.images] == ["RGB"] * 3
    assert [image.size for image in sample.images] == [(3, 4), (2, 2), (4, 3)]
    assert sample.images[1].getpixel((0, 0)) == (1, 2, 3)


# --- which rows ------------------------------------------------------------------------------------------


def many(folder, count=50, tasks=None):
    rows = [{"image": "0.png", "question": f"q{n}", "answer": str(n)} for n in range(count)]
    if tasks:
        rows = [{**row, "task": tasks[n % len(tasks)]} for n, row in enumerate(rows)]
    write_lines(folder / "many.jsonl", rows)
    return rows


def answers(mix, task=None):
    return [int(s.references[0]) for s in mix.samples if task in (None, s.task)]


def test_the_draw_is_the_rows_with_the_smallest_random_keys(folder):
    many(folder)
    for seed in range(5):
        generator = random.Random(seed)
        keys = [generator.random() for _ in range(50)]
        expected = sorted(sorted(range(50), key=keys.__getitem__)[:7])
        mix = load("many.jsonl", limit=7, seed=seed)
        assert answers(mix) == expected
        assert mix.sources[0]["rows"] == ranges(expected)
        assert mix.sources[0]["choice"] == "seeded draw from all 50 rows"


def test_the_draw_is_uniform():
    counts = Counter()
    for seed in range(4000):
        drawing = Drawing(3, seed)
        for place in range(10):
            drawing.offer(place, "t", lambda place=place: Sample(str(place), "t", (), str(place)))
        counts.update(place for place, _, _ in drawing.chosen())
    # 1,200 expected each, standard deviation sqrt(4000 * 0.3 * 0.7) = 29
    assert all(abs(counts[place] - 1200) < 5 * 29 for place in range(10))


def test_few_rows_are_decoded():
    decoded = []

    def make(place):
        decoded.append(place)
        return Sample(str(place), "t", (), str(place))

    drawing = Drawing(20, 0)
    for place in range(10_000):
        drawing.offer(place, "t", lambda place=place: make(place))
    assert len(drawing.chosen()) == 20
    assert len(decoded) < 250  # about 20 (1 + log 500) = 144


def test_first_rows(folder):
    many(folder)
    mix = load("many.jsonl:order=first", limit=7)
    assert answers(mix) == list(range(7))
    assert mix.sources[0]["choice"] == "first rows"
    # Nothing behind them is read.
    with (folder / "many.jsonl").open("a") as stream:
        stream.write("{broken\n")
    assert answers(load("many.jsonl:order=first", limit=50)) == list(range(50))
    assert "row 50: line 51 is not JSON" in failure(NotFoundError, "many.jsonl:order=first", limit=51)


@pytest.mark.parametrize("order", ["shuffle", "first"])
def test_the_limit_counts_per_task(folder, order):
    many(folder, 50, tasks=["a", "b", "b", "b", "b"])
    mix = load(f"many.jsonl:order={order}", limit=6)
    assert Counter(s.task for s in mix.samples) == {"a": 6, "b": 6}
    assert mix.sources[0]["tasks"] == {"a": 6, "b": 6}
    assert answers(mix) == sorted(answers(mix))
    if order == "first":
        assert answers(mix, "a") == [0, 5, 10, 15, 20, 25]
    only = load(f"many.jsonl:order={order},tasks=b,limit=4", limit=6)
    assert [s.task for s in only.samples] == ["b"] * 4
    assert {s.task for s in load("many.jsonl:task=all,limit=3").samples} == {"all"}
    assert len(load("many.jsonl:task=all,limit=3").samples) == 3


def test_seeds_and_fingerprints(folder):
    many(folder)
    first, again, other = (load("many.jsonl", limit=7, seed=seed) for seed in (0, 0, 1))
    assert first.sources == again.sources and first.fingerprints == again.fingerprints
    assert first.sources[0]["fingerprint"] != other.sources[0]["fingerprint"]
    assert first.fingerprints == tuple(sample_fingerprint(sample) for sample in first.samples)
    (folder / "0.png").write_bytes(encoded(1))  # the same words about another picture
    changed = load("many.jsonl", limit=7, seed=0)
    assert [s.id for s in changed.samples] == [s.id for s in first.samples]
    assert changed.sources[0]["fingerprint"] != first.sources[0]["fingerprint"]


def test_fingerprints_tell_every_part():
    base = Sample("i", "t", (picture(1),), "p", ("r",))
    others = [
        Sample("i", "t", (picture(2),), "p", ("r",)),
        Sample("i", "t", (picture(1), picture(1)), "p", ("r",)),
        Sample("i", "t", (picture(1).resize((3, 4)),), "p", ("r",)),
        Sample("i", "t", (picture(1),), "q", ("r",)),
        Sample("i", "t", (picture(1),), "p", ("r", "")),
        Sample("i", "t", (picture(1),), "pr", ()),
    ]
    prints = {sample_fingerprint(sample) for sample in [base, *others]}
    assert len(prints) == 7
    assert sample_fingerprint(Sample("j", "u", (picture(1),), "p", ("r",))) == sample_fingerprint(base)


@pytest.mark.parametrize("order", ["shuffle", "first"])
@pytest.mark.parametrize("limit", [None, 4])
def test_equal_rows_count_once(folder, order, limit):
    write_lines(folder / "qa.jsonl", [row for row in qa() for _ in range(3)])
    mix = load(f"qa.jsonl:order={order}", limit=limit)
    assert len({sample_content(sample) for sample in mix.samples}) == len(mix.samples) == (limit or 6)
    assert mix.sources[0]["tasks"] == {"qa": limit or 6}
    if limit is None:
        assert mix.sources[0]["duplicates"] == 12
        assert len(mix.sources[0]["rows"].split(",")) == 6


def test_rows_that_differ_in_anything_count_each(folder):
    base = qa()[0]
    others = [
        base | {"question": "Other?"},
        base | {"answer": "other"},
        base | {"image": qa()[1]["image"]},
        base | {"task": "other"},
    ]
    write_lines(folder / "qa.jsonl", [base | {"task": "qa"}, *({"task": "qa"} | row for row in others)])
    mix = load("qa.jsonl", limit=None)
    assert len(mix.samples) == 5 and mix.sources[0]["duplicates"] == 0


def test_equal_rows_of_two_sources_count_once(folder):
    write_lines(folder / "qa.jsonl", qa())
    write_lines(folder / "more.jsonl", [*qa()[3:], qa()[0] | {"question": "New?"}])
    mix = load("qa.jsonl:task=all", "more.jsonl:task=all", limit=None)
    assert [entry["duplicates"] for entry in mix.sources] == [0, 3]
    assert len(mix.samples) == 7
    write_lines(folder / "more.jsonl", qa()[3:])
    assert "all 3 rows equal rows of another source" in failure(
        NotFoundError, "qa.jsonl:task=all", "more.jsonl:task=all", limit=None
    )
    assert len(load("qa.jsonl", "more.jsonl", limit=None).samples) == 9  # other tasks


def test_a_row_that_left_may_come_again():
    """Equal rows are told apart from rows that were drawn once and had to make room."""
    drawing = Drawing(1, 0)
    keys = iter([0.5, 0.3, 0.1])
    drawing._random.random = lambda: next(keys)
    for place, prompt in enumerate("aba"):
        drawing.offer(place, "t", lambda place=place, prompt=prompt: Sample(str(place), "t", (), prompt))
    assert [place for place, _, _ in drawing.chosen()] == [2] and drawing.duplicates == 0


def test_the_record_of_a_source_tells_tasks_apart(folder):
    rows = [row | {"task": "ab"[n % 2]} for n, row in enumerate(qa())]
    write_lines(folder / "qa.jsonl", rows)
    before = load("qa.jsonl", limit=None).sources[0]
    write_lines(folder / "qa.jsonl", [rows[0] | {"task": "b"}, rows[1] | {"task": "a"}, *rows[2:]])
    after = load("qa.jsonl", limit=None).sources[0]
    assert before["tasks"] == after["tasks"] and before["fingerprint"] != after["fingerprint"]


def test_excluded_samples_do_not_come_up(folder):
    many(folder)
    used = load("many.jsonl", limit=20, seed=0)
    rest = load("many.jsonl", limit=None, seed=0, exclude=used.fingerprints)
    assert sorted(answers(used) + answers(rest)) == list(range(50))
    assert answers(load("many.jsonl:order=first", limit=20, exclude=rest.fingerprints)) == answers(used)


def test_a_mix_of_sources(folder):
    many(folder)
    write_lines(folder / "qa.jsonl", qa())
    mix = load("many.jsonl:limit=3", "qa.jsonl", limit=5)
    assert Counter(s.task for s in mix.samples) == {"many": 3, "qa": 5}
    assert [entry["source"] for entry in mix.sources] == ["many.jsonl", "qa.jsonl"]
    assert failure(UsageError, "qa.jsonl", "qa.jsonl") == (
        "data source 'qa.jsonl' is in the mix twice: both give 'qa.jsonl:0'"
    )


def test_ids_are_the_same_wherever_the_data_lie(folder):
    """Two machines, or two users of one, agree on what a sample is called."""
    for place in ("here", "there/deep"):
        (folder / place).mkdir(parents=True)
        for number in range(2):
            (folder / place / f"{number}.png").write_bytes(encoded(number))
        write_lines(folder / place / "qa.jsonl", qa(2))
        write_lines(folder / place / "metadata.jsonl", [{"file_name": "0.png", "question": "Q?"}])
    one, other = folder / "here", folder / "there/deep"
    for name, ids in (("qa.jsonl", ["qa.jsonl:0", "qa.jsonl:1"]), ("", ["here:0"])):
        assert [s.id for s in load(str(one / name)).samples] == ids
        assert [s.id for s in load(f"./here/{name}").samples] == ids
    assert [s.id for s in load(str(other / "qa.jsonl")).samples] == ["qa.jsonl:0", "qa.jsonl:1"]
    assert [s.id for s in load(str(other)).samples] == ["deep:0"]
    assert load(str(one / "qa.jsonl")).fingerprints == load(str(other / "qa.jsonl")).fingerprints


def test_files_of_one_name_are_told_apart_by_their_folders(folder):
    for place in ("a", "b/x", "c/x"):
        (folder / place).mkdir(parents=True)
        write_lines(
            folder / place / "qa.jsonl", [{"image": str(folder / "1.png"), "question": f"In {place}?"}]
        )
    mix = load(str(folder / "a/qa.jsonl"), "b/x/qa.jsonl", str(folder / "c/x/qa.jsonl"))
    assert [s.id for s in mix.samples] == ["a/qa.jsonl:0", "b/x/qa.jsonl:0", "c/x/qa.jsonl:0"]
    assert failure(UsageError, "a/qa.jsonl", str(folder / "a/qa.jsonl")) == (
        f"data source {str(folder / 'a/qa.jsonl')!r} is in the mix twice: both give 'qa.jsonl:0'"
    )


@pytest.mark.parametrize(
    ("places", "text"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([4, 0, 1, 9], "0-1,4,9")]
)
def test_ranges(places, text):
    assert ranges(places) == text


# --- the demo --------------------------------------------------------------------------------------------


def test_demo_defaults():
    mix = load("demo", limit=4)
    assert Counter(s.task for s in mix.samples) == dict.fromkeys(scenes.DEFAULT_TASKS, 4)
    count = 4 * len(scenes.DEFAULT_TASKS)
    expected = list(scenes.examples("eval", count, 0))
    for sample, example in zip(mix.samples, expected, strict=True):
        assert (sample.task, sample.prompt, sample.references) == (
            example.task,
            example.question,
            (example.answer,),
        )
        assert sample.images[0].tobytes() == example.image.tobytes()
        assert sample.metric == "exact_match"
    assert len({s.id for s in mix.samples}) == count
    assert mix.sources[0]["split"] == "calibration" and mix.sources[0]["tasks"] == dict.fromkeys(
        scenes.DEFAULT_TASKS, 4
    )


def test_demo_tasks_and_splits_never_meet():
    mixes = [
        load("demo:tasks=relation+colour", f"demo:tasks=shape,limit=5,split={split}", limit=3, seed=seed)
        for seed in range(3)
        for split in ("calibration", "test")
    ]
    assert Counter(s.task for s in mixes[0].samples) == {"relation": 3, "colour": 3, "shape": 5}
    for split in ("calibration", "test"):
        prints = [
            f for seed in range(3) for f in load(f"demo:split={split}", limit=10, seed=seed).fingerprints
        ]
        other = "test" if split == "calibration" else "calibration"
        others = {
            f for seed in range(3) for f in load(f"demo:split={other}", limit=10, seed=seed).fingerprints
        }
        assert not others & set(prints)


def test_demo_errors():
    assert failure(UsageError, "demo:tasks=color", limit=3) == (
        "data source 'demo': unknown task 'color' (did you mean 'colour'?)"
    )
    assert failure(UsageError, "demo:split=train", limit=3) == (
        "data source 'demo': unknown split 'train' (splits: calibration, test)"
    )
    assert failure(UsageError, "demo") == "data source 'demo': generated data has no end (give a limit)"
    assert failure(UsageError, "demo:path=x", limit=3) == (
        "data source 'demo': path does not apply to generated data"
    )


# --- failures --------------------------------------------------------------------------------------------


def bad_rows():
    good = qa()
    return [
        good[0],
        {**good[1], "image": "missing.png"},
        {**good[2], "image": "broken.png"},
        {**good[3], "image": None},
        {k: v for k, v in good[4].items() if k != "question"},
        {**good[5], "question": None},
        {**good[5], "answer": {"text": "x"}},
        {**good[5], "image": 3},
        {**good[5], "choices": ["a", "b"], "answer": "c"},
        {**good[5], "choices": ["a", "b"], "answer": 2},
        {**good[5], "choices": "a or b", "answer": "a"},
        {**good[5], "answer": []},
        {**good[5], "answer": [["x"]]},
        {**good[5], "choices": [str(n) for n in range(27)], "answer": "1"},
        {**good[5], "image": "https://example.org/x.png"},
    ]


BAD_MESSAGES = [
    "row 1: column 'image': no file 'missing.png' (--skip-bad leaves such rows out)",
    "row 2: column 'image': cannot decode 'broken.png': image file is truncated",
    "row 3: column 'image' is empty (--skip-bad leaves such rows out)",
    "row 4: no column 'question'; columns: image, answer (name another one with columns.question=COLUMN)",
    "row 5: column 'question' is empty (--skip-bad leaves such rows out)",
    "row 6: column 'answer' holds a dict, not text (--skip-bad leaves such rows out)",
    "row 7: column 'image' holds a int, not an image or a path (--skip-bad leaves such rows out)",
    "row 8: column 'answer' holds 'c', which is none of the choices (--skip-bad leaves such rows out)",
    "row 9: column 'answer' holds 2, but there are 2 choices (--skip-bad leaves such rows out)",
    "row 10: column 'choices' is not a list of choices (--skip-bad leaves such rows out)",
    "row 11: column 'answer' is empty (--skip-bad leaves such rows out)",
    "row 12: column 'answer' holds a list among its texts (--skip-bad leaves such rows out)",
    "row 13: column 'choices' has 27 choices; at most 26 have a letter (--skip-bad leaves such rows out)",
    "row 14: column 'image': cannot decode 'https://example.org/x.png': web addresses are not fetched "
    "(--skip-bad leaves such rows out)",
]


@pytest.mark.parametrize("number", range(1, 15))
def test_bad_rows_are_named(folder, number):
    rows = bad_rows()
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3))
    noise.save(folder / "broken.png")
    (folder / "broken.png").write_bytes((folder / "broken.png").read_bytes()[:3000])
    write_lines(folder / "qa.jsonl", [rows[0]] * number + [rows[number]])
    message = failure(NotFoundError, "qa.jsonl")
    assert message.startswith(f"qa.jsonl, {BAD_MESSAGES[number - 1]}")


def test_skip_bad_counts(folder):
    rows = bad_rows()
    (folder / "broken.png").write_text("no image")
    write_lines(folder / "qa.jsonl", rows)
    mix = load("qa.jsonl", skip_bad=True)
    assert [s.id for s in mix.samples] == ["qa.jsonl:0"]
    assert mix.skipped == mix.sources[0]["skipped"] == 14
    write_lines(folder / "bad.jsonl", rows[1:3])
    assert load("qa.jsonl:order=first,limit=1", skip_bad=True).skipped == 0
    assert failure(NotFoundError, "bad.jsonl", skip_bad=True).startswith(
        "bad.jsonl: no samples; 2 rows skipped, the last because: "
        "bad.jsonl, row 1: column 'image': cannot decode 'broken.png': cannot identify image file"
    )


def test_a_skipped_row_is_replaced(folder):
    rows = many(folder)
    for n in range(0, 50, 2):
        rows[n]["image"] = "missing.png"
    write_lines(folder / "many.jsonl", rows)
    mix = load("many.jsonl:order=first", limit=5, skip_bad=True)
    assert answers(mix) == [1, 3, 5, 7, 9] and mix.skipped == 5
    assert len(load("many.jsonl", limit=25, skip_bad=True).samples) == 25


@pytest.mark.parametrize("name", ["qa.jsonl", "qa.json", "qa.csv", "qa.parquet"])
def test_bytes_that_are_no_text_cost_their_row(folder, name):
    rows = qa(3)
    rows[1]["question"] = "caf@?"
    if name == "qa.parquet":
        columns = {key: pa.array([row[key].encode() for row in rows], pa.binary()) for key in rows[0]}
        columns["question"] = pa.array([b"one", b"caf\xe9", b"three"], pa.binary())
        texts = {
            key: pa.Array.from_buffers(pa.string(), 3, column.buffers()) for key, column in columns.items()
        }
        pa.parquet.write_table(pa.table(texts), folder / name)
    else:
        if name == "qa.csv":
            lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
            text = "\n".join(lines) + "\n"
        else:
            text = json.dumps(rows) if name == "qa.json" else "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_bytes(text.encode().replace(b"@", b"\xe9"))
    message = failure(NotFoundError, name)
    assert message.startswith(f"{name}, row 1: ") and "not text in UTF-8 (--skip-bad" in message
    mix = load(name, skip_bad=True)
    assert [s.id for s in mix.samples] == [f"{name}:0", f"{name}:2"] and mix.skipped == 1


@pytest.mark.parametrize("column", ["question", "answer", "choices", "task", "image"])
def test_halves_of_surrogate_pairs_are_no_text(folder, column):
    rows = [{**row, "choices": ["answer 0", "answer 1"], "task": "t"} for row in qa(2)]
    rows[1][column] = ["\ud800", "answer 1"] if column == "choices" else "x\ud800"
    if column == "answer":
        del rows[1]["choices"]
    write_lines(folder / "qa.jsonl", rows)
    message = failure(NotFoundError, "qa.jsonl")
    assert message.startswith("qa.jsonl, row 1: ") and message.isascii()
    assert load("qa.jsonl", skip_bad=True).skipped == 1
    write_lines(folder / "qa.jsonl", [{**qa(1)[0], "question": "\U0001f600", "unused": "\ud800"}])
    assert load("qa.jsonl").samples[0].prompt == "\U0001f600"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 100_000 + "]" * 100_000, "line 2 is not JSON: maximum recursion depth exceeded"),
        ('{"a": ' + "9" * 5000 + "}", "line 2 is not JSON: Exceeds the limit"),
        ('{"answer": "a", "answer": "b"}', "line 2 has one name twice"),
        ('{"image": "0.png", "question": "q", "answer": NaN}', "column 'answer' is empty"),
        ('{"image": "0.png", "question": "q", "answers": [NaN, NaN]}', "column 'answers' is empty"),
        (
            '{"image": "0.png", "question": "q", "answer": Infinity}',
            "column 'answer' holds inf, not a number",
        ),
        ('{"image": "0.png", "question": NaN, "answer": "a"}', "column 'question' is empty"),
        ('{"image": NaN, "question": "q", "answer": "a"}', "column 'image' holds a float"),
        (
            '{"image": "0.png", "question": "q", "choices": ["a"], "answer": "%s"}' % ("b" * 10**6),
            "column 'answer'",
        ),
        ('{"%s": 1}' % ("b" * 10**6), "no column 'question'"),
        (
            '{"image": "0.png", "question": "q", "choices": ["a"], "answer": 0.5}',
            "column 'answer' holds '0.5'",
        ),
    ],
    ids=lambda value: value[:60],
)
def test_one_line_never_costs_the_others(folder, line, reason):
    (folder / "qa.jsonl").write_text(json.dumps(qa()[0]) + "\n" + line + "\n" + json.dumps(qa()[2]) + "\n")
    message = failure(NotFoundError, "qa.jsonl")
    assert message.startswith(f"qa.jsonl, row 1: {reason}") and len(message) < 700
    assert [s.id for s in load("qa.jsonl", skip_bad=True).samples] == ["qa.jsonl:0", "qa.jsonl:2"]


def test_columns_that_are_there_twice(folder):
    (folder / "qa.csv").write_text("image,question,answer,answer\n0.png,?,a,b\n")
    assert failure(NotFoundError, "qa.csv") == (
        "qa.csv: cannot be read: its header names the column 'answer' twice"
    )
    (folder / "qa.csv").write_text(
        "image,question,answer,,\n0.png,?,a,,\n"
    )  # of a spreadsheet's empty columns
    assert load("qa.csv").samples[0].references == ("a",)
    table = pa.table([pa.array(["0.png"]), pa.array(["a"]), pa.array(["b"])], ["image", "answer", "answer"])
    pa.parquet.write_table(table, folder / "qa.parquet")
    assert failure(NotFoundError, "qa.parquet") == (
        "qa.parquet: cannot be read: it has the column 'answer' twice"
    )


def test_a_check_of_the_model_costs_a_row_only(folder):
    write_lines(folder / "qa.jsonl", qa())

    def check(sample):
        if sample.id.endswith((":1", ":4")):
            raise BadRow("too long for the model")

    assert failure(NotFoundError, "qa.jsonl", check=check) == (
        "qa.jsonl, row 1: too long for the model (--skip-bad leaves such rows out)"
    )
    mix = load("qa.jsonl:order=first", limit=3, skip_bad=True, check=check)
    assert [s.id for s in mix.samples] == [
        "qa.jsonl:0",
        "qa.jsonl:2",
        "qa.jsonl:3",
    ]  # another row takes its place
    assert mix.skipped == mix.sources[0]["skipped"] == 1 and mix.sources[0]["rows"] == "0,2-3"


def test_unreadable_files(folder):
    (folder / "list.json").write_text('{"a": 1}')
    assert failure(NotFoundError, "list.json") == "list.json: cannot be read: it is not a list of objects"
    (folder / "torn.json").write_text('[{"a": 1}')
    assert failure(NotFoundError, "torn.json").startswith(
        "torn.json: cannot be read: Expecting ',' delimiter"
    )
    (folder / "text.jsonl").write_text('{"image": "0.png", "question": "q", "answer": "a"}\n\n[1]\n')
    assert failure(NotFoundError, "text.jsonl") == (
        "text.jsonl, row 1: line 3 is not a JSON object (--skip-bad leaves such rows out)"
    )
    (folder / "latin.jsonl").write_bytes(b'{"question": "caf\xe9"}\n')
    assert failure(NotFoundError, "latin.jsonl") == (
        "latin.jsonl, row 0: line 1 is not text in UTF-8 (--skip-bad leaves such rows out)"
    )
    (folder / "wide.csv").write_text("image,question\n0.png,q,more\n")
    assert failure(NotFoundError, "wide.csv") == (
        "wide.csv, row 0: line 2 has more fields than the header (--skip-bad leaves such rows out)"
    )
    (folder / "no.parquet").write_bytes(b"nothing")
    assert failure(NotFoundError, "no.parquet").startswith("no.parquet: cannot be read: ")
    (folder / "empty.jsonl").write_text("")
    assert failure(NotFoundError, "empty.jsonl") == "empty.jsonl: no samples"
    (folder / "notes.txt").write_text("x")
    assert failure(NotFoundError, "notes.txt") == (
        "notes.txt: unknown kind of data file '.txt' (known: .jsonl, .json, .parquet, .csv, .tsv)"
    )
    (folder / "nothing").mkdir()
    assert failure(NotFoundError, "nothing").startswith("nothing: cannot be read as a data set: ")


def test_sources_that_are_not_there(folder):
    assert failure(NotFoundError, "sciencqa") == (
        "data source 'sciencqa': no such file, directory or built-in task (did you mean 'scienceqa'?)"
    )
    assert failure(NotFoundError, "some/where.jsonl") == (
        "data source 'some/where.jsonl': no such file, directory or built-in task (built-in: demo, scienceqa, ai2d, "
        "mmmu, gqa, textvqa, textvqa_ocr, pope, mme, flickr30k, ocrbench; a Hub data set is OWNER/NAME)"
    )
    assert failure(NotFoundError, "owner/name") == (
        "data set 'owner/name': the Hub is switched off (HF_HUB_OFFLINE) "
        "(a local copy works offline: name its directory or file, or add path=DIR to a built-in task)"
    )


def test_options_that_do_not_fit(folder):
    write_lines(folder / "qa.jsonl", qa())
    assert failure(UsageError, "qa.jsonl:path=x") == (
        "data source 'qa.jsonl': path is for built-in tasks (use the path as the source)"
    )
    assert (
        failure(UsageError, "qa.jsonl:revision=main")
        == "data source 'qa.jsonl': a local path has no revision"
    )
    assert failure(UsageError, "qa.jsonl:metric=exact_mach") == (
        "data source 'qa.jsonl': unknown metric 'exact_mach' (did you mean 'exact_match'?)"
    )
    assert failure(NotFoundError, "qa.jsonl:tasks=a+b") == "qa.jsonl: no samples of the task 'a'; tasks: qa"
    many(folder, tasks=["a", "b"])
    assert failure(NotFoundError, "many.jsonl:tasks=a+c") == (
        "many.jsonl: no samples of the task 'c'; tasks: a, b"
    )


def test_nothing_heavy_is_imported():
    import subprocess

    code = (
        "import sys, vtwcli.data.tasks, vtwcli.data.metrics, vtwcli.data.sources; "
        "print([name for name in ('torch', 'transformers', 'datasets', 'PIL.Image', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
