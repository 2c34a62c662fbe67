# SPDX-License-Identifier: Apache-2.0
"""The first process in a sandbox: shuts itself in, then runs a driver. A script of the standard library alone.

Reads a JSON object from its standard input: `driver` (source text with a function `main(request, emit, worker)`),
`request` (what the driver works on), `limits`, `read_only` (paths to keep), `root` (an empty folder to live in, or
`None`), `uid` (whom to become, or `None`), `packages` (folders to import from). Writes a JSON line for each result.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys


MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
PR_SET_NO_NEW_PRIVS, PR_CAPBSET_DROP = 38, 24
CAPABILITY_VERSION_3 = 0x20080522


def emit(value):
    data = json.dumps(value).encode() + b"\n"
    while data:
        data = data[os.write(RESULTS, data) :]


def mount(source, target, kind, flags, options=None):
    names = [None if name is None else os.fsencode(name) for name in (source, target, kind)]
    if LIBC.mount(*names, flags, None if options is None else options.encode()):
        error = ctypes.get_errno()
        raise OSError(error, f"mounting {target}: {os.strerror(error)}")


def shut_in(root, read_only, disk_bytes):
    """Makes a file system in memory the root, with read-only views of `read_only` in it."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_bytes},mode=755")
    for path in read_only:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            open(target, "x").close()
        mount(path, target, None, MS_BIND)
        if not path.startswith("/dev/"):
            # What the file system's owner has locked, such as `nosuid`, has to be said again.
            locked = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | os.ST_NOEXEC)
            mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | locked)
    # For want of /proc only a path can lead to what a driver makes a program's input.
    os.symlink("/work/stdin", root + "/dev/stdin")
    os.chroot(root)


def close_root(writable):
    """Makes that file system read-only, too, but for the folders `writable`: whoever isn't root outside owns it."""
    for folder in writable:
        mount(folder, folder, None, MS_BIND)
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def give_up_privileges(uid):
    if uid is not None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    for capability in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header, nothing = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    LIBC.capset(header, nothing)
    LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def limit(name, value):
    hard = resource.getrlimit(name)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(name, (value, value))


def worker(work, seconds):
    """Runs `work` in a process of its own and ends whatever that leaves behind; returns how it ended.

    Returns:
        `int`: exit status, or the negative number of the signal that killed it.
    """
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0)
        limit(resource.RLIMIT_CPU, int(seconds) + 1)
        limit(resource.RLIMIT_AS, LIMITS["memory_bytes"])
        work()
        sys.exit()
    status = None
    while status is None:
        ended, code = os.waitpid(-1, 0)
        status = code if ended == pid else None
    if os.getpid() == 1:
        # The whole namespace but this process: nothing of one run is there in the next.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(-1, signal.SIGKILL)
            while True:
                os.waitpid(-1, 0)
    return os.waitstatus_to_exitcode(status)


def main():
    try:
        if TOLD["root"] is not None:
            shut_in(TOLD["root"], TOLD["read_only"], LIMITS["disk_bytes"])
        if TOLD["uid"] is not None or TOLD["root"] is not None:
            for folder in ("/work", "/tmp"):
                os.makedirs(folder, exist_ok=True)
                os.chmod(folder, 0o777)
            if TOLD["root"] is not None:
                close_root(("/work", "/tmp"))
            os.chdir("/work")
            give_up_privileges(TOLD["uid"])
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_NOFILE, 64)
        limit(resource.RLIMIT_FSIZE, LIMITS["disk_bytes"])
        if hasattr(resource, "RLIMIT_NPROC") and os.getpid() == 1:
            # The `unshare` that waits for this process is in the same user namespace, if one was made.
            num_waiting = TOLD["root"] is not None and TOLD["uid"] is None
            limit(resource.RLIMIT_NPROC, LIMITS["num_processes"] + num_waiting)
    except OSError as error:
        emit({"failed": str(error)})
        return
    # If the grader is killed, nobody ends this process from outside.
    signal.setitimer(signal.ITIMER_REAL, LIMITS["total_seconds"])
    emit({"ready": True})
    driver = {}
    exec(compile(TOLD["driver"], "driver", "exec"), driver)
    driver["main"](TOLD["request"], emit, worker)


if __name__ == "__main__":
    with open(0, "rb", closefd=False) as file:
        TOLD = json.loads(file.read())
    LIMITS = TOLD["limits"]
    RESULTS, LIBC = os.dup(1), ctypes.CDLL(None, use_errno=True)
    sys.path = [path for path in sys.path[1:] if path] + TOLD["packages"]
    main()
