"""Working directories at URLs: a training run in stores that speak Google's and Amazon's protocols on this machine, and
that refuse an upload when told to.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import re
import shutil
import threading
import time

import fsspec
import jax
import numpy as np
import pytest
import toy

import fot_jax
from fot_jax import checkpoint, files, formats, staging, training


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a store, but those that upload to a path that matches `refused`; one takes `seconds`."""

    daemon_threads = True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store, self.refused, self.seconds = port, None, 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is two small writes

    def _pass_on(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        server = self.server
        uploads = self.command in ("PUT", "POST")
        time.sleep(server.seconds * uploads)
        if uploads and server.refused and (server.refused.search(self.path) or server.refused.search(str(body[:2000]))):
            self._answer(403, {}, b"<Error><Code>AccessDenied</Code><Message>refused</Message></Error>")
            return
        hop = {"connection", "keep-alive", "transfer-encoding"}
        headers = {k: v for k, v in self.headers.items() if k.lower() not in hop | {"content-length"}}
        connection = http.client.HTTPConnection("127.0.0.1", server.store, timeout=60)
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        found = answer.read()
        self._answer(answer.status, {k: v for k, v in answer.getheaders() if k.lower() not in hop}, found)
        connection.close()

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return body

    def _answer(self, status, headers, body):
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass_on


@pytest.fixture
def forgotten():
    """What is remembered of stores that were before."""
    from etils.epath import backend

    backend.fsspec_backend._get_filesystem.cache_clear()
    for protocol in ("gcs", "gs", "s3"):
        with contextlib.suppress(Exception):
            fsspec.get_filesystem_class(protocol).clear_instance_cache()


@pytest.fixture
def s3(forgotten, monkeypatch, tmp_path):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    told = {"AWS_ENDPOINT_URL": proxy.url, "AWS_DEFAULT_REGION": "us-east-1", "FOT_JAX_STAGING": str(tmp_path / "disk")}
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", **told}.items():
        monkeypatch.setenv(name, value)
    bucket = tmp_path.name.lower().replace("_", "-")  # what moto keeps outlives its servers
    fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True).mkdir(bucket)
    yield f"s3://{bucket}/run", proxy
    server.stop()


@pytest.fixture
def gs(forgotten, monkeypatch, tmp_path):
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    proxy = Proxy(server._api._httpd.server_port)
    monkeypatch.setenv("FOT_JAX_STAGING", str(tmp_path / "disk"))
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, proxy.url)
    yield "gs://bucket/run", proxy
    server.stop()


@pytest.fixture(params=["gs", "s3"])
def store(request):
    """URL of a working directory, and the store's proxy."""
    return request.getfixturevalue(request.param)


pytestmark = pytest.mark.usefixtures("compiled_once")
OPTIONS = dict(export__every=8, model__n_kv_heads=4, checkpoint__keep_every=4)


@pytest.fixture
def whole(tmp_path_factory):
    """The last state of a run on a disk that was never stopped."""
    config = toy.config(**OPTIONS | {"export__every": 0})
    return jax.device_get(training.train(config, tmp_path_factory.mktemp("whole"), toy.Batches()))


def test_a_run_in_an_object_store(store, whole, tmp_path):
    url, proxy = store
    training.train(toy.config(**OPTIONS, steps=4), url, toy.Batches())
    assert checkpoint.steps(url) == [2, 4]

    # What a run leaves that is killed before the last file of a checkpoint is no checkpoint, and is removed.
    there = files.location(url)
    (there / "checkpoints" / "4" / staging.COMMITTED).unlink()
    assert checkpoint.steps(url) == [2]
    shutil.rmtree(tmp_path / "disk", ignore_errors=True)  # another machine goes on

    # An upload that is refused, of arrays or of what makes a checkpoint complete: the step before is whole, and named.
    for refused in ("params", staging.COMMITTED):
        proxy.refused = re.compile(rf"checkpoints(/|%2[fF])6(/|%2[fF]){refused}")
        with pytest.raises(checkpoint.CheckpointError, match=rf"saving step 6 to {url}.*checkpoint of step 4 is whole"):
            training.train(toy.config(**OPTIONS), url, toy.Batches())
        assert checkpoint.steps(url) == [2, 4]
    proxy.refused = None
    state = jax.device_get(training.train(toy.config(**OPTIONS), url, toy.Batches()))
    jax.tree.map(np.testing.assert_array_equal, state, whole)
    assert checkpoint.steps(url) == [4, 6, 8]

    metrics = [json.loads(line) for line in (there / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert any((there / "tensorboard").iterdir())
    for _ in range(2):  # the second time nothing is copied
        params = jax.device_get(fot_jax.load_pretrained(url)[1])
        jax.tree.map(np.testing.assert_array_equal, params, whole.params)
    staging.download(there / "exports" / "8", tmp_path / "exported")
    embedding = formats.open_checkpoint(tmp_path / "exported").tensors["model.embed_tokens.weight"].read()
    np.testing.assert_array_equal(embedding, whole.params["embed"]["embedding"])

    # Another machine, which has seen none of the milestones, keeps them.
    shutil.rmtree(tmp_path / "disk", ignore_errors=True)
    training.train(toy.config(**OPTIONS, steps=12), url, toy.Batches())
    assert checkpoint.steps(url) == [4, 8, 10, 12]

    # A damaged one is named as it lies there.
    shutil.rmtree(tmp_path / "disk", ignore_errors=True)
    (there / "checkpoints" / "12" / "data" / "data.json").write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match=f"the checkpoint {url}/checkpoints/12 is damaged.*step 10"):
        training.train(toy.config(**OPTIONS, steps=14), url, toy.Batches())
