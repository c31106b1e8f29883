"""``push`` against a server that this test starts."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vtwcli.export.directory.manifest import write_manifest
from vtwcli.machine.libraries import versions
from vtwcli.schedule.schedule import Schedule

COMMIT = "c" * 40
CHILD = """
import sys
from pathlib import Path
from vtwcli.errors import VtwError
from vtwcli.export.directory.push import push
assert "torch" not in sys.modules
try:
    print(push(Path(sys.argv[1]), sys.argv[2], private=sys.argv[3] == "private"))
except VtwError as error:
    print(error.exit_code, error)
"""


class Hub(ThreadingHTTPServer):
    """A Hub of one user: remembers what was made and committed.

    Attributes:
        private: whether each repository is private.
        created: bodies of the requests that make a repository.
        files: repository -> file name -> content.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {"me/public": False}
        self.created: list[dict] = []
        self.files: dict[str, dict[str, bytes]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """The four routes that an upload of small files needs."""

    server: Hub

    def log_message(self, *args) -> None:
        pass

    def reply(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        repo = "/".join(self.path.split("?")[0].split("/")[3:5])
        if repo not in self.server.private:
            self.reply(404, {"error": "Repository not found"})
            return
        self.reply(200, {"id": repo, "private": self.server.private[repo], "sha": COMMIT, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer good":
            self.reply(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            self.create(json.loads(body))
        elif self.path.startswith("/api/models/") and "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.reply(200, {"files": files})
        elif "/commit/" in self.path:
            self.commit(body)
        elif self.path.startswith("/api/validate-yaml"):
            self.reply(200, {"errors": [], "warnings": []})
        else:
            self.reply(500, {"error": self.path})

    def create(self, wanted: dict) -> None:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        self.server.created.append(wanted)
        if name in self.server.private:
            self.reply(
                409, {"error": "You already created this model repo", "url": f"{self.server.address}/{name}"}
            )
            return
        self.server.private[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.reply(200, {"url": f"{self.server.address}/{name}", "name": name})

    def commit(self, body: bytes) -> None:
        repo = "/".join(self.path.split("/")[3:5])
        files = self.server.files.setdefault(repo, {})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                assert entry["value"]["encoding"] == "base64"
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self.reply(
            200,
            {
                "success": True,
                "commitOid": COMMIT,
                "commitUrl": f"{self.server.address}/{repo}/commit/{COMMIT}",
            },
        )


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def directory(tmp_path) -> Path:
    """A directory with the manifest of an export, and one file that is none of it."""
    path = tmp_path / "export"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llava"}')
    (path / "README.md").write_text("---\ntags:\n- x\n---\n# Card\n")
    (path / "model.safetensors").write_bytes(b"\0" * 8)
    facts = {
        "model": {"name": "org/base", "revision": None, "model_type": "llava"},
        "schedule": Schedule.withdraw_at(2).to_dict(),
        "weights": "linked",
        "dtype": "float32",
        "versions": versions(),
    }
    write_manifest(path, facts)
    (path / "private-notes.txt").write_text("not for the Hub")
    return path


def run(
    directory: Path, repo: str, address: str, token: str = "good", visibility: str = "private", **more
) -> str:
    """What ``push`` gives or says in a fresh process that reads its endpoint from the environment."""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1"} | more
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(directory), repo, visibility],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_push_uploads_the_listed_files_to_a_private_repository(hub, directory):
    said = run(directory, "me/pruned", hub.address)
    assert said == f"{hub.address}/me/pruned/commit/{COMMIT}"
    assert hub.private["me/pruned"] is True
    names = ("config.json", "README.md", "manifest.json", "model.safetensors")
    assert hub.files == {"me/pruned": {name: (directory / name).read_bytes() for name in names}}


def test_a_public_repository_is_not_taken_for_a_private_one(hub, directory):
    said = run(directory, "me/public", hub.address)
    assert said == "2 me/public exists on the Hub and is public (choose another name, or push it as public)"
    assert hub.files == {}
    assert run(directory, "me/public", hub.address, visibility="public").endswith(COMMIT)
    assert set(hub.files["me/public"]) == {"config.json", "README.md", "manifest.json", "model.safetensors"}


def test_refusals(hub, directory):
    said = run(directory, "me/pruned", hub.address, token="bad")
    assert said == (
        "1 the Hub does not let you write to 'me/pruned' (HTTP 401) (log in with a token that may write: hf auth login)"
    )
    assert run(directory, "a/b/c", hub.address).startswith("2 'a/b/c' is not a Hub id")
    assert run(directory, "me/pruned", "http://127.0.0.1:9").startswith("4 could not push to 'me/pruned'")
    assert run(directory, "me/pruned", hub.address, HF_HUB_OFFLINE="1").startswith("4 HF_HUB_OFFLINE forbids")
    assert hub.files == {}


def test_a_damaged_export_is_not_pushed(hub, directory):
    (directory / "config.json").write_text("{}")
    assert run(directory, "me/pruned", hub.address).startswith("3 ")
    assert hub.created == []
