"""Sets are fetched from a server on this machine that speaks as the hub does."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from training.download_evalsets import main
from training.evaluation.benchmark.download import repository
from training.evaluation.benchmark.tasks import TASKS

COMMIT = "0" * 39 + "1"
FILES = {
    "djghosh/wds_mnist_test": {
        "classnames.txt": b"zero\none\n",
        "test/nshards.txt": b"1\n",
        "test/0.tar": b"t" * 5000,
    },
    "nlphuji/winogavil": {
        "winogavil_dataset.csv": b"cue\n",
        "winogavil_images.zip": b"PK" * 400,
        "README.md": b"no",
    },
}


class Hub(BaseHTTPRequestHandler):
    """``asked``: the files that were asked for. ``short``: one whose last byte is never sent."""

    asked: list[str]
    short = ""

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        path = self.path.split("?")[0]
        for name, files in FILES.items():
            if path.startswith(f"/api/datasets/{name}"):
                siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
                return self._send(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), body)
            for file, data in files.items():
                if path == f"/datasets/{name}/resolve/{COMMIT}/{file}":
                    if body:
                        self.asked.append(file)
                    return self._send(
                        data[:-1] if file == self.short else data, body, hashlib.sha1(data).hexdigest()
                    )
        code = 403 if "cifar10_" in path else 404
        self.send_response(code)
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, data, body, etag="x"):
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("OneHub", (Hub,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    server.server_close()


def fetch(folder, tasks):
    return main(["--data_dir", str(folder), "--tasks", tasks])


def test_sets_are_put_where_they_are_looked_for_and_not_fetched_twice(hub, tmp_path, capsys):
    assert fetch(tmp_path, "mnist,WinoGAViL") == 0
    for place, name in (("wds_mnist_test", "djghosh/wds_mnist_test"), ("nlphuji/winogavil", "nlphuji/winogavil")):
        for file, data in FILES[name].items():
            assert file == "README.md" or (tmp_path / place / file).read_bytes() == data
    (tmp_path / "wds_mnist_test/test/0.tar").write_bytes(b"half")
    hub.asked.clear()
    assert fetch(tmp_path, "mnist,winogavil") == 0
    assert hub.asked == ["test/0.tar"]
    assert (tmp_path / "wds_mnist_test/test/0.tar").read_bytes() == FILES["djghosh/wds_mnist_test"]["test/0.tar"]
    assert "WinoGAViL: all there in" in capsys.readouterr().out


def test_what_cannot_be_had_is_told_and_ends_no_other(hub, tmp_path, capsys):
    assert fetch(tmp_path, "cifar10,imagenet1k,mnist") == 1
    err = capsys.readouterr().err
    assert "could not be had: CIFAR-10: the hub wants an account for djghosh/wds_cifar10_test" in err
    assert "could not be had: ImageNet 1k: the hub has no djghosh/wds_imagenet1k_test" in err
    assert (tmp_path / "wds_mnist_test/test/0.tar").is_file()


def test_a_file_that_is_cut_is_no_file_of_the_set(hub, tmp_path, capsys):
    hub.short = "test/0.tar"
    assert fetch(tmp_path, "mnist") == 1
    assert "could not be had: MNIST: " in capsys.readouterr().err


def test_no_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert fetch(tmp_path, "mnist") == 1
    assert "could not be had: MNIST: djghosh/wds_mnist_test cannot be fetched" in capsys.readouterr().err


def test_no_such_task(tmp_path, capsys):
    assert fetch(tmp_path, "nmist") == 2
    assert "--tasks nmist: nmist is no task of the benchmark; did you mean mnist" in capsys.readouterr().err


def test_repositories_are_those_of_the_benchmark():
    names = {task.key: repository(task) for task in TASKS}
    assert names["fairness/dollar_street"] == "djghosh/wds_dollar_street_test"
    assert names["vtab/pcam"] == "djghosh/wds_vtab-pcam_test"
    assert names["retrieval/flickr_1k_test_image_text_retrieval"] == "nlphuji/flickr_1k_test_image_text_retrieval"
