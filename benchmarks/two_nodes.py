"""A Ray cluster of several nodes on this machine, which listens on the loopback address only."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from focuslib import __file__ as package

# `ray start` takes the machine's outer address for 127.0.0.1; the head's way round that is refused of further nodes
_START = """
import ray._private.services as services
services.resolve_ip_for_localhost = lambda host: host
from ray.scripts.scripts import main
main()
"""


class Nodes:
    """A head node and further ones, of one CPU each. folder: where Ray keeps its session; a short path."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.nodes: list[subprocess.Popen] = []
        root = str(Path(package).parents[1])
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([root, f"{root}/tests"]),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "token").write_text("of-these-tests-only-0123456789abcdef")
        os.environ.update({name: self.environment[name] for name in self.environment if name.startswith("RAY_")})

    def add(self, head: bool = False) -> int:
        """Start a node; returns its number."""
        as_head = ["--head", f"--port={self.port}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        where = as_head if head else [f"--address={self.address}"]
        what = ["--num-cpus=1", "--object-store-memory=100000000"]
        command = ["start", *where, "--node-ip-address=127.0.0.1", "--disable-usage-stats", "--block", *what]
        environment = self.environment if head else {**self.environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
        log = self.folder / f"node{len(self.nodes)}.log"
        with log.open("w") as out:
            call = [sys.executable, "-c", _START, *command]
            self.nodes.append(subprocess.Popen(call, env=environment, stdout=out, stderr=out, start_new_session=True))
        while "Ray runtime started" not in log.read_text():
            if self.nodes[-1].poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        return len(self.nodes) - 1

    def kill(self, number: int) -> None:
        """End a node at once, with all its processes."""
        for process in descendants(self.nodes[number].pid):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.nodes[number].wait()

    def end(self) -> None:
        """End all nodes, and forget what they kept."""
        for number in reversed(range(len(self.nodes))):
            self.kill(number)
        shutil.rmtree(self.folder, ignore_errors=True)


def descendants(number: int) -> list[int]:
    """A process and all that it started, itself first."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [number]
    for process in found:
        found += children.get(process, [])
    return found
