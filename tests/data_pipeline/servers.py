"""An HTTP server on loopback that serves a folder and fails as it is told to."""

import functools
import http.server
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Server(http.server.ThreadingHTTPServer):
    """requests: GETs by file name. failures: what the next GETs of a name meet, in order; see `_Handler`."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.requests: Counter[str] = Counter()
        self.failures: dict[str, list[str]] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Failures: a status code; "cut": the connection ends half way; "stall": it stays open there; "slow": a block each
    0.1 s; "flip": a bit is wrong.
    """

    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.requests[name] += 1
        failures = self.server.failures.get(name, [])
        if not failures:
            super().do_GET()
            return
        failure = failures.pop(0)
        if failure.isdigit():
            self.send_error(int(failure))
            return
        data = bytearray(Path(self.translate_path(self.path)).read_bytes())
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if failure == "flip":
            data[len(data) // 2] ^= 1
        for begin in range(0, len(data) if failure in ("flip", "slow") else len(data) // 2, 4096):
            self.wfile.write(data[begin : begin + 4096])
            time.sleep(0.1 if failure == "slow" else 0)
        self.wfile.flush()
        if failure == "stall":
            time.sleep(20)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
