"""A Google Cloud Storage emulator in this process, over its real HTTP protocol.

The emulator knows nothing of generations, by which a client sees that nobody else has written an object in the
meantime; TensorStore, and so every checkpoint, needs them. Nor does it move objects, and gcsfs asks for that again and
again for half a minute before it copies them instead. Both are added here.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from http import HTTPStatus

import gcsfs
from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def _download(request, response, storage, *args, **kwargs):
    _plain_download(request, response, storage, *args, **kwargs)
    with contextlib.suppress(NotFound):
        found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = found["generation"]


def _insert(request, response, storage, *args, **kwargs):
    expected = request.query.get("ifGenerationMatch")
    if expected:
        try:
            found = storage.get_file_obj(request.params["bucket_name"], request.query["name"][0])["generation"]
        except NotFound:
            found = "0"
        if found != expected[0]:
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
    _plain_insert(request, response, storage, *args, **kwargs)


def _move(request, response, storage, *args, **kwargs):
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.rewrite(request, response, storage, *args, **kwargs)
    if response.status == HTTPStatus.OK:
        storage.delete_file(request.params["bucket_name"], request.params["object_id"])


_plain_download, _plain_insert = objects.download, objects.insert
objects.download = _download
for _, methods in server.HANDLERS:
    for method, handler in methods.items():
        methods[method] = {_plain_download: _download, _plain_insert: _insert}.get(handler, handler)
_moves = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<dest_object_id>.*[^/]+)$"
server.HANDLERS = ((_moves, {"POST": _move}), *server.HANDLERS)


@contextlib.contextmanager
def serving(bucket: str) -> Iterator[str]:
    """Serves an empty bucket; gives the address for ``STORAGE_EMULATOR_HOST`` and ``TENSORSTORE_GCS_HTTP_URL``."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    gcsfs.GCSFileSystem.clear_instance_cache()
    emulator = server.create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket)
    emulator.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        emulator.stop()
        gcsfs.GCSFileSystem.clear_instance_cache()
