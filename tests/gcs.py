"""A small Google Cloud Storage in memory, as far as tensorstore and gcsfs need it.

    python tests/gcs.py --port=9199 --failing=0.05

Its objects have generations, and writes and deletions respect ``ifGenerationMatch``, so lost
updates would show. A share of the requests fails with 503; a bucket can refuse reads or writes.
"""

import argparse
import asyncio
import base64
import contextlib
import email
import hashlib
import http.server
import json
import os
import random
import re
import threading
import types
import urllib.parse
from collections.abc import Iterator
from typing import Any, NamedTuple

import fsspec
import pytest
from tensorboardX import record_writer

BUCKET = "robots"
NOWHERE = "127.0.0.1:1"  # of the credentials that a machine of the cloud has
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read on import; that needs gRPC


class Stored(NamedTuple):
    content: bytes
    generation: int


class Storage:
    """The objects of one bucket; every method is atomic."""

    def __init__(self, failing: float = 0.0):
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, tuple[dict[str, str], bytearray]] = {}
        self.failing, self.writable, self.readable, self.requests = failing, True, True, 0
        self._random, self.lock, self._generation = random.Random(0), threading.RLock(), 0

    def fails(self) -> bool:
        with self.lock:
            self.requests += 1
            return self._random.random() < self.failing

    def matches(self, name: str, query: dict[str, str]) -> bool:
        """Whether the preconditions of a request hold."""
        current = self.objects[name].generation if name in self.objects else 0
        wanted, other = query.get("ifGenerationMatch"), query.get("ifGenerationNotMatch")
        return (wanted is None or int(wanted) == current) and (
            other is None or int(other) != current
        )

    def put(self, name: str, content: bytes) -> dict[str, Any]:
        self._generation += 1
        self.objects[name] = Stored(bytes(content), self._generation)
        return self.describe(name)

    def describe(self, name: str) -> dict[str, Any]:
        content, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "id": f"{BUCKET}/{name}/{generation}",
            "name": name,
            "bucket": BUCKET,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "contentType": "application/octet-stream",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "etag": str(generation),
            "storageClass": "STANDARD",
        }

    def listed(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first = max(query.get("startOffset", ""), query.get("pageToken", ""))
        last, count = query.get("endOffset"), int(query.get("maxResults", 1000))
        items, prefixes = [], set()
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name < first or (last and name >= last):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
                continue
            if len(items) == count:
                return {"items": items, "prefixes": sorted(prefixes), "nextPageToken": name}
            items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


def handler_of(storage: Storage) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            if os.environ.get("GCS_LOG"):
                super().log_message(*arguments)

        def answer(self, status: int, content: Any = b"", **headers: str) -> None:
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
                headers["Content-Type"] = "application/json"
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def error(self, status: int, message: str) -> None:
            what = {"code": status, "message": message, "errors": [{"reason": message}]}
            self.answer(status, {"error": what})

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self.chunks()
            url = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
            if storage.fails():
                return self.error(503, "backendError")
            with storage.lock:
                self.route(url.path, query, body)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = handle_any

        def chunks(self) -> bytes:
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def route(self, path: str, query: dict[str, str], body: bytes) -> None:
            known = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/(.*))?", path)
            if path.startswith("/batch"):
                return self.batch(body)
            if not known:
                return self.error(404, f"unknown path {path}")
            bucket, rest = known[1], known[2] or ""
            if bucket != BUCKET:
                return self.error(404, "The specified bucket does not exist.")
            if not storage.writable and self.command in ("POST", "PUT", "DELETE", "PATCH"):
                return self.error(403, "the caller does not have storage.objects.create access")
            if not storage.readable and self.command == "GET":
                return self.error(403, "the caller does not have storage.objects.get access")
            if path.startswith("/upload"):
                return self.upload(query, body)
            if rest == "o":
                return self.answer(200, storage.listed(query))
            if not rest:
                return self.answer(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})
            if rest == "storageLayout":
                return self.answer(200, {"bucket": bucket, "location": "US"})
            self.object(rest.removeprefix("o/"), query)

        def object(self, rest: str, query: dict[str, str]) -> None:
            verb = "/moveTo/" if "/moveTo/" in rest else "/rewriteTo/"
            source, copies, target = rest.partition(verb)
            name = urllib.parse.unquote(source)
            if name not in storage.objects:
                return self.error(404, f"No such object: {BUCKET}/{name}")
            if not storage.matches(name, query):
                status = 304 if "ifGenerationNotMatch" in query else 412
                return self.answer(status) if status == 304 else self.error(412, "conditionNotMet")
            if copies:
                new = urllib.parse.unquote(target.rpartition("/")[2])  # quoted: without a slash
                resource = storage.put(new, storage.objects[name].content)
                if verb == "/moveTo/":
                    del storage.objects[name]
                    return self.answer(200, resource)
                size = resource["size"]
                done = {"done": True, "objectSize": size, "totalBytesRewritten": size}
                return self.answer(
                    200, {"kind": "storage#rewriteResponse", "resource": resource} | done
                )
            if self.command == "DELETE":
                del storage.objects[name]
                return self.answer(204)
            if query.get("alt") != "media":
                return self.answer(200, storage.describe(name))
            self.media(name)

        def media(self, name: str) -> None:
            content, generation = storage.objects[name]
            headers = {"x_goog_generation": str(generation), "x_goog_metageneration": "1"}
            wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
            if not wanted:
                return self.answer(200, content, **headers)
            size = len(content)
            first = int(wanted[1]) if wanted[1] else max(0, size - int(wanted[2]))
            last = min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
            if first >= size:
                return self.answer(416, Content_Range=f"bytes */{size}")
            headers["Content_Range"] = f"bytes {first}-{last}/{size}"
            self.answer(206, content[first : last + 1], **headers)

        def upload(self, query: dict[str, str], body: bytes) -> None:
            kind = query["uploadType"]
            if kind == "multipart":
                head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
                described, _ = email.message_from_bytes(head + body).get_payload()
                name = json.loads(described.get_payload(decode=True))["name"]
                return self.store(name, query, raw_part(self.headers["Content-Type"], body))
            if kind == "media":
                return self.store(query["name"], query, body)
            if "upload_id" not in query:
                named = query.get("name") or json.loads(body)["name"]
                number = str(len(storage.uploads))
                storage.uploads[number] = (query | {"name": named}, bytearray())
                host = f"http://{self.headers['Host']}{self.path}"
                return self.answer(200, b"", Location=f"{host}&upload_id={number}")
            kept, content = storage.uploads[query["upload_id"]]
            content += body
            if self.headers.get("Content-Range", "").endswith("/*"):  # more is to come
                return self.answer(308, b"", Range=f"bytes=0-{len(content) - 1}")
            self.store(kept["name"], kept, bytes(content))

        def store(self, name: str, query: dict[str, str], content: bytes) -> None:
            if not storage.matches(name, query):
                return self.error(412, "conditionNotMet")
            self.answer(200, storage.put(name, content))

        def batch(self, body: bytes) -> None:
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1]
            answers = []
            for part in body.split(f"--{boundary}".encode()):
                call = re.search(rb"DELETE (\S+)", part)
                number = re.search(rb"Content-ID: ?<(.*?)>", part, re.IGNORECASE)
                if not call:
                    continue
                rest = urllib.parse.urlsplit(call[1].decode()).path.partition("/o/")[2]
                found = storage.objects.pop(urllib.parse.unquote(rest), None)
                status = "204 No Content" if found else "404 Not Found"
                inner = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n"
                mark = number[1].decode() if number else "0"
                answers.append(
                    f"--batch\r\nContent-Type: application/http\r\nContent-ID: <response-{mark}>"
                    f"\r\n\r\n{inner}\r\n"
                )
            text = "".join(answers) + "--batch--\r\n"
            self.answer(200, text.encode(), Content_Type="multipart/mixed; boundary=batch")

    return Handler


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent: a client that is killed closes its connections."""


def raw_part(content_type: str, body: bytes) -> bytes:
    """The second part of a multipart body, byte for byte."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)[1].encode()
    part = body.split(b"--" + boundary)[2]
    newline = b"\r\n" if part.startswith(b"\r\n") else b"\n"  # gcsfs sends the second
    return part.partition(2 * newline)[2].removesuffix(newline)


