# SPDX-License-Identifier: Apache-2.0
"""Runs one program on its tests, inside a sandbox: a script whose `main` the sandbox calls.

What tests expect never comes in here, so whatever a program does to this process, it can't fake a pass.
"""

import contextlib
import functools
import json
import os
import sys
import types


# `from builtins import *` comes last: operator, math and os shadow `pow`, `abs`, `open`.
MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json "
    "typing builtins"
).split()
RECURSION_LIMIT = 50_000
LONGEST_INTEGER = 50_000  # digits, as in the official checker


def prepared(name):
    """A module with the names that LiveCodeBench's programs may use without importing them."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    for imported in MODULES:
        exec(f"import {imported}\nfrom {imported} import *", module.__dict__)
    module.quit = sys.exit  # an interactive Python's
    return module


def encoded(value):
    """`value` as JSON that tells tuples from lists; what has no such form equals nothing."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, (list, tuple)):
        return ["list" if isinstance(value, list) else "tuple", *map(encoded, value)]
    if isinstance(value, dict):
        return ["dict", *([encoded(k), encoded(v)] for k, v in value.items())]
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encoded(value.item())
    return ["other", type(value).__name__]


def redirected(fd, path, flags):
    opened = os.open(path, flags, 0o600)
    os.dup2(opened, fd)
    os.close(opened)


def described(error):
    return f"{type(error).__name__}: {error}"[:500]


def functional(module, request, emit):
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        redirected(fd, "/dev/null", flags)
    try:
        module.__dict__.pop(request["function"], None)  # it has to be the program's own
        exec(compile(request["code"], "program.py", "exec"), module.__dict__)
        owner = module.__dict__.get("Solution")
        function = getattr(owner() if owner else module, request["function"], None)
        if function is None:
            emit({"error": f"no function {request['function']}"})
            os._exit(0)
        for text in request["inputs"]:
            arguments = [json.loads(line) for line in text.split("\n")]
            emit({"value": encoded(function(*arguments))})
    except BaseException as error:
        emit({"error": described(error)})
    os._exit(0)


def from_stdin(module, code, number, error_file):
    redirected(0, "stdin", os.O_RDONLY)
    redirected(1, f"output-{number}", os.O_WRONLY)
    redirected(2, "/dev/null", os.O_WRONLY)
    try:
        exec(compile(code, "program.py", "exec"), module.__dict__)
    except SystemExit:
        pass
    except BaseException as error:
        os.write(error_file, described(error).encode())
    # Returns into the interpreter's own end: it waits for threads and flushes what was printed.


def ended(status):
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}" if status else None


def main(request, emit, worker):
    """Emits `{"value": ...}`, `{"stdout": ...}` or, last, `{"error": ...}` for the tests, one after the other."""
    sys.setrecursionlimit(RECURSION_LIMIT)
    if hasattr(sys, "set_int_max_str_digits"):  # not before 3.10.7
        sys.set_int_max_str_digits(LONGEST_INTEGER)
    if request["function"] is not None:
        module = prepared("solution")
        seconds = request["seconds"] * len(request["inputs"])
        problem = ended(worker(functools.partial(functional, module, request, emit), seconds))
        if problem is not None:
            emit({"error": problem})
        return
    module = prepared("__main__")
    for number, text in enumerate(request["inputs"]):
        with open("stdin", "w", encoding="utf-8") as file:  # to where the sandbox's /dev/stdin leads
            file.write(text)
        with open(f"output-{number}", "w+b") as output, open(f"error-{number}", "w+b", buffering=0) as errors:
            work = functools.partial(from_stdin, module, request["code"], number, errors.fileno())
            problem = ended(worker(work, request["seconds"]))
            os.lseek(errors.fileno(), 0, os.SEEK_SET)
            problem = errors.read(1000).decode("utf-8", "replace") or problem
            if os.fstat(output.fileno()).st_size > request["output_bytes"]:
                problem = "too much output"
            printed = output.read(request["output_bytes"]).decode("utf-8", "replace")
        for name in ("stdin", f"output-{number}", f"error-{number}"):
            with contextlib.suppress(FileNotFoundError):  # the program's own doing
                os.unlink(name)
        emit({"error": problem} if problem else {"stdout": printed})
        if problem:
            return
