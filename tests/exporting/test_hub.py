"""Folders are sent with huggingface_hub to a server on this machine that answers as the hub does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from training.exporting import hub


class Hub(BaseHTTPRequestHandler):
    """Takes one repository; ``files`` are those of the commits."""

    files: dict[str, bytes]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Bearer hf_test"
        self._answer({"name": "someone", "type": "user"} if known else {"error": "who?"}, 200 if known else 401)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]})
            return
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        address = f"{constants.ENDPOINT}/me/model"
        self._answer({"url": address, "commitUrl": f"{address}/commit/1", "commitOid": "1"})

    def _answer(self, content: dict, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch) -> Iterator[type[Hub]]:
    kind = type("OneHub", (Hub,), {"files": {}})
    with HTTPServer(("127.0.0.1", 0), kind) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield kind
        running.shutdown()
        thread.join()


def test_all_files_are_sent(server, tmp_path):
    files = {"README.md": b"a card", "open_clip_config.json": b"{}", "model.safetensors": bytes(range(256))}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    hub.check_login("me/model")
    assert hub.push(str(tmp_path), "me/model").endswith("/me/model")
    assert server.files == files


def test_a_login_that_is_not_known_is_told_before_anything_is_written(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError, match="--push me/model: the Hugging Face hub does not answer or does not know"):
        hub.check_login("me/model")


def test_a_hub_that_cannot_be_reached_leaves_the_folder_and_says_how_to_go_on(server, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"is complete on this machine.*hf upload me/model"):
        hub.push(str(tmp_path), "me/model")
    with pytest.raises(ValueError, match=r"--push model: give a repository .* OWNER/NAME"):
        hub.check_login("model")
