"""Data sources as the command line and recipes write them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vtwcli.data.spec import Columns, DataSpec
from vtwcli.errors import UsageError


def test_parse_reads_every_key():
    spec = DataSpec.parse(
        "scienceqa:limit=50,split=validation,task=science,tasks=a+b,config=c,revision=main,path=/some/where,"
        "order=first,metric=anls,image=pad,system=Be brief.,max_new_tokens=16,columns.image=photo,columns.task=kind"
    )
    assert spec == DataSpec(
        source="scienceqa",
        limit=50,
        split="validation",
        task="science",
        tasks=("a", "b"),
        config="c",
        revision="main",
        path="/some/where",
        order="first",
        metric="anls",
        image="pad",
        system="Be brief.",
        max_new_tokens=16,
        columns=Columns(image="photo", task="kind"),
    )


def test_parse_of_a_bare_source():
    assert DataSpec.parse("owner/name") == DataSpec(source="owner/name")
    assert DataSpec.parse("demo").order == "shuffle"


def test_prompts_hold_commas_equal_signs_and_line_breaks():
    spec = DataSpec.parse(r"data.jsonl:prompt=Look, then answer:\n{question} (a = 1),limit=3")
    assert spec.prompt == "Look, then answer:\n{question} (a = 1)"
    assert spec.limit == 3
    assert DataSpec.parse("x:prompt=" + "long " * 1000).prompt == "long " * 1000


def test_an_existing_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:limit=5,name").mkdir()
    (tmp_path / "odd:name").mkdir()
    assert DataSpec.parse("odd:limit=5,name") == DataSpec(source="odd:limit=5,name")
    assert DataSpec.parse("odd:name") == DataSpec(source="odd:name")
    assert DataSpec.parse("odd:name:limit=5") == DataSpec(source="odd:name", limit=5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gqa:limt=5", "data source 'gqa:limt=5': unknown key 'limt' (did you mean 'limit'?)"),
        (
            "gqa:image=x",
            "data source 'gqa:image=x': image: 'x' is not pad; a column is named with columns.image",
        ),
        (
            "gqa:50",
            "data source 'gqa:50': '50' is not KEY=VALUE (known keys: task, tasks, split, config, revision, path, "
            "folder, limit, order, prompt, system, image, metric, max_new_tokens, columns.image, columns.question, "
            "columns.answer, columns.choices, columns.task)",
        ),
        ("gqa:limit=5,limit=6", "data source 'gqa:limit=5,limit=6': key 'limit' is given twice"),
        (
            "gqa:limit=0",
            "data source 'gqa:limit=0': limit: Input should be greater than or equal to 1",
        ),
        (
            "gqa:limit=few",
            "data source 'gqa:limit=few': limit: Input should be a valid integer, unable to parse string as an integer",
        ),
        ("gqa:order=last", "data source 'gqa:order=last': order: Input should be 'shuffle' or 'first'"),
        ("", "data source '': source: a data source needs a name or a path"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(UsageError) as caught:
        DataSpec.parse(text)
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_specifications_are_frozen_and_closed():
    spec = DataSpec(source="demo")
    with pytest.raises(ValidationError, match="frozen"):
        spec.limit = 3
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        DataSpec(source="demo", limits=3)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        DataSpec(source="demo", columns={"picture": "x"})


PIECES = st.sampled_from(
    ["demo", ":", ",", "=", "limit", "prompt", "columns.", "image", "5", "\x00", "\n", ".", "a/b", "+"]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join))
def test_any_text_is_a_source_or_one_clear_error(text):
    try:
        spec = DataSpec.parse(text)
    except UsageError as error:
        assert error.message.startswith("data source ")
        assert "\n" not in error.message
    else:
        assert spec.source and text.startswith(spec.source)
