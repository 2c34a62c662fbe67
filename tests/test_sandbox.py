# SPDX-License-Identifier: Apache-2.0
"""Attacks on the sandbox: each is contained, the grader goes on, and nothing is left behind."""

import functools
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autojudge_hf.tasks import LiveCodeBench, sandbox
from autojudge_hf.tasks.livecodebench import DRIVER
from autojudge_hf.tasks.sandbox import Limits, run_isolated


LIMITS = Limits(seconds=1.5, memory_bytes=512 << 20, disk_bytes=8 << 20, output_bytes=1 << 20)
TASK = LiveCodeBench(limits=LIMITS)
SUM = {"public_test_cases": json.dumps([{"input": "3 4\n", "output": "7\n"}] * 2)}
ADD = {
    "public_test_cases": json.dumps([{"input": "3\n4", "output": "7"}, {"input": "1\n1", "output": "2"}]),
    "metadata": '{"func_name": "add"}',
}
SOLUTION = "a, b = map(int, input().split())\nprint(a + b)\n"

isolated = pytest.mark.skipif(
    sandbox._mechanism() == "limits", reason="neither bubblewrap nor unshare may create namespaces here"
)


def skip_unless_it_creates_namespaces(name):
    """Asked of the program itself, so that nothing is skipped because of a mistake of ours."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    options = {
        "unshare": [*user, "--mount", "--net", "--pid", "--fork"],
        "bwrap": ["--unshare-net", "--unshare-pid", "--ro-bind", "/", "/"],
    }
    if shutil.which(name) is None:
        pytest.skip(f"{name} isn't installed")
    if subprocess.run([name, *options[name], "true"], capture_output=True).returncode != 0:
        pytest.skip(f"{name} may create no namespaces here")


def test_isolates_where_the_system_can():
    skip_unless_it_creates_namespaces("unshare")
    assert sandbox._mechanism() in ("bwrap", "unshare")


def programs(script):
    """Processes that run `script`, the first one in each sandbox of this test, by their command lines."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(script) in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:  # it has just ended
            pass
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path_factory):
    folders, script = tmp_path_factory.mktemp("sandboxes"), tmp_path_factory.mktemp("script") / "init.py"
    shutil.copy(sandbox.INIT, script)  # a name of its own, since other tests may run programs at the same time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folders))
        patch.setattr(sandbox, "INIT", script)
        yield
    deadline = time.monotonic() + 5
    while programs(script) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert programs(script) == []
    assert list(folders.iterdir()) == []
    assert TASK.report(SUM, SOLUTION)["passed"], "the grader is harmed"


@pytest.fixture(params=["unshare", "bwrap", "limits"])
def mechanism(request, monkeypatch):
    if request.param != "limits":
        skip_unless_it_creates_namespaces(request.param)
    monkeypatch.setattr(sandbox, "_mechanism", lambda: request.param)
    return request.param


def printed(code, limits=LIMITS):
    """What a program prints, and why it was stopped, if so."""
    request = {"code": code, "function": None, "inputs": [""], "seconds": 5, "output_bytes": limits.output_bytes}
    (result,) = run_isolated(DRIVER, request, 1, limits)
    return result.get("stdout"), result.get("error")


def test_programs_run(mechanism):
    assert TASK.report(SUM, SOLUTION) == {"passed": True, "results": [True, True], "reason": ""}
    by_path = SOLUTION.replace("input()", "open('/dev/stdin').read()")
    assert TASK.report(SUM, by_path) == {"passed": True, "results": [True, True], "reason": ""}
    assert TASK.report(ADD, "def add(a, b):\n    return a + b")["passed"]
    assert not TASK.report(ADD, "def add(a, b):\n    return a - b")["passed"]


