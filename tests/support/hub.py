"""A Hugging Face Hub with one repository, on this machine: the three requests that its library makes to fetch one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

COMMIT = hashlib.sha1(b"the only commit", usedforsecurity=False).hexdigest()


class Hub:
    """Serves a folder as a repository at the branch "main". A context.

    Args:
        repository: "organisation/name".
        folder: its files, none in folders.
    """

    def __init__(self, repository: str, folder: Path) -> None:
        self.fetched: Counter[str] = Counter()
        """How often each file was."""
        fetched = self.fetched

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._file(with_body=False)

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                about = f"/api/models/{repository}"
                if path.startswith("/api/"):
                    if path == f"{about}/revision/main":
                        self._json({"id": repository, "sha": COMMIT, "siblings": []})
                    elif path == f"{about}/tree/{COMMIT}":
                        self._json([self._entry(file) for file in sorted(folder.iterdir())])
                    elif path.startswith(about):
                        self._missing("RevisionNotFound")
                    else:
                        self._missing("RepoNotFound")
                else:
                    self._file(with_body=True)

            def _entry(self, file: Path) -> dict[str, object]:
                return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}

            def _json(self, value: object) -> None:
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _file(self, *, with_body: bool) -> None:
                prefix = f"/{repository}/resolve/{COMMIT}/"
                file = folder / self.path.removeprefix(prefix)
                if not self.path.startswith(prefix) or not file.is_file():
                    self._missing("EntryNotFound")
                    return
                body = file.read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    fetched[file.name] += 1
                    self.wfile.write(body)

            def _missing(self, code: str) -> None:
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