@contextlib.contextmanager
def serving(port: int = 0, **options: Any) -> Iterator[tuple[str, Storage]]:
    """(address, storage) of a server in a thread."""
    storage = Storage(**options)
    server = Server(("127.0.0.1", port), handler_of(storage))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", storage
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def connected() -> Iterator[Storage]:
    """A bucket that every library of this process uses, and of those that it starts."""
    with serving() as (address, storage), pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, address)
        for name in ("GCE_METADATA_ROOT", "GCE_METADATA_HOST"):
            patch.setenv(name, NOWHERE)
        patch.setenv("NO_GCE_CHECK", "true")
        for name in ("gs", "gcs"):
            patch.setitem(fsspec.config.conf, name, {"token": "anon"})
        patch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=_shortly))
        yield storage
        # TensorBoard's files are written once more at exit, which would wait for the server.
        record_writer.GCSRecordWriter.flush = lambda writer: None


async def _shortly(seconds: float) -> None:
    """Instead of the seconds that gcsfs waits before it tries again."""
    await asyncio.sleep(seconds / 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=9199)
    parser.add_argument("--failing", type=float, default=0.0)
    options = parser.parse_args()
    with serving(options.port, failing=options.failing):
        threading.Event().wait()


if __name__ == "__main__":
    main()
