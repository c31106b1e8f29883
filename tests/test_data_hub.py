"""Data sets on the Hub, streamed from a server on this machine that answers as the Hub does."""

import json
import os
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from PIL import Image

from tests import hub_layouts

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIENT = """
import json, sys
from vtwcli.data.sources import load_data
from vtwcli.errors import VtwError
from vtwcli.data.spec import DataSpec

for text in sys.argv[2:]:
    try:
        mix = load_data([DataSpec.parse(text)], limit=int(sys.argv[1]), seed=0)
    except VtwError as error:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
    else:
        samples = [
            [s.id, s.prompt, list(s.references), [list(image.getpixel((0, 0))) for image in s.images]]
            for s in mix.samples
        ]
        print(json.dumps({"samples": samples, "source": mix.sources[0]}))
"""


class Hub(ThreadingHTTPServer):
    """Serves the folders of ``repositories`` as data sets and counts the bytes of data files."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.gated = {"owner/gated"}
        self.sent: dict[str, int] = {}


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).removeprefix("/api").removeprefix("/datasets/")
        name = "/".join(path.split("/")[:2])
        rest = path.removeprefix(name).strip("/")
        if name in self.server.gated:
            return self.answer(b"{}", 403, {"X-Error-Code": "GatedRepo"})
        if name not in self.server.repositories:
            return self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        root = self.server.repositories[name]
        if self.path.startswith("/api/"):
            return self.information(name, root, rest)
        file = root / rest.removeprefix(f"resolve/{COMMIT}/")
        if not file.is_file():
            return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.file(file)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        paths = parse_qs(body).get("paths") if "=" in body else json.loads(body)["paths"]
        name = "/".join(self.path.removeprefix("/api/datasets/").split("/")[:2])
        root = self.server.repositories[name]
        self.json([self.entry(root, root / path) for path in paths or [] if (root / path).is_file()])

    def information(self, name, root, rest):
        if rest.startswith("tree/"):
            folder = root / rest.removeprefix(f"tree/{COMMIT}").strip("/")
            if not folder.is_dir():
                return self.answer(b"{}", 404, {"X-Error-Code": "EntryNotFound"})
            return self.json([self.entry(root, child) for child in sorted(folder.iterdir())])
        if rest and rest != f"revision/{COMMIT}":
            return self.answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        files = [
            {"rfilename": file.relative_to(root).as_posix()}
            for file in sorted(root.rglob("*"))
            if file.is_file()
        ]
        return self.json(
            {"id": name, "sha": COMMIT, "siblings": files, "tags": [], "private": False, "gated": False}
        )

    @staticmethod
    def entry(root, path):
        kind = "file" if path.is_file() else "directory"
        size = path.stat().st_size if path.is_file() else 0
        return {"type": kind, "path": path.relative_to(root).as_posix(), "size": size, "oid": "0" * 40}

    def file(self, file):
        data, code = file.read_bytes(), 200
        headers = {"ETag": '"0"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.headers.get("Range"):
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            end = min(int(last) if last else len(data) - 1, len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
            data, code = data[int(first) : end + 1], 206
        if self.command == "GET":
            self.server.sent[file.name] = self.server.sent.get(file.name, 0) + len(data)
        return self.answer(data, code, headers)

    def json(self, value):
        self.answer(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def answer(self, body, code, headers):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path):
    server = Hub({})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask(endpoint: str, home: Path, *texts: str, limit: int = 20) -> list[dict]:
    """Load each source in a process whose Hub is ``endpoint``; one answer each."""
    removed = (
        "HF_HUB_OFFLINE",
        "HF_MODULES_CACHE",
        "HF_TOKEN",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    )
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", CLIENT, str(limit), *texts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_data_sets_are_streamed_with_their_commit(hub, tmp_path):
    hub.repositories["lmms-lab-encoder/ScienceQA"] = hub_layouts.write("scienceqa", tmp_path / "new")
    hub.repositories["lmms-lab/ScienceQA"] = hub_layouts.write("ai2d", tmp_path / "old")
    hub.repositories["lmms-lab/GQA"] = hub_layouts.write("gqa", tmp_path / "gqa")
    hub.repositories["owner/captions"] = hub_layouts.write("flickr30k", tmp_path / "captions")
    album = tmp_path / "album"
    (album / "test").mkdir(parents=True)
    hub_layouts.picture(7).save(album / "test" / "seven.png")
    line = {"file_name": "seven.png", "question": "Which number?", "answer": "7"}
    (album / "test" / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    hub.repositories["owner/album"] = album
    science, gqa, captions, numbers, branch, gated, missing, both, config, split = ask(
        f"http://127.0.0.1:{hub.server_port}",
        tmp_path / "home",
        "scienceqa",
        f"gqa:revision={COMMIT}",
        "owner/captions:columns.answer=caption,prompt=Describe it.",
        "owner/album",
        "gqa:revision=none",
        "owner/gated",
        "owner/missing",
        "ai2d",
        "scienceqa:config=Other",
        "scienceqa:split=tests",
    )
    # The newer organisation comes first; the older one is read where the newer one has nothing.
    assert science["source"]["repository"] == "lmms-lab-encoder/ScienceQA"
    assert {key: gqa["source"][key] for key in ("repository", "config", "split", "revision", "tasks")} == {
        "repository": "lmms-lab/GQA",
        "config": "testdev_balanced_instructions",
        "split": "testdev",
        "revision": COMMIT,
        "tasks": {"gqa": 3},
    }
    short = "\nAnswer the question using a single word or phrase."
    assert gqa["samples"] == [
        ["gqa:testdev:0", "Is it overcast?" + short, ["no"], [[23, 232, 40]]],
        ["gqa:testdev:1", "Who wears a hat?" + short, ["woman"], [[21, 234, 40]]],
        ["gqa:testdev:2", "What colour is the sky?" + short, ["blue"], [[23, 232, 40]]],
    ]
    assert captions["samples"] == [
        [
            "owner/captions:test:0",
            "Describe it.",
            [f"Caption {n} of a dog." for n in range(5)],
            [[51, 204, 40]],
        ]
    ]
    assert captions["source"]["revision"] == COMMIT and captions["source"]["tasks"] == {"captions": 1}
    assert numbers["samples"] == [["owner/album:test:0", "Which number?", ["7"], [[7, 248, 40]]]]
    assert [answer["exit_code"] for answer in (branch, gated, missing, both, config, split)] == [4] * 6
    assert branch["error"] == "data set 'lmms-lab/GQA' has no revision 'none'"
    assert gated["error"] == (
        "data set 'owner/gated' is gated (accept its terms on its page, then `hf auth login`)"
    )
    assert missing["error"] == (
        "data set 'owner/missing' is not on the Hub (check the name; private ones need `hf auth login`)"
    )
    assert both["error"] == (
        "data set 'lmms-lab-encoder/ai2d' or 'lmms-lab/ai2d' is not on the Hub "
        "(check the name; private ones need `hf auth login`)"
    )
    assert config["error"] == (
        "data set lmms-lab-encoder/ScienceQA (Other): cannot be read: "
        "BuilderConfig 'Other' not found. Available: ['ScienceQA-IMG']"
    )
    assert split["error"] == (
        "data set lmms-lab-encoder/ScienceQA (ScienceQA-IMG): no split 'tests'; splits: test (did you mean 'test'?)"
    )


def test_a_small_draw_fetches_a_small_part(hub, tmp_path):
    generator = random.Random(0)
    noise = [Image.frombytes("RGB", (24, 24), generator.randbytes(24 * 24 * 3)) for _ in range(8)]
    rows = [
        {"question": f"q{n}", "options": ["a", "b"], "answer": "1", "image": noise[n % 8]}
        for n in range(3000)
    ]
    folder = hub_layouts.write("ai2d", tmp_path / "ai2d", {"ai2d": rows}, batch_size=100)
    hub.repositories["lmms-lab-encoder/ai2d"] = folder
    file = folder / "data" / "test-00000-of-00001.parquet"
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    drawn, first = ask(endpoint, tmp_path / "home", "ai2d", "ai2d:order=first", limit=5)
    assert drawn["source"]["choice"] == "seeded draw from first 200 rows"
    keys = random.Random(0)
    expected = sorted(sorted(range(200), key=[keys.random() for _ in range(200)].__getitem__)[:5])
    assert [sample[0] for sample in drawn["samples"]] == [f"ai2d:test:{n}" for n in expected]
    assert [sample[0] for sample in first["samples"]] == [f"ai2d:test:{n}" for n in range(5)]
    assert first["source"]["choice"] == "first rows"
    assert hub.sent[file.name] < file.stat().st_size / 2


def test_a_hub_that_does_not_answer(tmp_path):
    (answer,) = ask("http://127.0.0.1:9", tmp_path, "scienceqa")
    assert answer["exit_code"] == 4
    assert answer["error"].startswith(
        "data set 'lmms-lab-encoder/ScienceQA': the Hub cannot be reached: "
    ) and answer["error"].endswith(
        "(a local copy works offline: name its directory or file, or add path=DIR to a built-in task)"
    )
