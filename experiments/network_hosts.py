"""Hosts on one machine: network namespaces, joined by a switch, with links of limited rate.

Each host has an interface eth0 of its own, so that mpirun starts ranks on "several machines" and
their messages go through the kernel's TCP. tc's token bucket limits what each host sends. Needs
root, iproute2 and MPICH's mpirun.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common.py is at the top level
from common import TrainingError, find_mpirun

SUBNET = "10.77.0."
FRAME = 1514  # bytes of the largest Ethernet frame
BURST_SECONDS = 0.00025  # what a link that was idle sends at once, in seconds of its rate
QUEUE = "64mb"  # of a link: longer than TCP's windows, so that nothing is dropped

# MPICH's UCX would find out that the "hosts" share memory, and use that.
TCP_ONLY = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}

# mpirun calls this as it would call ssh: options, the host's address, a command.
LAUNCHER = """\
#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec ip netns exec PREFIX"${host##*.}" sh -c "$*"
"""


def run(*command):
    """Raises TrainingError with its message if the command fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise TrainingError(f"{shlex.join(map(str, command))}: {done.stderr.strip()}")


def why_not() -> str | None:
    """Why this machine cannot make such hosts; None if it can."""
    for tool in ("ip", "tc"):
        if not shutil.which(tool):
            return f"{tool} of iproute2 is not installed"
    if os.geteuid():
        return "only root may make network namespaces"
    try:
        with Hosts(2, 100):
            return None
    except TrainingError as error:
        return f"network namespaces or tc's token bucket are not allowed here ({error})"


class Hosts:
    """A context manager: `count` hosts whose links send `rate` Mbit/s each; None: unlimited."""

    def __init__(self, count: int, rate: float | None):
        self.count = count
        self.rate = rate
        self.prefix = f"cnn{os.getpid()}h"
        self.switch = f"cnn{os.getpid()}s"

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="hosts-")
        self.launcher = Path(self.folder.name) / "launcher"
        self.launcher.write_text(LAUNCHER.replace("PREFIX", self.prefix))
        self.launcher.chmod(0o755)
        try:
            run("ip", "netns", "add", self.switch)
            run("ip", "-n", self.switch, "link", "add", "switch", "type", "bridge")
            run("ip", "-n", self.switch, "link", "set", "switch", "up")
            for number in range(1, self.count + 1):
                self._add_host(number)
            self._wait_for_links()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _add_host(self, number):
        host = f"{self.prefix}{number}"
        port = f"port{number}"
        run("ip", "netns", "add", host)
        pair = ("type", "veth", "peer", "name", port, "netns", self.switch)
        run("ip", "-n", host, "link", "add", "eth0", *pair)
        run("ip", "-n", self.switch, "link", "set", port, "master", "switch", "up")
        run("ip", "-n", host, "link", "set", "lo", "up")
        run("ip", "-n", host, "address", "add", f"{SUBNET}{number}/24", "dev", "eth0")
        run("ip", "-n", host, "link", "set", "eth0", "up")
        if self.rate:
            burst = max(2 * FRAME, int(self.rate * 1e6 / 8 * BURST_SECONDS))
            limit = ("rate", f"{self.rate}mbit", "burst", burst, "limit", QUEUE)
            run("tc", "-n", host, "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)

    def _wait_for_links(self):
        """A link is up a moment after both its ends: MPI takes only interfaces that are up."""
        for number in range(1, self.count + 1):
            command = ["ip", "-n", f"{self.prefix}{number}", "link", "show", "eth0"]
            for _ in range(100):
                if "state UP" in subprocess.run(command, capture_output=True, text=True).stdout:
                    break
                time.sleep(0.05)
            else:
                raise TrainingError(f"the link of {self.prefix}{number} does not come up")

    def __exit__(self, *_):
        for name in (*(f"{self.prefix}{i}" for i in range(1, self.count + 1)), self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        self.folder.cleanup()

    def mpirun(self, command: list) -> list[str]:
        """The command line that runs `command` as one rank on each host."""
        addresses = ",".join(f"{SUBNET}{number}" for number in range(1, self.count + 1))
        launch = ["-launcher", "ssh", "-launcher-exec", self.launcher, "-hosts", addresses]
        start = [find_mpirun(), *launch, "-np", self.count, *command]
        return self.on_host(1, start)

    def on_host(self, number: int, command: list) -> list[str]:
        """The command line that runs `command` on one host."""
        words = ["ip", "netns", "exec", f"{self.prefix}{number}", *command]
        return [str(word) for word in words]


def start(command: list[str], folder: Path, **options) -> subprocess.Popen:
    """Start a command in a folder, with the environment for MPI between hosts."""
    env = {**os.environ, **TCP_ONLY}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen, timeout: float = 300) -> str:
    """Wait for it; returns its output. Raises TrainingError if it fails or takes too long."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise TrainingError(f"{shlex.join(process.args)}: no end within {timeout} s") from None
    finally:
        if process.poll() is None:
            process.kill()
    if process.returncode:
        raise TrainingError(f"{shlex.join(process.args)} failed: {output.strip()[-2000:]}")
    return output
