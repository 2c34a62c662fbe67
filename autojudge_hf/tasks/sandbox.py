# SPDX-License-Identifier: Apache-2.0
"""A place to run programs that a model wrote.

A program runs as another process, in namespaces of its own: it has no network, sees only its own processes and a file
system in memory with read-only views of Python and the system's libraries, an environment without secrets, and no
capabilities. CPU time, time on the clock, memory, processes, files and output are limited, and at the end everything
it started is killed. [bubblewrap](https://github.com/containers/bubblewrap) sets this up where it is installed, else
util-linux's `unshare`. Where neither may create namespaces, only the limits, the environment and the process group
are left, and a warning says so.

Not covered: holes in the kernel (there is no seccomp filter, and the kernel is shared); side channels such as time
and load; memory in sum, since the limit is one for each process; and on systems without namespaces the network, the
user's files, and processes that leave their group. Whoever grades programs of an adversary wants a virtual machine.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .task import stop_if_abandoned


logger = logging.getLogger(__name__)

INIT = Path(__file__).with_name("sandbox_init.py")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "TMPDIR": "/tmp", "PYTHONHASHSEED": "0"}
# numpy would start a thread for each core, on a large machine more than a program may have.
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
NAMESPACES = ("--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
STARTUP_SECONDS = 20.0
LONGEST_INTEGER = 50_000  # digits: a longer one would take too long to read
PROBE = "import random\ndef main(request, emit, worker): emit({'status': worker(lambda: None, 1)})"

#: A user of its own for every sandbox of root's, since limits on processes count per user: drawn from numbers that no
#: system gives away, since other processes grade, too.
UIDS = range(0x7000_0000, 0x8000_0000)
_looking = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        seconds (`float`, *optional*, defaults to 6.0): on the clock, for each result.
        memory_bytes (`int`, *optional*, defaults to 1 GiB): address space of each process.
        num_processes (`int`, *optional*, defaults to 16): processes and threads at a time, with the one that starts
            the program.
        disk_bytes (`int`, *optional*, defaults to 64 MiB): all files together; without namespaces, each file.
        output_bytes (`int`, *optional*, defaults to 16 MiB): of each result, and of the JSON it is passed on in.

    Raises:
        ValueError: for limits under which no program runs.
    """

    seconds: float = 6.0
    memory_bytes: int = 1 << 30
    num_processes: int = 16
    disk_bytes: int = 64 << 20
    output_bytes: int = 16 << 20

    def __post_init__(self):
        positive = min(self.seconds, self.memory_bytes, self.disk_bytes, self.output_bytes) > 0
        if self.num_processes < 2 or not positive:
            raise ValueError(f"Expected at least 2 processes, and more than 0 of everything else, got {self}.")


def run_isolated(
    driver: str, request: Any, num_results: int, limits: Limits | None = None
) -> Iterator[dict[str, Any]]:
    """Runs a driver in a sandbox, and yields what it emits, until it ends, is too slow, or the caller has seen enough.

    Args:
        driver (`str`):
            Python source, of the standard library alone, of a function `main(request, emit, worker)`: `emit(dict)`
            gives a result, `worker(function, seconds)` runs a function in a limited process and returns its exit
            status.
        request: anything JSON can say.
        num_results (`int`): how many results there can be at most.
        limits ([`Limits`], *optional*).

    Yields:
        `dict`: results; the last one is `{"error": reason}` if the program was stopped. Closing the iterator kills it.

    Raises:
        RuntimeError: if the sandbox can't be set up.
        CancelledError: before the next result, where nobody waits for this thread's answers any more.
    """
    with _looking:  # or the first programs of a batch would each look on their own
        mechanism = _mechanism()
    yield from _run(mechanism, driver, request, num_results, limits or Limits())


@functools.cache
def _mechanism() -> str:
    """The best way to isolate that works here."""
    failures = []
    for name in ("bwrap", "unshare"):
        if not sys.platform.startswith("linux") or shutil.which(name) is None:
            failures.append(f"{name} isn't installed")
            continue
        try:
            if [*_run(name, PROBE, None, 1, Limits())] == [{"status": 0}]:
                return name
            failures.append(f"{name} runs no program")
        except RuntimeError as error:
            failures.append(f"{name}: {error}")
    logger.warning(
        f"Programs can't be isolated here ({'; '.join(failures)}): network, files of this user and processes that "
        "leave their group stay within their reach. Install bubblewrap, allow user namespaces, or grade elsewhere."
    )
    return "limits"


