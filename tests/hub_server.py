"""The part of the Hugging Face Hub's protocol that downloads and uploads of small files need, on loopback."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """`repos[name][path]` are the bytes of a file; `requests` is what was asked, as "GET /path"."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.broken: set[str] = set()  # repositories of which every request fails
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self):
                path = unquote(urlsplit(self.path).path)
                hub.requests.append(f"{self.command} {path}")
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, headers, data = hub.answer(self.command, path, self.headers, body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_HEAD = do_POST = do

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, repo: str, folder: str, directory) -> None:
        files = {f"{folder}/{path.name}".lstrip("/"): path.read_bytes() for path in directory.iterdir()}
        self.repos.setdefault(repo, {}).update(files)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, command: str, path: str, headers, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repos.setdefault(repo, {".gitattributes": b""})
            return _json({"url": f"{self.url}/{repo}", "id": "1"})
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|preupload|commit)/([^/]+))?", path):
            repo, action, _ = match.groups()
            if repo in self.broken:
                return 500, {}, b""
            if repo not in self.repos:
                return 404, {"X-Error-Code": "RepoNotFound"}, b""
            return self._api(repo, action, body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, _, name = match.groups()
            if repo not in self.repos:
                return 404, {"X-Error-Code": "RepoNotFound"}, b""
            if name not in self.repos[repo]:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.sha(repo)}, b""
            return self._file(repo, name, headers.get("Range"))
        return 404, {}, b""

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode(), usedforsecurity=False).hexdigest()

    def _api(self, repo: str, action: str | None, body: bytes) -> tuple[int, dict[str, str], bytes]:
        files = self.repos[repo]
        if action in (None, "revision"):
            siblings = [{"rfilename": name} for name in files]
            return _json(
                {"id": repo, "modelId": repo, "sha": self.sha(repo), "private": False, "siblings": siblings, "tags": []}
            )
        if action == "tree":
            return _json([{"type": "file", "path": n, "size": len(f), "oid": _oid(f)} for n, f in files.items()])
        if action == "preupload":
            asked = json.loads(body)["files"]
            return _json({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        for line in body.splitlines():
            if (change := json.loads(line))["key"] == "file":
                files[change["value"]["path"]] = base64.b64decode(change["value"]["content"])
        sha = self.sha(repo)
        return _json({"commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def _file(self, repo: str, name: str, span: str | None) -> tuple[int, dict[str, str], bytes]:
        data = self.repos[repo][name]
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": self.sha(repo), "Accept-Ranges": "bytes"}
        if span is None:
            return 200, headers, data
        first, last = (int(n) if n else len(data) - 1 for n in span.removeprefix("bytes=").split("-"))
        return 206, {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]


def _json(content) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
