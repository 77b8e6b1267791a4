"""`tokendance view`: a run as a page, served on this machine or written to a file."""

import json
import os
import secrets
import sys
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tokendance.errors import ConfigError
from tokendance.results import write_result
from tokendance.view.document import Json, read_document
from tokendance.view.page import HEADERS, Asset, asset, page, whole_page
from tokendance.view.recording import Changes, Recording

_HOST = "127.0.0.1"
_LOOK_S = 0.25  # between two looks at what has changed
_MORE_S = 0.01  # between parts of what has


def write_page(file: Path, out: Path, console: Console) -> None:
    """Write a run as one HTML file, which needs no server and no network.

    Raises:
        ConfigError: if the run cannot be read, or the page not be written.
    """
    write_result(out, whole_page(read_document(file)), "Give --html another path.")
    console.print(f"The page is in {escape(str(out))}. Open it in any browser, or send it.")


def serve_page(file: Path, port: int, console: Console, *, open_browser: bool) -> None:
    """Serve a run to browsers of this machine until the user interrupts.

    Raises:
        ConfigError: if the run cannot be read, or nothing can listen at the port.
    """
    run = read_document(file)
    try:
        server = PageServer(run, port)
    except OSError as error:
        raise ConfigError(
            f"Nothing can listen at {_HOST}, port {port}: {error.strerror}. Give another --port."
        ) from error
    with server:
        console.print(f"{escape(str(file))} is at {server.url} (Ctrl-C ends it).")
        if open_browser:
            _open(server.url)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


@contextmanager
def shown_live(recording: Recording, console: Console, *, with_text: bool) -> Iterator[None]:
    """Serve a run that goes on to browsers of this machine; at the end, until the user interrupts.

    Args:
        recording: of the run.
        console: where its address is printed.
        with_text: whether the texts of prompts and answers are shown.
    """
    with PageServer(recording, with_text=with_text) as server:
        thread = threading.Thread(target=server.serve_forever, name="view", daemon=True)
        thread.start()
        console.print(f"The run is shown at {server.url}")
        _open(server.url)
        try:
            yield
            console.print(f"The run stays at {server.url} until Ctrl-C.")
            with suppress(KeyboardInterrupt):
                thread.join()
        finally:
            server.shutdown()


def _open(url: str) -> None:
    """Open a browser where there is a screen: browsers in the terminal would take it over."""
    if sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        webbrowser.open(url)


class PageServer(ThreadingHTTPServer):
    """Serves the page of one run on the loopback address.

    Others who use this machine reach it, too, so its paths begin with what only its user is told.

    Attributes:
        url: of the page.
    """

    daemon_threads = True

    def __init__(self, run: Json | Recording, port: int = 0, *, with_text: bool = True) -> None:
        """Listen.

        Args:
            run: that was recorded, or is being recorded.
            port: 0 takes any that is free.
            with_text: whether of the latter the texts of prompts and answers are shown.

        Raises:
            OSError: if nothing can listen there.
        """
        self._recording = run if isinstance(run, Recording) else None
        self._with_text = with_text
        self.has_ended = threading.Event()
        self._root = f"/{secrets.token_urlsafe(12)}/"
        source = "run.json" if self._recording is None else "events"
        self._parts = {"": Asset("text/html; charset=utf-8", page(source).encode())}
        if self._recording is None:
            text = json.dumps(run, separators=(",", ":"))
            self._parts[source] = Asset("application/json", text.encode())
        super().__init__((_HOST, port), _Handler)
        self.url = f"http://{_HOST}:{self.server_port}{self._root}"

    def find(self, path: str) -> Asset | Changes | None:
        """What is at a path; None for nothing."""
        if not secrets.compare_digest(path[: len(self._root)].encode(), self._root.encode()):
            return None
        name = path[len(self._root) :]
        if name == "events" and self._recording is not None:
            return Changes(self._recording, with_text=self._with_text)
        return self._parts.get(name) or asset(name)

    def knows_host(self, host: str) -> bool:
        """Whether a request is meant for this server: web pages may have names that lead here."""
        return host in (f"{_HOST}:{self.server_port}", f"localhost:{self.server_port}")

    def shutdown(self) -> None:
        """Stop, and end what is being streamed."""
        self.has_ended.set()
        super().shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        found = self.server.find(self.path.split("?")[0])
        if not self.server.knows_host(self.headers.get("host", "")):
            self._answer(HTTPStatus.FORBIDDEN, Asset("text/plain", b"This host is not served.\n"))
        elif found is None:
            self._answer(HTTPStatus.NOT_FOUND, Asset("text/plain", b"There is nothing here.\n"))
        elif isinstance(found, Changes):
            self._stream(found)
        else:
            self._answer(HTTPStatus.OK, found)

    def _answer(self, status: HTTPStatus, found: Asset) -> None:
        self._begin(status, found.media_type)
        self.wfile.write(found.content)

    def _begin(self, status: HTTPStatus, media_type: str) -> None:
        self.send_response(status)
        self.send_header("content-type", media_type)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()

    def _stream(self, changes: Changes) -> None:
        """Send what changes, as server-sent events, until the browser goes or the server stops."""
        self._begin(HTTPStatus.OK, "text/event-stream")
        try:
            while not self.server.has_ended.is_set():
                document = changes.next()
                if document is not None:
                    text = json.dumps(document, separators=(",", ":"))
                    self.wfile.write(f"data: {text}\n\n".encode())
                self.server.has_ended.wait(_MORE_S if changes.has_more else _LOOK_S)
        except OSError:
            return  # nobody looks on any more

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing of each request."""