def _read_only() -> list[str]:
    """What a Python without packages of its own reads, and where packages such as numpy are."""
    paths = ["/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", os.path.realpath(sys.base_prefix)]
    paths.append(sysconfig.get_paths()["purelib"])
    kept: list[str] = []
    for path in paths:
        covered = any(path == other or path.startswith(other + "/") for other in kept)
        if os.path.lexists(path) and not covered:
            kept.append(path)
    return kept


def _command(mechanism: str, limits: Limits, python: list[str]) -> list[str]:
    if mechanism == "unshare":
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        return [shutil.which("unshare"), *NAMESPACES, *user, *python]
    if mechanism == "bwrap":
        command = [shutil.which("bwrap"), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        command += ["--die-with-parent"]
        # Root becomes another user inside, which takes two capabilities; everybody else gets a user namespace.
        if os.geteuid() == 0:
            command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        command += ["--as-pid-1"]
        for writable in ("/work", "/tmp"):
            command += ["--size", str(limits.disk_bytes), "--tmpfs", writable, "--chmod", "0777", writable]
        for path in [*_read_only(), str(INIT)]:
            # What is made on the way to a path is its owner's alone by default, and root is another user inside.
            for parent in reversed(Path(path).parents[:-1]):
                command += ["--perms", "0755", "--dir", str(parent)]
            way = ["--symlink", os.readlink(path)] if os.path.islink(path) else ["--ro-bind", path]
            command += [*way, path]
        command += ["--perms", "0755", "--dir", "/dev", "--symlink", "/work/stdin", "/dev/stdin"]
        for device in DEVICES:
            command += ["--dev-bind", device, device]
        return [*command, "--remount-ro", "/", "--chdir", "/work", *python]
    return python


def _run(mechanism: str, driver: str, request: Any, num_results: int, limits: Limits) -> Iterator[dict[str, Any]]:
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    command = _command(mechanism, limits, [python, "-S", "-s", "-B", str(INIT)])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as stdin:
        told = {
            "driver": driver,
            "request": request,
            "limits": {**dataclasses.asdict(limits), "total_seconds": STARTUP_SECONDS + num_results * limits.seconds},
            "read_only": [*_read_only(), *DEVICES],
            "packages": [sysconfig.get_paths()["purelib"]],
            "root": folder if mechanism == "unshare" else None,
            "uid": secrets.choice(UIDS) if mechanism != "limits" and os.geteuid() == 0 else None,
        }
        stdin.write(json.dumps(told).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=ENVIRONMENT,
            start_new_session=True,
        )
        try:
            yield from _results(process, mechanism, limits)
        finally:
            # Killing the first process of a namespace kills all others in it.
            os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()


def parsed(text: str | bytes) -> Any:
    """As `json.loads` does, with integers past the interpreter's own limit on digits, which is the user's to set."""
    return json.loads(text, parse_int=_integer)


def _integer(text: str) -> int:
    if text.startswith("-"):
        return -_integer(text[1:])
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(text)} digits, where {LONGEST_INTEGER} are the most")
    if len(text) <= 640:  # the interpreter's limit can't be lower
        return int(text)
    half = len(text) // 2
    return _integer(text[:-half]) * 10**half + _integer(text[-half:])


def _results(process: subprocess.Popen, mechanism: str, limits: Limits) -> Iterator[dict[str, Any]]:
    lines = _lines(process.stdout.fileno(), limits.output_bytes)
    next(lines)
    line = lines.send(STARTUP_SECONDS)
    told = json.loads(line) if isinstance(line, bytes) else {"failed": line or "it ended at once"}
    if "ready" not in told:
        raise RuntimeError(f"The sandbox couldn't be set up with {mechanism}: {told['failed']}")
    while True:
        stop_if_abandoned()
        line = lines.send(limits.seconds)
        if line is None:
            return
        try:
            result = parsed(line) if isinstance(line, bytes) else {"error": line}
        except (ValueError, RecursionError):
            result = None
        yield result if isinstance(result, dict) else {"error": "wrote among the results"}
        if isinstance(line, str):
            return


def _lines(fd: int, max_bytes: int) -> Iterator[Any]:
    """Sent the seconds to wait, gives the next line, the reason why there is none (`str`), or `None` at the end."""
    buffered = b""
    seconds = yield None
    os.set_blocking(fd, False)
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while True:
            deadline = time.monotonic() + seconds
            while b"\n" not in buffered:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    yield "timed out"
                    return
                data = os.read(fd, 1 << 16)
                if not data:
                    yield None
                    return
                buffered += data
                if len(buffered) > max_bytes:
                    yield "too much output"
                    return
            line, _, buffered = buffered.partition(b"\n")
            seconds = yield line
