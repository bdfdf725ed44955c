"""train_cifar.py's S3 sources against a real server on loopback, and a proxy that makes faults."""

import http.client
import http.server
import itertools
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import obstore
import psutil
import pytest
import torch
from helpers import (
    REPO,
    assert_one_error_line,
    finish,
    read_log,
    refused,
    script_environment,
    start,
    wait_until,
)

import s3_server
import train_cifar
from common import RECORD_BYTES, InputError, make_synthetic
from train_cifar import (
    AHEAD,
    KEPT_SHARDS,
    MAX_CHECKSUM_ERRORS,
    Bucket,
    ChecksumError,
    ImageFolderSource,
    InMemorySource,
    LoadingError,
    ManifestEntry,
    ProcessGroup,
    S3Pictures,
    S3Shards,
    TrainContext,
    WorkerPool,
    download,
    label_pictures,
    labels_of,
    list_objects,
    list_pictures,
    load_batches,
    put_object,
)

N = 300  # images in the bucket
SHARD = 32  # images in each of its shards
TINY = ("--model", "cnn", "--batch-size", 16, "--subset", 96, "--threads", 1)
S3_SERVER = "experiments/s3_server.py"


HELD = []


def free_port():
    """A port where nobody listens but our own servers: a bound socket keeps it until the end."""
    HELD.append(socket.socket())
    # as servers do, which may then listen there
    HELD[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    HELD[-1].bind(("127.0.0.1", 0))
    return HELD[-1].getsockname()[1]


class Server:
    """s3_server.py in a folder, always on the same port."""

    def __init__(self, folder):
        self.folder, self.port = folder, free_port()
        self.env = {
            "AWS_SHARED_CREDENTIALS_FILE": str(folder / "s3/credentials"),
            "AWS_CONFIG_FILE": str(folder / "s3/config"),
        }

    def __enter__(self):
        self.process = start(self.folder, S3_SERVER, "--dir", "s3", "--port", self.port)
        assert f"S3 at http://127.0.0.1:{self.port}" in self.process.stdout.readline()
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with the synthetic images in s3://cifar10/data, in small shards."""
    with Server(tmp_path_factory.mktemp("s3")) as server:
        code = f"import train_cifar as t; t.SHARD_IMAGES = {SHARD}; t.main()"
        options = ["--export", "s3://cifar10/data", "--dataset", "synthetic", "--subset", str(N)]
        subprocess.run(
            [sys.executable, "-c", code, *options],
            cwd=server.folder,
            check=True,
            env=script_environment(PYTHONPATH=REPO, **server.env),
        )
        yield server


@pytest.fixture
def aws(server, monkeypatch):
    """The environment of a client, here in this process."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def run_here(aws, tmp_path, monkeypatch):
    """run_here("--epochs", 1, …): train_cifar.main() in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    monkeypatch.setattr(train_cifar, "keep_freed_memory", lambda: None)  # it would last

    def run(*argv):
        train_cifar.main([str(word) for word in argv])

    return run


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to the server, with the fault that fault(method, path, times asked before)
    names.

    A number is a status, ("wait", seconds) delays, "truncate" breaks the answer off after half of
    it, "shorten" sends half of it as if it were all, "alter" changes a byte, "close" closes the
    connection without an answer, "hang" waits until the client does; None passes.
    """

    daemon_threads = True
    request_queue_size = 128  # more clients at once than the default of 5

    def __init__(self, port, fault=lambda *_: None, own_port=0):
        super().__init__(("127.0.0.1", own_port), Handler)
        self.target, self.fault, self.requests = port, fault, []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def handle_error(self, *_):
        pass  # clients that hang up are part of the tests

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def relay(self):
        asked = (self.command, self.path.partition("?")[0])
        before = self.server.requests.count(asked)
        self.server.requests.append(asked)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault(*asked, before)
        if isinstance(fault, tuple):
            time.sleep(fault[1])
        if fault == "hang":
            self.connection.recv(1)
        if fault in ("close", "hang"):
            self.close_connection = True
            return
        if isinstance(fault, int):
            self.answer(fault, {}, b"<Error><Code>SlowDown</Code></Error>")
            return
        response, data = self.ask(body)
        if fault == "alter":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "shorten":
            data = data[: len(data) // 2]
        self.answer(
            response.status, dict(response.getheaders()), data, truncate=fault == "truncate"
        )

    def ask(self, body):
        """The server's answer. Under load it may hang up on a new connection: not our fault."""
        for last in (False, False, True):
            connection = http.client.HTTPConnection("127.0.0.1", self.server.target)
            try:
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                return response, response.read()
            except (OSError, http.client.HTTPException):
                if last:
                    raise
                time.sleep(0.1)
            finally:
                connection.close()

    do_GET = do_PUT = do_HEAD = do_POST = relay  # noqa: N815

    def answer(self, status, headers, data, truncate=False):
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = headers.get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if truncate else data)
        self.close_connection = self.close_connection or truncate

    def log_message(self, *_):
        pass


