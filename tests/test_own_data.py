"""Users' own data in the forms in which people have it, real files of ``datasets`` among them; errors that help on."""

import base64
import json
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_data_sources import encoded, failure, load, picture, write_lines
from vtwcli.data.spec import Columns, DataSpec
from vtwcli.errors import NotFoundError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with six pictures, 0.png to 5.png."""
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    return tmp_path


def shown(sample):
    """Which of ``folder``'s pictures a sample has."""
    numbers = {picture(n).tobytes(): n for n in range(6)}
    return [numbers[image.tobytes()] for image in sample.images]


def ask(*parts, answer="red", system=None):
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": list(parts)})
    return [*turns, {"role": "assistant", "content": answer}]


def words(text):
    return {"type": "text", "text": text}


def data_address(number):
    return "data:image/png;base64," + base64.b64encode(encoded(number)).decode()


def test_openai_messages(folder):
    url = {"type": "image_url", "image_url": {"url": data_address(1), "detail": "low"}}
    file = {"type": "image_url", "image_url": {"url": f"file://{folder}/2.png"}}
    rows = [
        {"messages": ask(words("What colour?"), url, system="Be brief.")},
        {"messages": ask(url, words("What colour?"), answer=[words("blue")])},
        {"messages": ask(words("First"), url, words("then"), file, words("which?"))},
        {
            "messages": ask(
                {"type": "input_text", "text": "Say it."}, {"type": "input_image", "image_url": "3.png"}
            )
        },
        {"messages": [{"role": "user", "content": "<image> What?"}], "images": ["4.png"]},
    ]
    write_lines(folder / "chat.jsonl", rows)
    samples = load("chat.jsonl").samples
    assert [shown(sample) for sample in samples] == [[1], [1], [1, 2], [3], [4]]
    assert [(one.prompt, one.places) for one in samples] == [
        ("What colour?", (12,)),
        ("What colour?", ()),
        ("Firstthenwhich?", (5, 9)),
        ("Say it.", (7,)),
        ("What?", ()),
    ]
    assert [one.references for one in samples] == [("red",), ("blue",), ("red",), ("red",), ()]
    assert [one.system for one in samples] == ["Be brief.", None, None, None, None]
    assert load("chat.jsonl:system=Always.").samples[0].system == "Always."


def test_llava_files(folder):
    def turns(*texts):
        return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]

    (folder / "pictures").mkdir()
    (folder / "pictures" / "5.png").write_bytes(encoded(5))
    rows = [
        {"id": "a", "image": "0.png", "conversations": turns("<image>\nWhat?", "red", "And now?", "blue")},
        {"id": "b", "image": "1.png", "conversations": turns("What is it?\n<image>", "a dog")},
        {"id": "c", "image": ["2.png", "3.png"], "conversations": turns("<image> or\n<image>?", "both")},
    ]
    (folder / "llava.json").write_text(json.dumps(rows))
    samples = load("llava.json").samples
    assert [shown(sample) for sample in samples] == [[0], [1], [2, 3]]
    assert [one.prompt for one in samples] == ["What?", "What is it?", " or\n?"]
    assert samples[2].places == (0, 4)
    assert [one.references for one in samples] == [("red",), ("a dog",), ("both",)]
    write_lines(
        folder / "far.jsonl", [{"id": "a", "image": "5.png", "conversations": turns("<image>What?", "red")}]
    )
    assert shown(load("far.jsonl:folder=pictures").samples[0]) == [5]
    text = {"id": "d", "conversations": turns("Hello", "Hi")}
    write_lines(folder / "mixed.jsonl", [*rows, text])
    assert failure(NotFoundError, "mixed.jsonl") == (
        "mixed.jsonl, row 3: the conversation has no image (--skip-bad leaves such rows out)"
    )
    assert load("mixed.jsonl", skip_bad=True).skipped == 1


def test_several_turns_take_the_first_questions_images(folder, capsys):
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>One?"},
                {"role": "assistant", "content": "1"},
                {"role": "user", "content": "<image>Two?"},
                {"role": "assistant", "content": "2"},
            ],
            "images": ["1.png", "2.png"],
        }
    ]
    write_lines(folder / "chat.jsonl", rows)
    [sample] = load("chat.jsonl").samples
    assert (sample.prompt, sample.references, shown(sample)) == ("One?", ("1",), [1])


@pytest.mark.parametrize("kind", ["parquet", "saved", "jsonl", "csv"])
def test_conversations_as_datasets_writes_them(folder, kind):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    part = {"type": Value("string"), "text": Value("string")}  # a part has all keys, some of them None
    features = Features(
        {"messages": List({"role": Value("string"), "content": List(part)}), "images": List(ImageFeature())}
    )
    rows = {
        "messages": [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "text": None}, {"type": "text", "text": f"{n}?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": f"answer {n}"}]},
            ]
            for n in range(3)
        ],
        "images": [[picture(n)] for n in range(3)],
    }
    name = f"chat.{kind}"
    if kind in ("jsonl", "csv"):
        plain = [{"messages": one, "images": f"{n}.png"} for n, one in enumerate(rows["messages"])]
        if kind == "jsonl":
            Dataset.from_list(plain).to_json(name)
        else:
            Dataset.from_list([{**one, "messages": json.dumps(one["messages"])} for one in plain]).to_csv(
                name
            )
    else:
        data = Dataset.from_dict(rows, features=features)
        data.to_parquet(name) if kind == "parquet" else data.save_to_disk(name)
    samples = load(name).samples
    assert [(one.prompt, one.references, one.places) for one in samples] == [
        (f"{n}?", (f"answer {n}",), ()) for n in range(3)
    ]
    assert [shown(one) for one in samples] == [[0], [1], [2]]


