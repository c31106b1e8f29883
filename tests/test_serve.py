"""An exported directory behind ``transformers serve``: it answers pruned, or not at all."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from vtwcli.data.sample import Sample
from vtwcli.data.scenes import examples
from vtwcli.export.hf.export import export_hf
from vtwcli.models.generation import cache_of
from vtwcli.models.inputs import encode
from vtwcli.models.loading import load
from vtwcli.runtime import pruned
from vtwcli.schedule.schedule import Schedule

pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("fastapi", "openai", "uvicorn"))),
    reason="what transformers serve needs is not installed",
)

LAYER, STEPS = 2, 12  # so early that the full model answers otherwise
PATIENCE = 240  # seconds, for machines that do much else
REFUSAL = "a static cache has no lengths to fix"

CHILD = '''
"""The command ``transformers``, which also writes what each call of generate gave and left in its cache."""
import json, sys

sys.modules["vtwcli"] = None  # the directory must do without
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin

seen, made = sys.argv[1], []
init, generate = Cache.__init__, GenerationMixin.generate

def keeping(self, *args, **kwargs):
    made.append(self)
    init(self, *args, **kwargs)

def telling(self, *args, **kwargs):
    made.clear()
    out = generate(self, *args, **kwargs)
    prompt = kwargs["input_ids"].shape[1]
    told = {
        "tokens": out[0, prompt:].tolist(),
        "prompt": prompt,
        "entries": [int(layer.keys.shape[-2]) for layer in made[-1].layers],
    }
    with open(seen, "a") as file:
        print(json.dumps(told), file=file)
    return out

Cache.__init__, GenerationMixin.generate = keeping, telling
sys.argv = ["transformers", *sys.argv[2:]]
from transformers.cli.transformers import main

main()
'''


@dataclass(frozen=True)
class Made:
    """An export, the chat messages with a picture, and what is the right answer to them."""

    directory: Path
    messages: list[dict[str, Any]]
    text: str
    seen: dict[str, Any]


@dataclass(frozen=True)
class Server:
    """A running server: its address, its one model's name, and the files of its words and of what it computed."""

    url: str
    model: str
    log: Path
    seen: Path

    def ask(self, messages: list[dict[str, Any]], **options: Any) -> bytes:
        """The body of its answer; raises HTTPError."""
        body = {"model": self.model, "messages": messages, "max_tokens": STEPS, "temperature": 0.0, **options}
        request = Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with build_opener(ProxyHandler({})).open(request, timeout=PATIENCE) as answer:
            return answer.read()

    def computed(self) -> list[dict[str, Any]]:
        """What each finished call of generate gave."""
        return [json.loads(line) for line in self.seen.read_text().splitlines()] if self.seen.exists() else []


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    example = next(examples("eval", 1, tasks=("caption",)))
    loaded = load("demo", device="cpu", dtype="float32")
    encoded = encode(loaded, Sample("one", "demo", (example.image,), example.question))
    options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True}
    full = loaded.model.generate(**encoded.inputs, **options)
    with pruned(loaded.model, LAYER):
        out = loaded.model.generate(**encoded.inputs, **options)
    tokens = out.sequences[0, encoded.prompt_length :].tolist()
    entries, whole = ([int(layer.keys.shape[-2]) for layer in cache_of(each).layers] for each in (out, full))
    visual, held = int(encoded.visual.sum()), encoded.prompt_length + len(tokens) - 1
    assert entries == [held] * LAYER + [held - visual] * (len(whole) - LAYER)
    assert out.sequences.tolist() != full.sequences.tolist(), "pruning does not show in the answer"

    directory = tmp_path_factory.mktemp("serve") / "pruned"
    export_hf("demo", Schedule.withdraw_at(LAYER), directory)
    file = io.BytesIO()
    example.image.save(file, "PNG")
    picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": example.question},
    ]
    return Made(
        directory,
        [{"role": "user", "content": content}],
        loaded.processor.tokenizer.decode(tokens, skip_special_tokens=True),
        {"tokens": tokens, "prompt": encoded.prompt_length, "entries": entries},
    )


def waited(condition: Callable[[], Any]) -> bool:
    """Whether a condition holds, at the latest when patience ends."""
    end = time.monotonic() + PATIENCE
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return bool(held)


@contextmanager
def serving(directory: Path, place: Path, *options: str) -> Iterator[Server]:
    """``transformers serve`` of a directory, on a port that the system chooses."""
    log, seen = place / "log", place / "seen"
    arguments = [
        "serve",
        str(directory),
        "--trust-remote-code",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        *options,
    ]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_MODULES_CACHE": str(place / "modules"),
    }
    with log.open("w") as words:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(seen), *arguments, "--host", "127.0.0.1", "--port", "0"],
            stdout=words,
            stderr=words,
            env=environment,
            cwd=place,
        )
    try:
        address = re.compile(r"running on (http://127\.0\.0\.1:\d+)")
        waited(lambda: address.search(log.read_text()) or child.poll() is not None)
        found = address.search(log.read_text())
        assert found, log.read_text()[-3000:]
        yield Server(found[1], str(directory), log, seen)
    finally:
        child.kill()
        child.wait()


def events(body: bytes) -> list[dict[str, Any]]:
    """The data of a stream's events."""
    lines = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("options", [(), ("--continuous-batching",)], ids=["plain", "continuous-batching"])
def test_a_server_answers_pruned(made, tmp_path, options):
    with serving(made.directory, tmp_path, *options) as server:
        whole = json.loads(server.ask(made.messages))
        streamed = events(server.ask(made.messages, stream=True))
        waited(lambda: len(server.computed()) == 2)  # a stream may end before generate does
    assert server.computed() == [made.seen, made.seen]
    assert whole["choices"][0]["message"]["content"] == made.text
    assert whole["usage"]["prompt_tokens"] == made.seen["prompt"]
    assert whole["usage"]["completion_tokens"] == len(made.seen["tokens"])
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in streamed]
    assert "".join(pieces) == made.text
    assert sum(map(bool, pieces)) > 1, "nothing was streamed"


def test_a_server_that_compiles_answers_pruned(made, tmp_path):
    """Its cache is static, with room for as many tokens as were asked for."""
    room = STEPS - len(made.seen["tokens"])
    seen = made.seen | {"entries": [held + room for held in made.seen["entries"]]}
    with serving(made.directory, tmp_path, "--compile") as server:
        whole = json.loads(server.ask(made.messages))
        streamed = events(server.ask(made.messages, stream=True))
        waited(lambda: len(server.computed()) == 2)
    assert server.computed() == [seen, seen]
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in streamed]
    assert whole["choices"][0]["message"]["content"] == "".join(pieces) == made.text


def test_a_server_that_compiles_refuses_with_a_sentence_where_each_prompt_decides(made, tmp_path):
    """No answer is better than the full model's."""
    above = {"score": "attention", "above": 0.01}
    actions = [{"at": LAYER, "action": "keep", "select": above}]
    directory = tmp_path / "decides"
    export_hf("demo", Schedule.from_dict({"format_version": 1, "actions": actions}), directory)
    with serving(directory, tmp_path, "--compile") as server:
        with pytest.raises(HTTPError) as refused:
            server.ask(made.messages)
        assert waited(lambda: REFUSAL in server.log.read_text())  # an answer comes before its traceback
        streamed = server.ask(made.messages, stream=True).decode()
    assert refused.value.code == 500
    assert REFUSAL in streamed and '"content"' not in streamed
    assert server.computed() == []