def images():
    """The training images that the bucket has."""
    return InMemorySource(*make_synthetic(N)[:2])


def pictures(proxy=None, retry_timeout=5.0, n=N, read_timeout=5.0):
    bucket = Bucket("s3://cifar10/data", proxy and proxy.url, retry_timeout)
    bucket.read_timeout = read_timeout
    return S3Pictures(bucket, bucket.manifest()["train"][:n])


def shards(proxy=None, n=N, **options):
    bucket = Bucket("s3://cifar10/data", proxy and proxy.url, 5.0)
    manifest = bucket.manifest()
    labels = labels_of(manifest["train"][:n])
    return S3Shards(bucket, manifest["train_shards"], labels, **options)


def epoch(source, workers, seed=1, number=2, size=16):
    """All batches of an epoch as training gets them."""
    order = source.order(seed, number)
    indices = [order[start : start + size] for start in range(0, len(order), size)]
    context = TrainContext(ProcessGroup(), WorkerPool(workers))
    return list(load_batches(source, indices, (seed, number), context))


def assert_equal_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for (x, y), (other_x, other_y) in zip(ours, theirs, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_source_gives_the_same_batches(aws, tmp_path, workers):
    """From memory, disk and S3, picture by picture and downloaded, with any number of workers:
    the same samples, order and augmentation."""
    reference = epoch(images(), 0)
    data = ["--dataset", "synthetic", "--subset", str(N), "--quiet"]
    train_cifar.main(["--export", str(tmp_path), *data])
    downloaded, row = download(shards(), WorkerPool(workers))
    assert row["value1"] == N
    on_disk, _, _ = label_pictures(list_pictures(tmp_path / "train"), [])
    for source in (images(), ImageFolderSource(on_disk), pictures(), downloaded):
        assert_equal_batches(epoch(source, workers), reference)


@pytest.mark.parametrize("n", [N, 100, SHARD, 1])
def test_shards_hold_each_image_once(aws, n):
    """Whatever the shuffling, index i is image i; a subset may end within a shard."""
    source, expected = shards(n=n), images()
    order = source.order(3, 1)
    assert sorted(order) == list(range(n))
    found, labels = source.read(order)
    np.testing.assert_array_equal(found, expected.images[order])
    np.testing.assert_array_equal(labels, expected.labels[order])


def test_shards_are_shuffled_by_seed_and_epoch_alone(aws):
    orders = [
        shards(readers=r).order(seed, e).tolist()
        for r, seed, e in [(0, 1, 1), (2, 1, 1), (0, 1, 2), (0, 2, 1)]
    ]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    mixed = np.array(orders[0][: 2 * SHARD]) // SHARD  # the first two shards, mixed
    assert len(set(mixed)) == 2
    assert len(set(mixed[:SHARD])) == 2
    assert_equal_batches(epoch(shards(), 0), epoch(shards(readers=3), 3))


def test_memory_holds_few_shards(aws):
    """An epoch fetches each shard once and keeps few of them, the next ones ahead of their use."""
    with Proxy(aws.port) as proxy:
        source = shards(proxy, readers=1)
        order = source.order(1, 1)
        source.set_read_order(order)
        for start in range(0, N, 10):
            source.read(order[start : start + 10])
            assert len(source._kept) <= KEPT_SHARDS < N // SHARD
        gets = [path for _, path in proxy.requests if path.endswith(".bin")]
    assert sorted(gets) == [f"/cifar10/data/train-shards/{s:02}.bin" for s in range(-(-N // SHARD))]


def test_workers_are_bounded_and_in_order():
    """Workers run ahead by AHEAD batches each, no more; slow batches hold back those after them."""
    started = []

    def make(i):
        started.append(i)
        time.sleep(0.02 if i % 3 == 0 else 0)
        return i

    results = WorkerPool(2).map(make, range(40))
    assert next(results) == 0
    time.sleep(0.3)
    assert len(started) <= 2 * AHEAD
    assert [0, *results] == list(range(40))


def test_workers_pass_on_errors_and_stop():
    def make(i):
        if i == 3:
            raise LoadingError("no")
        return i

    results = WorkerPool(2).map(make, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LoadingError):
        next(results)


def test_workers_ask_whether_to_go_on_waiting():
    """What waiting() raises ends the wait: so Ctrl-C works while a server is silent."""
    silence = threading.Event()

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(WorkerPool(1).map(lambda i: silence.wait(20), [0], waiting=stop))
    silence.set()


def test_each_worker_has_a_client_of_its_own(aws, monkeypatch):
    made = []
    connect = Bucket.connect

    def counted_connect(bucket):
        made.append(threading.get_ident())
        return connect(bucket)

    source = pictures()
    monkeypatch.setattr(Bucket, "connect", counted_connect)
    barrier = threading.Barrier(2)  # so that both workers take part
    list(WorkerPool(2).map(lambda i: (barrier.wait(20), source.read(np.array([i]))), range(6)))
    assert len(made) == len(set(made)) == 2


def test_images_keep_their_labels_whatever_arrives_first(aws):
    """Delays that depend on the name shuffle the answers."""
    with Proxy(
        aws.port, lambda _, path, __: ("wait", zlib.crc32(path.encode()) % 40 / 1000)
    ) as proxy:
        source, expected = pictures(proxy), images()
        order = source.order(5, 1)[:128]
        found, labels = zip(*WorkerPool(2).map(source.read, np.split(order, 4)), strict=True)
        arrived = [path for _, path in proxy.requests if path.endswith(".png")]
    assert len(set(arrived)) == 128
    np.testing.assert_array_equal(np.concatenate(found), expected.images[order])
    np.testing.assert_array_equal(np.concatenate(labels), expected.labels[order])


# -- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [500, 503, 429, "close", "truncate", "shorten", "alter", "hang"])
def test_a_fault_that_passes_is_survived(aws, fault):
    """The first two answers for one picture are wrong, or never come."""
    bad = "/cifar10/data/train/00003_"

    def twice(_, path, before):
        return fault if path.startswith(bad) and before < 2 else None

    silence = 1.0 if fault == "hang" else 20.0  # seconds
    with Proxy(aws.port, twice) as proxy:
        source = pictures(proxy, retry_timeout=20.0, n=8, read_timeout=silence)
        found, _ = source.read(np.arange(8))
        asked = sum(path.startswith(bad) for _, path in proxy.requests)
    # a slow machine may be silent for a second by itself
    assert asked == 3 or (asked > 3 and fault == "hang")
    np.testing.assert_array_equal(found, images().images[:8])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, "500 Internal Server Error"),
        (503, "503 Service Unavailable (SlowDown)"),
        (403, "403 Forbidden"),
        ("close", ""),
        ("truncate", ""),
        ("shorten", "bytes arrived instead of"),
        ("alter", "its checksum is wrong"),
    ],
)
def test_a_fault_that_stays_ends_with_the_object_and_the_endpoint(aws, monkeypatch, fault, reason):
    """The clock counts pauses alone: the number of attempts does not depend on the machine."""
    with Proxy(aws.port, lambda _, path, __: fault if "/train/00003_" in path else None) as proxy:
        source, pauses = pictures(proxy, retry_timeout=10.0, n=8), []
        monkeypatch.setattr(source.bucket.stopped, "wait", lambda pause: pauses.append(pause))
        monkeypatch.setattr(train_cifar.time, "monotonic", lambda: sum(pauses))
        with pytest.raises(LoadingError) as error:
            source.read(np.arange(8))
        asked = sum("/train/00003_" in path for _, path in proxy.requests)
    message = str(error.value)
    assert "s3://cifar10/data/train/00003_" in message
    assert proxy.url in message
    assert reason in message
    assert "\n" not in message
    assert len(message) < 250
    assert sum(pauses) <= 10
    assert asked == 1 if fault == 403 else 2 <= asked <= 8  # no use in asking again; bounded
    if fault in ("shorten", "alter"):
        assert asked == MAX_CHECKSUM_ERRORS == 3


def test_pauses_grow_and_vary(aws, monkeypatch):
    with Proxy(aws.port, lambda _, path, __: 503 if path.endswith(".png") else None) as proxy:
        source = pictures(proxy, retry_timeout=4.0, n=4)
        pauses = []
        monkeypatch.setattr(source.bucket.stopped, "wait", lambda pause: pauses.append(pause))
        monkeypatch.setattr(train_cifar.time, "monotonic", lambda: sum(pauses) / 4)
        client = source.bucket.connect()
        with ThreadPoolExecutor(4) as pool:  # to the end of all four, however they take turns
            ends = [pool.submit(source.bucket.fetch, client, entry) for entry in source.entries]
    assert all(isinstance(end.exception(), LoadingError) for end in ends)
    assert len(set(pauses)) == len(pauses) > 8
    assert max(pauses) > 4 * min(pauses)
    assert max(pauses) <= 5


def test_a_shard_that_is_altered_is_fetched_again(aws):
    with Proxy(
        aws.port,
        lambda _, path, before: "alter" if path.endswith("00.bin") and not before else None,
    ) as proxy:
        np.testing.assert_array_equal(shards(proxy).read(np.arange(10))[0], images().images[:10])


def test_a_picture_that_cannot_be_decoded_is_named(aws):
    """Garbage that arrives as it was stored."""
    bucket = Bucket("s3://cifar10/garbage")
    entry = put_object(bucket.connect(), bucket.retry, {}, ("train/00000_1.png", b"no picture", 1))
    with pytest.raises(
        LoadingError,
        match=r"s3://cifar10/garbage/train/00000_1\.png at http://\S+ cannot be decoded",
    ):
        S3Pictures(bucket, [entry]).read(np.array([0]))


def test_a_damaged_manifest_is_not_used(aws):
    with Proxy(
        aws.port, lambda _, path, __: "alter" if path.endswith("manifest.json") else None
    ) as proxy:
        with pytest.raises(LoadingError, match=r"manifest\.json at .* damaged"):
            Bucket("s3://cifar10/data", proxy.url).manifest()


def test_shard_with_other_contents_than_the_manifest_says(aws):
    bucket = Bucket("s3://cifar10/garbage")
    for data, images_in in ((bytes(RECORD_BYTES), 2), (b"\x0b" * RECORD_BYTES, 1)):
        entry = put_object(bucket.connect(), bucket.retry, {}, ("s.bin", data, images_in))
        with pytest.raises(LoadingError, match="labels up to 9"):
            S3Shards(bucket, [entry], np.zeros(1, np.uint8)).read(np.array([0]))


def test_entry_is_checked_against_the_manifest():
    entry = ManifestEntry(
        "x", 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", 1
    )  # of "abc", FIPS 180-2
    train_cifar.verify(entry, b"abc")
    for data, words in ((b"ab", "2 bytes"), (b"abcd", "4 bytes"), (b"abd", "checksum")):
        with pytest.raises(ChecksumError, match=words):
            train_cifar.verify(entry, data)


# -- as users meet it ----------------------------------------------------------------------------


KEY = "[default]\naws_access_key_id = somebody\naws_secret_access_key = notsecret12345\n"
NO_FILE = {"AWS_SHARED_CREDENTIALS_FILE": "nowhere", "AWS_EC2_METADATA_DISABLED": "true"}


@pytest.mark.parametrize(
    ("source", "change", "words"),
    [
        (
            "s3://cifar10/data",
            {"AWS_SHARED_CREDENTIALS_FILE": "wrong"},
            "403 Forbidden (InvalidAccessKeyId)",
        ),
        ("s3://cifar10/data", NO_FILE, "no credentials"),
        ("s3://no-such-bucket/data", {}, "404 Not Found (NoSuchBucket)"),
        ("s3://cifar10/no-such-prefix", {}, "404 Not Found (NoSuchKey)"),
        (
            "s3://cifar10/data",
            {"AWS_PROFILE": "nobody"},
            "The config profile (nobody) could not be found",
        ),
        ("s3://Cifar", {}, "not of the form s3://bucket/prefix"),
        ("somewhere", {}, "--source somewhere"),
    ],
)
def test_bad_input_is_one_line(run_here, monkeypatch, source, change, words):
    Path("wrong").write_text(KEY)
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    line = refused(train_cifar.main, "--source", source, *TINY, "--retry-seconds", 5)
    assert words in line
    assert "\n" not in line
    assert "notsecret12345" not in line
    assert not Path("results").exists()


def test_a_server_that_never_answers(server, run_script, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    source = ("--source", "s3://cifar10/data", "--endpoint-url", url, "--retry-seconds", 1)
    done = run_script("train_cifar.py", *source, *TINY, env=server.env, status=1)
    assert_one_error_line(done.stderr)
    assert "Connection refused" in done.stderr
    assert f"s3://cifar10/data/manifest.json at {url}" in done.stderr


STREAM = ("--source", "s3://cifar10/data", "--s3-mode", "stream")
CNN = (*TINY, "--epochs", 2, "--checkpoint", "run.pt")


def read_weights(folder):
    return torch.load(folder / "run.pt", weights_only=True)["model"]


def assert_same_weights(folder, reference):
    ours, theirs = read_weights(folder), read_weights(reference)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The folder of an uninterrupted training on the same images from memory."""
    folder = tmp_path_factory.mktemp("reference")
    finish(start(folder, "train_cifar.py", *CNN, "--dataset", "synthetic"))
    return folder


@pytest.mark.slow
def test_training_survives_an_outage_with_the_same_weights(server, tmp_path, reference):
    """The server is absent at the start, comes, dies in mid-epoch, and comes back."""
    port = free_port()
    options = ("--endpoint-url", f"http://127.0.0.1:{port}", "--workers", 1)
    process = start(
        tmp_path, "train_cifar.py", *CNN, *STREAM, *options, "--retry-seconds", 60, env=server.env
    )
    time.sleep(3)  # it asks in vain
    served = threading.Event()

    def fault(_, path, __):
        time.sleep(0.02)
        if sum(p.endswith(".png") for _, p in proxy.requests) > 100:
            served.set()
        return "close" if served.is_set() else None

    with Proxy(server.port, fault, port) as proxy:
        wait_until(process, served.is_set)
    time.sleep(1)  # now nobody listens at all
    with Proxy(server.port, own_port=port):
        finish(process)
    assert_same_weights(tmp_path, reference)


@pytest.mark.slow
def test_an_outage_too_long_leaves_a_checkpoint_to_resume_from(server, tmp_path, reference):
    def fault(*_):
        return 503 if sum(path.endswith(".png") for _, path in proxy.requests) > 200 else None

    with Proxy(server.port, fault) as proxy:
        options = ("--endpoint-url", proxy.url, "--retry-seconds", 5)
        process = start(tmp_path, "train_cifar.py", *CNN, *STREAM, *options, env=server.env)
        _, stderr = finish(process, status=1)
    assert_one_error_line(stderr)
    assert "503 Service Unavailable" in stderr
    assert "--resume" in stderr
    metadata = json.loads((tmp_path / "results/train_cifar.json").read_text())
    assert metadata["status"].startswith("failed")
    finish(start(tmp_path, "train_cifar.py", *CNN, *STREAM, "--resume", env=server.env))
    assert_same_weights(tmp_path, reference)


@pytest.mark.slow
def test_ctrl_c_while_the_server_is_silent(server, tmp_path):
    def slow(_, path, __):
        return ("wait", 3) if path.endswith(".png") else None

    with Proxy(server.port, slow) as proxy:
        options = (*STREAM, "--endpoint-url", proxy.url)
        process = start(tmp_path, "train_cifar.py", *CNN, *options, env=server.env)
        wait_until(process, lambda: any(path.endswith(".png") for _, path in proxy.requests))
        process.send_signal(signal.SIGINT)
        _, stderr = finish(process, status=130)
    assert "interrupted by SIGINT" in stderr
    assert (tmp_path / "run.pt").exists()


@pytest.mark.parametrize("mode", ["download", "stream", "shards"])
def test_log_of_a_training_from_s3(server, run_here, mode):
    run_here(*TINY, "--epochs", 1, "--source", "s3://cifar10/data", "--s3-mode", mode)
    rows = read_log(Path("results/train_cifar.csv"))
    fetched = rows[:2] if mode == "download" else []
    expected = [("10", "0", "96"), ("11", "0", "19")][: len(fetched)]
    assert [(row["type"], row["epoch"], row["value1"]) for row in fetched] == expected
    assert all(0 < float(row["loading"]) <= float(row["duration"]) for row in fetched)
    assert [row["type"] for row in rows[len(fetched) :]] == ["2"] * 6 + ["0", "1"]
    metadata = Path("results/train_cifar.json").read_text()
    assert json.loads(metadata)["dataset"] == "synthetic"
    secret = (server.folder / "s3/credentials").read_text().split()[-1]
    assert len(secret) == 40
    assert secret not in metadata


def test_load_only_measures_without_training(run_here, capsys):
    run_here("--load-only", "--epochs", 2, "--batch-size", 32, "--subset", 96, *STREAM)
    out = capsys.readouterr().out
    assert "192 images loaded" in out
    assert "epoch 2: 96 images in " in out
    rows = read_log(Path("results/train_cifar.csv"))
    assert "".join(row["type"] for row in rows) == "22202220"
    assert "".join(row["epoch"] for row in rows) == "11112222"
    for row in rows:
        assert 0 < float(row["loading"]) <= float(row["duration"])
        assert row["loss"] == ""
    assert {row["value1"] for row in rows if row["type"] == "0"} == {""}
    rate = 96 / float(rows[3]["duration"])
    assert float(rows[3]["images_per_s"]) == pytest.approx(rate, rel=1e-4)


def test_cache_spares_the_server_and_is_verified(aws, tmp_path):
    with Proxy(aws.port) as proxy:
        expected = shards(proxy, cache_dir=tmp_path).read(np.arange(N))[0]
        asked = len(proxy.requests)
        np.testing.assert_array_equal(
            shards(proxy, cache_dir=tmp_path).read(np.arange(N))[0], expected
        )
        assert len(proxy.requests) == asked + 1  # the manifest
        first = sorted(tmp_path.iterdir())[0]
        first.write_bytes(first.read_bytes()[:-1] + b"?")
        np.testing.assert_array_equal(
            shards(proxy, cache_dir=tmp_path).read(np.arange(N))[0], expected
        )
        assert len(proxy.requests) == asked + 3
    assert len(list(tmp_path.iterdir())) == -(-N // SHARD)


def test_an_export_goes_on_where_it_broke_off(aws):
    """After 60 objects the server refuses; the second time only the others are put.

    So is an object that was altered. An object that is still being retried when others are refused
    is not named as the reason.
    """
    options = ["--dataset", "synthetic", "--subset", "100", "--quiet", "--retry-seconds", "60"]

    def put(fault):
        with Proxy(aws.port, fault) as proxy:
            try:
                train_cifar.main(
                    ["--export", "s3://cifar10/parts", "--endpoint-url", proxy.url, *options]
                )
            finally:
                paths = {path for method, path in proxy.requests if method == "PUT"}
        return paths

    count = itertools.count(1)  # next() is one step, whatever the threads do

    def refuse(method, path, _):
        if method == "PUT" and "/00002_" in path:
            return 503
        return 403 if method == "PUT" and next(count) > 60 else None

    with pytest.raises(LoadingError, match="403 Forbidden"):
        put(refuse)
    bucket = Bucket("s3://cifar10/parts")
    with pytest.raises(InputError, match="404"):
        bucket.manifest()  # an export that broke off cannot be taken for a whole one
    present = set(list_objects(bucket.connect()))
    assert len(present) >= 45
    victim = sorted(present)[5]
    obstore.put(bucket.connect(), victim, b"?" * list_objects(bucket.connect())[victim][0])
    second = put(lambda *_: None)
    assert second == {
        f"/cifar10/parts/{key}" for key in set(list_objects(bucket.connect())) - present | {victim}
    }
    assert put(lambda *_: None) == {"/cifar10/parts/manifest.json"}
    assert len(bucket.manifest()["train"]) == 100


# -- s3_server.py --------------------------------------------------------------------------------


def test_server_is_private(server):
    """On loopback only; the key is the owner's alone and on no command line."""
    credentials = server.folder / "s3/credentials"
    assert stat.S_IMODE(credentials.stat().st_mode) == 0o600
    secret = credentials.read_text().split()[-1]
    (rclone,) = psutil.Process(server.process.pid).children()
    assert secret not in " ".join(rclone.cmdline())
    listening = [c.laddr for c in rclone.net_connections() if c.status == psutil.CONN_LISTEN]
    assert [(a.ip, a.port) for a in listening] == [("127.0.0.1", server.port)]


def test_command_runs_beside_the_server_and_gives_its_status(tmp_path):
    code = "import os, sys; print(open(os.environ['AWS_CONFIG_FILE']).read()); sys.exit(7)"
    process = start(tmp_path, S3_SERVER, sys.executable, "-c", code)
    out, _ = finish(process, status=7)
    port = int(out.strip().rpartition(":")[2])
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


@pytest.mark.slow
def test_ctrl_c_reaches_the_command_which_ends_in_its_own_time(tmp_path):
    code = """import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), print("saved"), sys.exit(130)))
print("ready", flush=True)
time.sleep(60)"""
    process = start(tmp_path, S3_SERVER, sys.executable, "-c", code)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = finish(process, status=130)
    assert out == "saved\n"
    assert err == ""


def test_ctrl_c_while_the_command_is_being_started_reaches_it(monkeypatch):
    class Popen(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(s3_server.subprocess, "Popen", Popen)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert s3_server.run_command(["sleep", "60"], None) == 128 + signal.SIGINT
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_a_second_command_uses_the_running_server(server):
    code = "import os; print(open(os.environ['AWS_CONFIG_FILE']).read())"
    out, _ = finish(start(server.folder, S3_SERVER, "--dir", "s3", sys.executable, "-c", code))
    assert out.strip().endswith(f":{server.port}")
    assert server.process.poll() is None


@pytest.mark.slow
def test_server_ends_with_its_folder_usable(tmp_path):
    with Server(tmp_path) as first:
        (rclone,) = psutil.Process(first.process.pid).children()
        key = (tmp_path / "s3/credentials").read_text()
    assert not rclone.is_running()
    with Server(tmp_path):
        assert (tmp_path / "s3/credentials").read_text() == key


def test_a_port_in_use_is_an_error(server, run_script):
    done = run_script(S3_SERVER, "--port", server.port, "true", status=2)
    assert_one_error_line(done.stderr)
    assert "in use" in done.stderr


@pytest.mark.slow
def test_make_s3_server_serves_until_ctrl_c(tmp_path):
    """The data first, then address and environment for clients; Ctrl-C ends script and server."""
    copy = shutil.copytree(
        REPO, tmp_path / "checkout", ignore=shutil.ignore_patterns(".*", "__*__", "data", "results")
    )
    command = [
        "make",
        f"PYTHON={sys.executable}",
        "s3-server",
        "S3_DATA=--subset 40 --dataset synthetic",
    ]
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=script_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("export AWS_"):
                break
        family = psutil.Process(process.pid).children(recursive=True)
        assert "40 training and 8 test images of synthetic are in s3://cifar10" in said
        assert "AWS_SHARED_CREDENTIALS_FILE=" in said
        assert any("rclone" in p.name() for p in family)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
    assert not psutil.wait_procs(family, timeout=10)[1]


@pytest.mark.slow
def test_make_s3_upload_puts_pictures_and_shards_where_it_is_told(server):
    def upload(*variables):
        return subprocess.run(
            [
                "make",
                f"PYTHON={sys.executable}",
                "s3-upload",
                "S3_DATA=--subset 40 --dataset synthetic",
                *variables,
            ],
            cwd=REPO,
            env=script_environment(**server.env),
            capture_output=True,
            text=True,
            timeout=60,
        )

    assert upload("TO=s3://cifar10/made").returncode == 0
    made = server.folder / "s3/buckets/cifar10/made"
    assert len(list(made.glob("**/*.png"))) == 48
    assert (made / "manifest.json").exists()
    assert "TO=s3://bucket/prefix" in upload().stderr
