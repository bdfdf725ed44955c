"""train_cifar.py's S3 sources against a real server on loopback, and a proxy of our own that makes things go wrong."""

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

import numpy as np
import obstore
import psutil
import pytest
import s3_server
import torch
from helpers import (
    REPO,
    assert_one_error_line,
    finish,
    read_log,
    read_npz,
    script_environment,
    start,
    wait_until,
)

import train_cifar
from common import InputError, make_synthetic
from train_cifar import (
    AHEAD,
    Arrays,
    Bucket,
    Entry,
    Folder,
    Loader,
    LoadingError,
    S3Pictures,
    S3Shards,
)

N, SHARD = 300, 32  # images in the bucket, and in each of its shards
CPU = torch.device("cpu")
TINY = ("--model", "cnn", "--batch-size", 16, "--subset", 96, "--threads", 1)


HELD = []


def free_port():
    """A port where nobody listens, and nobody but our own servers will: a bound socket keeps it until the tests end."""
    HELD.append(socket.socket())
    HELD[-1].setsockopt(
        socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
    )  # as servers do, which may then listen there
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
        self.process = start(self.folder, "s3_server.py", "--dir", "s3", "--port", self.port)
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


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to the server, and does to each what fault(method, path, times asked before) says.

    A number is a status, ("wait", seconds) delays, "truncate" breaks the answer off after half of it, "shorten" sends
    half of it as if it were all, "alter" changes a byte, "close" closes the connection without an answer, "hang" waits
    until the client does; None passes.
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
        """The server's answer. It may hang up on a new connection under load, which is no fault of a test's making."""
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
    return Arrays(*make_synthetic(N)[:2])


def pictures(proxy=None, patience=5.0, n=N):
    bucket = Bucket("s3://cifar10/data", proxy and proxy.url, patience)
    return S3Pictures(bucket, bucket.manifest()["train"][:n])


def shards(proxy=None, n=N, **options):
    bucket = Bucket("s3://cifar10/data", proxy and proxy.url, 5.0)
    manifest = bucket.manifest()
    return S3Shards(
        bucket, manifest["train_shards"], train_cifar.labels_of(manifest["train"][:n]), **options
    )


def epoch(source, workers, seed=1, number=2, size=16):
    """All batches of an epoch as training gets them."""
    order = source.order(seed, number)
    draws = train_cifar.draw_augmentation(len(source.labels), seed, number)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return list(Loader(workers).batches(source, batches, draws, CPU))


