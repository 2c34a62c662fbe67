# SPDX-License-Identifier: Apache-2.0
"""A Hub on the loopback interface, for the real client: repositories, revisions, tokens, LFS, and faults on demand."""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote

import yaml


LICENCES = ("apache-2.0", "mit", "llama3.1", "cc-by-4.0", "other")
KINDS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


@dataclass
class Repo:
    """Files by commit; `files` maps a path to its content and whether it lies in LFS."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, tuple[bytes, bool]], str]] = field(default_factory=list)

    def commit(self, files, title):
        number = f"{title}{len(self.commits)}{sorted((k, v[0]) for k, v in files.items())}"
        self.commits.append((hashlib.sha1(number.encode()).hexdigest(), files, title))

    def find(self, revision):
        """`(commit, files)` of main, of a commit, or of a tag, which is a commit's title."""
        if revision == "main":
            return self.commits[-1][:2]
        return next((commit[:2] for commit in self.commits if revision in (commit[0], commit[2])), None)


class Hub(ThreadingHTTPServer):
    """Serves until closed. `faults` is called with method and path, and may return a fault for this request.

    A fault is a status code; `"cut"`: half of the answer, then the connection is closed; `"slow"`: an answer in
    drops; `"drop"`: no answer at all; or `"hang up"`: the connection is closed while the client is sending.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.tokens = {"hf_writer": "user"}
        self.requests: list[tuple[str, str]] = []
        self.faults = lambda method, path: None
        self.mistakes: list[BaseException] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests; anything else is a mistake of this server."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            self.mistakes.append(error)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Quiet: requests are recorded by the server."""

    # Answers

    def answer(self, status, body=b"", headers=()):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        names = {name.lower() for name, _ in headers}
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif self.fault == "slow":
            for i in range(0, len(body), 512):
                self.wfile.write(body[i : i + 512])
                self.wfile.flush()
                time.sleep(0.02)
        else:
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, [("X-Error-Code", code), ("X-Error-Message", message)])

    # Requests

    def handle_any(self):
        path, _, _ = self.path.partition("?")
        path = unquote(path)
        with self.server.lock:
            self.server.requests.append((self.command, path))
        self.fault = self.server.faults(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault == "hang up":
            self.rfile.read(length // 2)
            self.close_connection = True
            return None
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunks()
        self.user = self.server.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if isinstance(self.fault, int):
            self.answer(self.fault, {"error": "a fault"})
        elif self.fault == "drop":
            self.close_connection = True
        else:
            for pattern, method in ROUTES:
                match = re.fullmatch(pattern, path)
                if match:
                    with self.server.lock:
                        prepared = getattr(self, method)(body, **match.groupdict())
                    return self.answer(*prepared) if prepared else None
            self.refuse(404, "RepoNotFound", "no such page")
        return None

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def repo(self, kind, name, write=False):
        """The repository, or the answer that this user gets instead."""
        repo = self.server.repos.get((kind, name))
        if write and self.user is None:
            return None, error(401, "", "Invalid credentials")
        if repo is None or (repo.private and self.user is None):
            return None, error(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
        if repo.gated and self.user is None:
            return None, error(403, "GatedRepo", "Access to this repository is restricted")
        if write and not name.startswith(f"{self.user}/"):
            return None, error(403, "", "You don't have the rights")
        return repo, None

    def whoami(self, body):
        if self.user is None:
            return error(401, "", "Invalid credentials")
        return 200, {"type": "user", "name": self.user, "orgs": []}

    def create(self, body):
        if self.user is None:
            return error(401, "", "Invalid credentials")
        told = json.loads(body)
        kind = told.get("type", "model") + "s"
        name = f"{told.get('organization') or self.user}/{told['name']}"
        url = {"url": f"{self.server.endpoint}/{KINDS[kind]}{name}", "name": name}
        if (kind, name) in self.server.repos:
            return 409, {**url, "error": "You already created this repo"}
        repo = Repo(private=told.get("visibility") == "private" or bool(told.get("private")))
        repo.commit({".gitattributes": (b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self.server.repos[kind, name] = repo
        return 200, url

    def info(self, body, kind, name, revision="main"):
        repo, problem = self.repo(kind, name)
        if problem:
            return problem
        found = repo.find(revision)
        if found is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": path} for path in found[1]]
        about = {"id": name, "sha": found[0], "private": repo.private, "siblings": siblings, "tags": []}
        return 200, {**about, "gated": repo.gated, "downloads": 0, "likes": 0, "disabled": False}

    def tree(self, body, kind, name, revision, folder=""):
        entries, problem = self.entries(kind, name, revision)
        if problem:
            return problem
        inside = [entry for entry in entries if entry["path"].startswith(f"{folder}/" if folder else "")]
        if not inside:
            return error(404, "EntryNotFound", f"{folder} does not exist")
        if "recursive=true" not in self.path.lower():
            depth = folder.count("/") + 1 if folder else 0
            inside = [entry for entry in inside if entry["path"].count("/") == depth]
        return 200, inside

    def paths_info(self, body, kind, name, revision):
        entries, problem = self.entries(kind, name, revision)
        if problem:
            return problem
        told = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        return 200, [entry for entry in entries if entry["path"] in told.get("paths", [])]

    def entries(self, kind, name, revision):
        """Files and folders of a revision, or the answer that this user gets instead."""
        repo, problem = self.repo(kind, name)
        if problem:
            return None, problem
        found = repo.find(revision)
        if found is None:
            return None, error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        folders = {str(parent) for path in found[1] for parent in PurePosixPath(path).parents if str(parent) != "."}
        entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        for path, (content, is_lfs) in found[1].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if is_lfs:
                sha = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return entries, None

    def validate_yaml(self, body):
        """Of the real Hub's rules those for the fields that the library's cards have."""
        told = json.loads(body)
        metadata = yaml.safe_load(told["content"].split("---\n")[1])
        errors = [] if isinstance(metadata, dict) else ["metadata must be an object"]
        if metadata.get("license", "mit") not in LICENCES:
            errors.append('"license" must be one of the known ones')
        for field_name in ("base_model", "datasets", "source_datasets"):
            names = metadata.get(field_name, [])
            errors += [
                f'"{field_name}": {name} is no id' for name in names if not re.fullmatch(r"[\w.-]+/[\w.-]+", name)
            ]
        if not all(isinstance(tag, str) for tag in metadata.get("tags", [])):
            errors.append('"tags" must be strings')
        if metadata.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
            errors.append('"base_model_relation" is unknown')
        for index in metadata.get("model-index", []):
            results = index.get("results") if isinstance(index.get("name"), str) else None
            for result in results or [{}]:
                has_names = {"type"} <= result.get("task", {}).keys() and {"type", "name"} <= result.get(
                    "dataset", {}
                ).keys()
                metrics = result.get("metrics", [])
                if not has_names or not metrics or any(not {"type", "value"} <= metric.keys() for metric in metrics):
                    errors.append('"model-index" is incomplete')
        return (400 if errors else 200), {"errors": [{"message": error} for error in errors], "warnings": []}

    def preupload(self, body, kind, name, revision):
        _, problem = self.repo(kind, name, write=True)
        if problem:
            return problem
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".parquet")) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": modes}

    def commit(self, body, kind, name, revision):
        repo, problem = self.repo(kind, name, write=True)
        if problem:
            return problem
        files, title = dict(repo.find(revision)[1]), ""
        for line in body.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "header":
                title = value["summary"]
            elif told["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif told["key"] == "lfsFile":
                files[value["path"]] = (self.server.lfs[value["oid"]], True)
            elif told["key"] == "deletedFile":
                del files[value["path"]]
        repo.commit(files, title)
        oid = repo.commits[-1][0]
        url = f"{self.server.endpoint}/{KINDS[kind]}{name}/commit/{oid}"
        return 200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}

    def lfs_batch(self, body, name):
        _, problem = self.repo(
            "datasets" if name.startswith("datasets/") else "models", name.split("datasets/")[-1], True
        )
        if problem:
            return problem
        objects = []
        for told in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{told['oid']}"}}}
            objects.append(told if told["oid"] in self.server.lfs else {**told, **upload})
        return 200, {"transfer": "basic", "objects": objects}, [("Content-Type", "application/vnd.git-lfs+json")]

    def lfs(self, body, oid):
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, b"not what was announced"
            self.server.lfs[oid] = body
            return 200, b""
        return self.content(self.server.lfs[oid], [("ETag", f'"{oid}"')])

    def resolve(self, body, name, revision, path, kind="models"):
        repo, problem = self.repo(kind, name)
        if problem:
            return problem
        found = repo.find(revision)
        if found is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit, files = found
        headers = [("X-Repo-Commit", commit), ("Accept-Ranges", "bytes")]
        if path not in files:
            return (*error(404, "EntryNotFound", "Entry not found")[:2], [*headers, ("X-Error-Code", "EntryNotFound")])
        content, is_lfs = files[path]
        if is_lfs:
            oid = hashlib.sha256(content).hexdigest()
            self.server.lfs.setdefault(oid, content)
            # Storage is another host, as for the real Hub: its client treats such redirects differently.
            storage = self.server.endpoint.replace("127.0.0.1", "localhost")
            headers += [("X-Linked-Etag", f'"{oid}"'), ("X-Linked-Size", str(len(content)))]
            return 302, b"", [*headers, ("Location", f"{storage}/lfs/{oid}")]
        return self.content(content, [*headers, ("ETag", f'"{hashlib.sha1(content).hexdigest()}"')])

    def content(self, content, headers):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
            span = f"bytes {start}-{end}/{len(content)}"
            return 206, content[start : end + 1], [*headers, ("Content-Range", span)]
        if self.command == "HEAD":
            return 200, b"", [*headers, ("Content-Length", str(len(content)))]
        return 200, content, headers


def error(status, code, message):
    return status, {"error": message}, [("X-Error-Code", code), ("X-Error-Message", message)]


NAME, REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
KIND = r"(?P<kind>models|datasets|spaces)"
ROUTES = (
    (r"/api/whoami-v2", "whoami"),
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate_yaml"),
    (rf"/api/{KIND}/{NAME}/preupload/{REVISION}", "preupload"),
    (rf"/api/{KIND}/{NAME}/commit/{REVISION}", "commit"),
    (rf"/api/{KIND}/{NAME}/tree/{REVISION}", "tree"),
    (rf"/api/{KIND}/{NAME}/tree/{REVISION}/(?P<folder>.+)", "tree"),
    (rf"/api/{KIND}/{NAME}/paths-info/{REVISION}", "paths_info"),
    (rf"/api/{KIND}/{NAME}/revision/{REVISION}", "info"),
    (rf"/api/{KIND}/{NAME}", "info"),
    (r"/(?P<name>(datasets/)?[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs"),
    (rf"/(?P<kind>datasets)/{NAME}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    (rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
)