def test_several_images_by_the_names_they_have(folder):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    asked = {"question": "Which?", "answer": "a"}
    rows = [
        {"images": ["0.png", "1.png"], **asked},
        {"images": [{"bytes": None, "path": "2.png"}], **asked},
        {"file_names": ["3.png", "4.png"], **asked},
        {"image_1": "0.png", "image_2": "5.png", "image_3": None, **asked},
        {"image0": "1.png", "image1": "2.png", **asked},
    ]
    write_lines(folder / "many.jsonl", rows)
    assert [shown(one) for one in load("many.jsonl").samples] == [[0, 1], [2], [3, 4], [0, 5], [1, 2]]
    features = Features(
        {"images": List(ImageFeature()), "question": Value("string"), "answer": Value("string")}
    )
    pictures = [[picture(n), picture(n + 1)] for n in range(2)]
    data = {"images": pictures, "question": ["a?", "b?"], "answer": ["x", "y"]}
    Dataset.from_dict(data, features=features).to_parquet("many.parquet")
    assert [shown(one) for one in load("many.parquet").samples] == [[0, 1], [1, 2]]


def test_a_folder_of_pictures_with_any_table(folder):
    (folder / "album" / "pics").mkdir(parents=True)
    for number in range(2):
        (folder / "album" / "pics" / f"{number}.png").write_bytes(encoded(number))
    table = "image,question,answer\npics/0.png,What?,red\npics/1.png,How many?,2\n"
    (folder / "album" / "questions.csv").write_text(table)
    samples = load("album").samples
    assert [(one.prompt, shown(one)) for one in samples] == [("What?", [0]), ("How many?", [1])]
    (folder / "album" / "more.csv").write_text(table)
    assert failure(NotFoundError, "album") == (
        "album: pictures, and several files of rows: more.csv, questions.csv (name one: --data album/more.csv)"
    )
    (folder / "album" / "metadata.csv").write_text(table.replace("image,", "file_name,"))
    assert len(load("album").samples) == 2  # the name that datasets knows comes first


def test_pictures_alone_are_asked_by_a_prompt(folder):
    (folder / "album").mkdir()
    for number in range(2):
        (folder / "album" / f"{number}.png").write_bytes(encoded(number))
    message = failure(NotFoundError, "album")
    assert message.endswith("(try --data 'album:prompt=Describe the picture.')")
    assert [shown(one) for one in load(followed(message)).samples] == [[0], [1]]


def followed(message):
    """The source that a message ends in."""
    [flag, source] = shlex.split(message[message.index("(try ") + 5 : -1])
    assert flag == "--data"
    return source


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (
            ("Image", "Question", "Answer"),
            "columns.image=Image,columns.question=Question,columns.answer=Answer",
        ),
        (("picture", "text", "label"), "columns.image=picture,columns.question=text,columns.answer=label"),
        (("image", "prompt", "response"), "columns.question=prompt,columns.answer=response"),
        (("img_path", "question", "answer"), "columns.image=img_path"),
    ],
)
def test_errors_end_in_what_works(folder, columns, hint):
    lines = [",".join(columns), *(f"{n}.png,Question {n}?,answer {n}" for n in range(3))]
    (folder / "rows.csv").write_text("\n".join(lines))
    message = failure(NotFoundError, "rows.csv")
    assert message.endswith(f"(try --data rows.csv:{hint})")
    samples = load(followed(message)).samples
    assert [(one.prompt, one.references) for one in samples] == [
        (f"Question {n}?", (f"answer {n}",)) for n in range(3)
    ]
    # what was given stays
    assert followed(failure(NotFoundError, "rows.csv:limit=2,image=pad")).startswith(
        "rows.csv:limit=2,image=pad,"
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "assistant", "content": "x"}]}, "column 'messages' has no turn of the user"),
        ({"messages": [{"role": "user", "content": None}]}, "column 'messages' has a turn without text"),
        (
            {"messages": ask({"type": "audio", "audio": "x.wav"})},
            "column 'messages' has a part of the type 'audio': text and images are read",
        ),
        (
            {"messages": ask({"type": "image"}, {"type": "image"}, words("?")), "images": ["0.png"]},
            "the question has 2 images, but there are 1 beside it",
        ),
        (
            {"messages": ask({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})},
            "column 'image': cannot decode 'https://example.org/a.png': web addresses are not fetched",
        ),
    ],
)
def test_conversations_that_cannot_be_read(folder, row, reason):
    write_lines(folder / "chat.jsonl", [row])
    assert (
        failure(NotFoundError, "chat.jsonl")
        == f"chat.jsonl, row 0: {reason} (--skip-bad leaves such rows out)"
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "task": st.just("mine"),
            "tasks": st.just(("a", "b")),
            "limit": st.integers(1, 9),
            "order": st.just("first"),
            "prompt": st.sampled_from(["{question}", "Look, then:\nsay {x} = y"]),
            "system": st.just("Be brief.\nVery."),
            "image": st.just("pad"),
            "folder": st.just("some where"),
            "columns": st.builds(Columns, image=st.sampled_from([None, "photo"]), answer=st.just("a b")),
        },
    )
)
def test_a_source_is_written_as_it_is_read(values):
    spec = DataSpec(source="mine.jsonl", **values)
    assert DataSpec.parse(spec.written()) == spec