def assert_equal_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for (x, y), (other_x, other_y) in zip(ours, theirs, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_source_gives_the_same_batches(aws, tmp_path, workers):
    """From memory, disk and S3, picture by picture and downloaded: same samples, order, augmentation, any workers."""
    reference = epoch(images(), 0)
    train_cifar.main(
        ["--export", str(tmp_path), "--dataset", "synthetic", "--subset", str(N), "--quiet"]
    )
    downloaded, fetched = train_cifar.download(shards(), Loader(workers))
    assert fetched[3] == N
    for source in (images(), Folder(tmp_path / "train"), pictures(), downloaded):
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
    """An epoch fetches each shard once and keeps at most KEPT_SHARDS, the next ones ahead of their use."""
    with Proxy(aws.port) as proxy:
        source = shards(proxy, readers=1)
        order = source.order(1, 1)
        for start in range(0, N, 10):
            source.read(order[start : start + 10])
            assert len(source._kept) <= train_cifar.KEPT_SHARDS < N // SHARD
        gets = [path for _, path in proxy.requests if path.endswith(".bin")]
    assert sorted(gets) == [f"/cifar10/data/train-shards/{s:02}.bin" for s in range(-(-N // SHARD))]


def test_loader_is_bounded_and_in_order():
    """Workers run ahead by AHEAD batches each, no more; slow batches hold back those after them."""
    started = []

    def make(i):
        started.append(i)
        time.sleep(0.02 if i % 3 == 0 else 0)
        return i

    results = Loader(2).run(make, range(40))
    assert next(results) == 0
    time.sleep(0.3)
    assert len(started) <= 2 * AHEAD
    assert [0, *results] == list(range(40))


def test_loader_passes_on_errors_and_stops():
    def make(i):
        if i == 3:
            raise LoadingError("no")
        return i

    results = Loader(2).run(make, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(LoadingError):
        next(results)


def test_loader_asks_whether_to_go_on_waiting():
    """What waiting() raises ends the wait: so Ctrl-C works while a server is silent."""
    silence = threading.Event()

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(Loader(1).run(lambda i: silence.wait(20), [0], waiting=stop))
    silence.set()


def test_each_worker_has_a_client_of_its_own(aws, monkeypatch):
    made, connect = [], Bucket.connect
    monkeypatch.setattr(
        Bucket, "connect", lambda b: made.append(threading.get_ident()) or connect(b)
    )
    source = pictures()
    made.clear()
    barrier = threading.Barrier(2)  # so that both workers take part
    list(Loader(2).run(lambda i: (barrier.wait(20), source.read(np.array([i]))), range(6)))
    assert len(made) == len(set(made)) == 2


def test_images_keep_their_labels_whatever_arrives_first(aws):
    """Delays that depend on the name shuffle the answers."""
    with Proxy(
        aws.port, lambda _, path, __: ("wait", zlib.crc32(path.encode()) % 40 / 1000)
    ) as proxy:
        source, expected = pictures(proxy), images()
        order = source.order(5, 1)[:128]
        found, labels = zip(*Loader(2).run(source.read, np.split(order, 4)), strict=True)
        arrived = [path for _, path in proxy.requests if path.endswith(".png")]
    assert len(set(arrived)) == 128
    np.testing.assert_array_equal(np.concatenate(found), expected.images[order])
    np.testing.assert_array_equal(np.concatenate(labels), expected.labels[order])


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [500, 503, 429, "close", "truncate", "shorten", "alter", "hang"])
def test_a_fault_that_passes_is_survived(aws, fault):
    """The first two answers for one picture are wrong, or never come."""
    bad = "/cifar10/data/train/00003_"
    with Proxy(
        aws.port, lambda _, path, before: fault if path.startswith(bad) and before < 2 else None
    ) as proxy:
        source = pictures(proxy, patience=20.0, n=8)
        if fault == "hang":
            source.bucket.timeout = 1.0  # seconds of silence
        found, _ = source.read(np.arange(8))
        asked = sum(path.startswith(bad) for _, path in proxy.requests)
    assert asked == 3 or (
        asked > 3 and fault == "hang"
    )  # a slow machine may be silent for a second by itself
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
    """The clock tells the pauses alone: so the number of attempts does not depend on the speed of the machine."""
    with Proxy(aws.port, lambda _, path, __: fault if "/train/00003_" in path else None) as proxy:
        source, pauses = pictures(proxy, patience=10.0, n=8), []
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
        assert asked == 3


def test_pauses_grow_and_vary(aws, monkeypatch):
    with Proxy(aws.port, lambda _, path, __: 503 if path.endswith(".png") else None) as proxy:
        source = pictures(proxy, patience=4.0, n=4)
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
    entry = train_cifar.put_object(
        bucket.connect(), bucket.retry, {}, ("train/00000_1.png", b"no picture", 1)
    )
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
    for data, images_in in ((bytes(train_cifar.RECORD), 2), (b"\x0b" * train_cifar.RECORD, 1)):
        entry = train_cifar.put_object(
            bucket.connect(), bucket.retry, {}, ("s.bin", data, images_in)
        )
        with pytest.raises(LoadingError, match="labels up to 9"):
            S3Shards(bucket, [entry], np.zeros(1, np.uint8)).read(np.array([0]))


def test_entry_is_checked_against_the_manifest():
    entry = Entry(
        "x", 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", 1
    )  # of "abc", FIPS 180-2
    train_cifar.check(entry, b"abc")
    for data, words in ((b"ab", "2 bytes"), (b"abcd", "4 bytes"), (b"abd", "checksum")):
        with pytest.raises(train_cifar.Damaged, match=words):
            train_cifar.check(entry, data)


# -- as users meet it --------------------------------------------------------------------------------------------------


def bad_key(tmp_path):
    (tmp_path / "wrong").write_text(
        "[default]\naws_access_key_id = somebody\naws_secret_access_key = notsecret12345\n"
    )
    return {"AWS_SHARED_CREDENTIALS_FILE": tmp_path / "wrong"}


@pytest.mark.parametrize(
    ("source", "change", "words"),
    [
        ("s3://cifar10/data", bad_key, "403 Forbidden (InvalidAccessKeyId)"),
        (
            "s3://cifar10/data",
            lambda _: {
                "AWS_SHARED_CREDENTIALS_FILE": "nowhere",
                "AWS_EC2_METADATA_DISABLED": "true",
            },
            "no credentials",
        ),
        ("s3://no-such-bucket/data", None, "404 Not Found (NoSuchBucket)"),
        ("s3://cifar10/no-such-prefix", None, "404 Not Found (NoSuchKey)"),
        (
            "s3://cifar10/data",
            lambda _: {"AWS_PROFILE": "nobody"},
            "The config profile (nobody) could not be found",
        ),
        ("s3://Cifar", None, "not of the form s3://bucket/prefix"),
        ("somewhere", None, "--source somewhere"),
    ],
)
def test_bad_input_is_one_line(server, run_script, tmp_path, source, change, words):
    env = {**server.env, **(change(tmp_path) if change else {})}
    done = run_script(
        "train_cifar.py", "--source", source, *TINY, "--retry-seconds", 5, env=env, status=2
    )
    assert_one_error_line(done.stderr)
    assert words in done.stderr
    assert "notsecret12345" not in done.stderr
    assert not (tmp_path / "results").exists()


def test_a_server_that_never_answers(server, run_script, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    done = run_script(
        "train_cifar.py",
        "--source",
        "s3://cifar10/data",
        "--endpoint-url",
        url,
        *TINY,
        "--retry-seconds",
        1,
        env=server.env,
        status=1,
    )
    assert_one_error_line(done.stderr)
    assert "Connection refused" in done.stderr
    assert f"s3://cifar10/data/manifest.json at {url}" in done.stderr


def run_cnn(folder, *options, env=None):
    command = [
        sys.executable,
        REPO / "train_cifar.py",
        *TINY,
        "--epochs",
        2,
        "--checkpoint",
        "run.npz",
        *options,
    ]
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=script_environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return read_npz(folder / "run.npz")["params"]


def test_training_survives_an_outage_with_the_same_weights(server, tmp_path):
    """The server is absent at the start, comes, dies in mid-epoch, comes back; the weights are those from memory."""
    (tmp_path / "memory").mkdir()
    expected = run_cnn(tmp_path / "memory", "--dataset", "synthetic")
    port = free_port()
    options = (
        "--source",
        "s3://cifar10/data",
        "--s3-mode",
        "stream",
        "--endpoint-url",
        f"http://127.0.0.1:{port}",
    )
    process = start(
        tmp_path,
        "train_cifar.py",
        *TINY,
        "--epochs",
        2,
        "--checkpoint",
        "run.npz",
        *options,
        "--workers",
        1,
        "--retry-seconds",
        60,
        env=server.env,
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
    assert read_npz(tmp_path / "run.npz")["params"].tobytes() == expected.tobytes()


def test_an_outage_too_long_leaves_a_checkpoint_to_resume_from(server, tmp_path):
    whole, options = tmp_path / "whole", ("--source", "s3://cifar10/data", "--s3-mode", "stream")
    whole.mkdir()
    expected = run_cnn(whole, *options, env=server.env)

    def fault(*_):
        return 503 if sum(path.endswith(".png") for _, path in proxy.requests) > 200 else None

    with Proxy(server.port, fault) as proxy:
        process = start(
            tmp_path,
            "train_cifar.py",
            *TINY,
            "--epochs",
            2,
            "--checkpoint",
            "run.npz",
            *options,
            "--endpoint-url",
            proxy.url,
            "--retry-seconds",
            5,
            env=server.env,
        )
        _, stderr = finish(process, status=1)
    assert_one_error_line(stderr)
    assert "503 Service Unavailable" in stderr
    assert "--resume" in stderr
    assert json.loads((tmp_path / "results/train_cifar.json").read_text())["status"].startswith(
        "failed"
    )
    assert run_cnn(tmp_path, *options, "--resume", env=server.env).tobytes() == expected.tobytes()


def test_ctrl_c_while_the_server_is_silent(server, tmp_path):
    with Proxy(
        server.port, lambda _, path, __: ("wait", 3) if path.endswith(".png") else None
    ) as proxy:
        source = (
            "--source",
            "s3://cifar10/data",
            "--s3-mode",
            "stream",
            "--endpoint-url",
            proxy.url,
        )
        process = start(
            tmp_path, "train_cifar.py", *TINY, *source, "--checkpoint", "run.npz", env=server.env
        )
        wait_until(process, lambda: any(path.endswith(".png") for _, path in proxy.requests))
        process.send_signal(signal.SIGINT)
        _, stderr = finish(process, status=130)
    assert "interrupted by SIGINT" in stderr
    assert (tmp_path / "run.npz").exists()


@pytest.mark.parametrize("mode", ["download", "stream", "shards"])
def test_log_of_a_training_from_s3(server, run_script, tmp_path, mode):
    run_script(
        "train_cifar.py",
        *TINY,
        "--epochs",
        1,
        "--source",
        "s3://cifar10/data",
        "--s3-mode",
        mode,
        env=server.env,
    )
    rows = read_log(tmp_path / "results/train_cifar.csv")
    fetched = rows[:2] if mode == "download" else []
    assert [(row["type"], row["epoch"], row["value1"]) for row in fetched] == [
        ("10", "0", "96"),
        ("11", "0", "19"),
    ][: len(fetched)]
    assert all(0 < float(row["loading"]) <= float(row["duration"]) for row in fetched)
    assert [row["type"] for row in rows[len(fetched) :]] == ["2"] * 6 + ["0", "1"]
    sidecar = (tmp_path / "results/train_cifar.json").read_text()
    assert json.loads(sidecar)["dataset"] == "synthetic"
    secret = (server.folder / "s3/credentials").read_text().split()[-1]
    assert len(secret) == 40
    assert secret not in sidecar


def test_load_only_measures_without_training(server, run_script, tmp_path):
    done = run_script(
        "train_cifar.py",
        "--load-only",
        "--epochs",
        2,
        "--batch-size",
        32,
        "--subset",
        96,
        "--source",
        "s3://cifar10/data",
        "--s3-mode",
        "stream",
        env=server.env,
    )
    assert "192 images loaded" in done.stdout
    rows = read_log(tmp_path / "results/train_cifar.csv")
    assert "".join(row["type"] for row in rows) == "22202220"
    assert "".join(row["epoch"] for row in rows) == "11112222"
    for row in rows:
        assert 0 < float(row["loading"]) <= float(row["duration"])
        assert row["loss"] == ""
    assert {row["value1"] for row in rows if row["type"] == "0"} == {""}
    assert float(rows[3]["images_per_s"]) == pytest.approx(
        96 / float(rows[3]["duration"]), rel=1e-4
    )


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
    """After 60 objects the server refuses; the second time only the others are put, and what is altered.

    An object that is still being repeated then, and comes before the refused ones, is not named as the reason.
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
    present = set(train_cifar.list_objects(bucket.connect()))
    assert len(present) >= 45
    victim = sorted(present)[5]
    obstore.put(
        bucket.connect(), victim, b"?" * train_cifar.list_objects(bucket.connect())[victim][0]
    )
    second = put(lambda *_: None)
    assert second == {
        f"/cifar10/parts/{key}"
        for key in set(train_cifar.list_objects(bucket.connect())) - present | {victim}
    }
    assert put(lambda *_: None) == {"/cifar10/parts/manifest.json"}
    assert len(bucket.manifest()["train"]) == 100


# -- s3_server.py ------------------------------------------------------------------------------------------------------


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
    process = start(tmp_path, "s3_server.py", sys.executable, "-c", code)
    out, _ = finish(process, status=7)
    port = int(out.strip().rpartition(":")[2])
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_ctrl_c_reaches_the_command_which_ends_in_its_own_time(tmp_path):
    code = """import signal, sys, time
signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), print("saved"), sys.exit(130)))
print("ready", flush=True)
time.sleep(60)"""
    process = start(tmp_path, "s3_server.py", sys.executable, "-c", code)
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


def test_a_second_command_uses_the_running_server(server):
    code = "import os; print(open(os.environ['AWS_CONFIG_FILE']).read())"
    out, _ = finish(start(server.folder, "s3_server.py", "--dir", "s3", sys.executable, "-c", code))
    assert out.strip().endswith(f":{server.port}")
    assert server.process.poll() is None


def test_server_ends_with_its_folder_usable(tmp_path):
    with Server(tmp_path) as first:
        (rclone,) = psutil.Process(first.process.pid).children()
        key = (tmp_path / "s3/credentials").read_text()
    assert not rclone.is_running()
    with Server(tmp_path):
        assert (tmp_path / "s3/credentials").read_text() == key


def test_a_port_in_use_is_an_error(server, run_script):
    done = run_script("s3_server.py", "--port", server.port, "true", status=2)
    assert_one_error_line(done.stderr)
    assert "in use" in done.stderr


def test_make_s3_server_serves_until_ctrl_c(tmp_path):
    """The data first, then the address and the environment for clients; Ctrl-C ends make, script and server."""
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