ATTACKS = {
    "infinite loop": "while True: pass",
    "fork bomb": "import os\nwhile True: os.fork()",
    "100 GB": "x = bytearray(100 << 30)",
    "10 GB of output": "while True: print('x' * 1000000)",
    "10 GB of output past the interpreter": "import os\nwhile True: os.write(1, b'x' * 1000000)",
    "a full disk": "for i in range(100): open(f'file-{i}', 'w').write('x' * 1000000)",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "kills everything": "import os, signal\nos.kill(-1, signal.SIGKILL)\nos.killpg(0, signal.SIGKILL)",
    "ignores signals": """
import signal
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True: pass
""",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(0)
""",
    "threads without end": """
import threading, time
while True: threading.Thread(target=time.sleep, args=(1000,)).start()
""",
    "leaves before the tests": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "deep recursion": "def f(n): return f(n + 1) + 1\nprint(f(0))",
    "deep recursion in C": "x = []\nfor _ in range(1000000): x = [x]\nprint(repr(x))",
    "huge integer": "print(9 ** 9 ** 9)",
    "not UTF-8": "import os\nos.write(1, bytes(range(128, 256)))",
    "reads forever": "import sys\nwhile True: sys.stdin.read()",
    "closes its files": "import os\nos.closerange(0, 64)",
    "an exception": "raise ValueError('no')",
    "no Python": "this isn't Python",
    "null byte": "x = '\\0'\0",
    "the results' form": """
import os
for fd in range(64):
    try: os.write(fd, b'\\n{"stdout": "passed"}\\n{"value": true}\\n{"passed": true}\\n')
    except OSError: pass
""",
}


@isolated
@pytest.mark.parametrize("name", [*ATTACKS])
def test_attack_on_a_program(name):
    report = TASK.report(SUM, ATTACKS[name])
    assert not report["passed"] and report["reason"].startswith("test 1: ")
    if name in ("infinite loop", "ignores signals", "reads forever"):
        assert report["reason"] == "test 1: timed out"


# As functions the attacks come with a right solution behind them: it must not be reached, or must stand alone.
FAKES = {
    "leaves before the tests": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "equal to everything": """
class Equal(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def add(a, b): return Equal(5)
""",
    "a list equal to everything": """
class Equal(list):
    def __eq__(self, other): return True
    def __iter__(self): return iter([])
def add(a, b): return Equal()
""",
    "patched builtins": """
import builtins, json
builtins.all = lambda *_: True
builtins.isinstance = lambda *_: True
json.dumps = lambda *_: '{"value": 7}'
def add(a, b): return 5
""",
    "patched encoder": """
import sys
for frame in sys._current_frames().values():
    while frame is not None:
        for names in (frame.f_globals, frame.f_locals):
            if "encoded" in names: names["encoded"] = lambda value: True
        frame = frame.f_back
def add(a, b): return 5
""",
    "writes results": """
import os
for fd in range(64):
    try: os.write(fd, b'{"passed": true}\\n{"value": "passed"}\\n{"value": [true]}\\n')
    except OSError: pass
def add(a, b): return 5
""",
    "kills its parent": """
import os, signal
def add(a, b):
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
""",
}


@isolated
@pytest.mark.parametrize("name", [*FAKES])
def test_a_pass_cannot_be_faked(name):
    report = TASK.report(ADD, FAKES[name])
    assert not report["passed"] and report["reason"], report


@isolated
def test_files_are_out_of_reach(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("hf_secret")
    os.chmod(tmp_path, 0o777)
    os.chmod(secret, 0o666)
    code = f"""
import os
for path in ({str(secret)!r}, "/etc/passwd", "/proc/1/environ", "/root/.bashrc", os.path.expanduser("~/.bashrc")):
    try: print(open(path).read())
    except OSError: print("no")
for path in ({str(tmp_path / "new")!r}, "/usr/new", "/etc/new", "/new"):
    try: print(open(path, "w").write("x") and os.getuid())
    except OSError: print("no")
print(sorted(os.listdir("/proc")) if os.path.exists("/proc") else [])
"""
    text, error = printed(code)
    assert error is None and "hf_secret" not in text and text.split().count("no") >= 8, text
    assert text.endswith("[]\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret"] and secret.read_text() == "hf_secret"
    assert not os.path.exists("/usr/new") and not os.path.exists("/etc/new") and not os.path.exists("/new")


def test_the_environment_is_scrubbed(mechanism, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text, error = printed("import os\nprint(*os.environ)")
    assert error is None and set(sandbox.ENVIRONMENT) <= set(text.split())
    assert set(text.split()) - set(sandbox.ENVIRONMENT) <= {"PWD", "LC_CTYPE"}


def test_files_of_the_grader_are_closed(mechanism, tmp_path):
    (tmp_path / "secret").write_text("hf_secret")
    with open(tmp_path / "secret") as file:
        os.set_inheritable(file.fileno(), True)
        text, error = printed(
            "import os\nfor fd in range(3, 64):\n    try: print(os.pread(fd, 1000, 0))\n    except OSError: pass\n"
        )
    assert error is None and "hf_secret" not in text


@isolated
def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        text, _ = printed(
            f"import socket\ntry: socket.create_connection(('127.0.0.1', {port}), 1); print('connected')\n"
            "except OSError as error: print('refused')\n"
        )
    assert text == "refused\n"


@isolated
def test_no_privileges():
    """A user namespace of one's own may be had, as outside; what is shared with others stays out of reach."""
    text, error = printed(
        "import os, ctypes\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.mount(b'none', b'/', None, 1 << 18, None))\n"
        "for call in (lambda: os.chroot('/usr'), lambda: os.setuid(12345), lambda: os.sethostname(b'x')):\n"
        "    try: call(); print('done')\n"
        "    except (OSError, AttributeError): print('no')\n"
    )
    assert error is None and text.split()[0] == "-1" and "done" not in text, text


@isolated
def test_nothing_of_one_test_is_there_in_the_next():
    code = """
import os, time
a, b = map(int, input().split())
if os.path.exists("/tmp/first"):
    time.sleep(0.3)
    print(open("/tmp/count").read())
else:
    open("/tmp/first", "w").close()
    print(a + b)
    if os.fork() == 0:
        while True:
            open("/tmp/count", "w").write(str(time.time()))
"""
    text = TASK.report(SUM, code)
    assert text["results"][0] and not text["passed"]


def test_graders_do_not_count_each_others_processes():
    """Two that start together, whose programs may have the process that they are and the one that started it."""
    script = """
from autojudge_hf.tasks import LiveCodeBench
from autojudge_hf.tasks.sandbox import Limits
task, code = LiveCodeBench(limits=Limits(num_processes=2)), "import time; time.sleep(0.5); print(7)"
print([task.report({"public_test_cases": '[{"input": "", "output": "7"}]'}, code)["passed"] for _ in range(6)])
"""
    graders = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [grader.communicate()[0] for grader in graders] == [f"{[True] * 6}\n"] * 2


@pytest.mark.parametrize("nothing", [{"num_processes": 1}, {"seconds": 0}, {"disk_bytes": -1}])
def test_limits_under_which_no_program_runs(nothing):
    with pytest.raises(ValueError, match=f"at least 2 processes.*{next(iter(nothing))}"):
        Limits(**nothing)


def test_without_namespaces_a_warning_says_what_is_open(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert sandbox._mechanism.__wrapped__() == "limits"
    (record,) = caplog.records
    assert "network" in record.message and "bubblewrap" in record.message


def test_programs_of_one_batch_look_once(monkeypatch, caplog):
    """And so warn once, if there is something to warn of."""
    monkeypatch.setattr(shutil, "which", lambda name: time.sleep(0.1))
    monkeypatch.setattr(sandbox, "_mechanism", functools.cache(sandbox._mechanism.__wrapped__))
    monkeypatch.setattr(sandbox, "_run", lambda mechanism, *args: [{"mechanism": mechanism}])
    with ThreadPoolExecutor(4) as workers:
        answers = list(workers.map(lambda _: [*sandbox.run_isolated("", None, 1)], range(4)))
    assert answers == [[{"mechanism": "limits"}]] * 4
    assert len(caplog.records) == 1


def test_a_sandbox_that_cannot_be_set_up_says_so(monkeypatch):
    monkeypatch.setattr(sandbox, "_mechanism", lambda: "unshare")
    monkeypatch.setattr(sandbox, "_read_only", lambda: ["/nowhere"])
    if shutil.which("unshare") is None:
        pytest.skip("unshare isn't installed")
    with pytest.raises(RuntimeError, match="couldn't be set up with unshare"):
        printed("print(1)")
