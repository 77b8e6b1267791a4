"""`tokendance view`: a recorded run as a page, served on this machine or written to a file."""

import json
import webbrowser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from tokendance.errors import ConfigError
from tokendance.results import write_result
from tokendance.view.document import read_document
from tokendance.view.page import POLICY, Asset, asset, page, whole_page

_HOST = "127.0.0.1"


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
    try:
        server = PageServer(file, port)
    except OSError as error:
        raise ConfigError(
            f"Nothing can listen at {_HOST}, port {port}: {error.strerror}. Give another --port."
        ) from error
    with server:
        console.print(f"{escape(str(file))} is at {server.url} (Ctrl-C ends it).")
        if open_browser:
            webbrowser.open(server.url)
        server.serve_forever()


class PageServer(ThreadingHTTPServer):
    """Serves the page of one run on the loopback address.

    Attributes:
        url: of the page.
    """

    daemon_threads = True

    def __init__(self, file: Path, port: int = 0) -> None:
        """Listen at a port; 0 takes any that is free.

        Raises:
            ConfigError: if the run cannot be read.
            OSError: if nothing can listen there.
        """
        run = json.dumps(read_document(file), separators=(",", ":")).encode()
        self._run = Asset("application/json", run)
        super().__init__((_HOST, port), _Handler)
        self.url = f"http://{_HOST}:{self.server_port}/"

    def find(self, path: str) -> Asset | None:
        """What is at a path; None for nothing."""
        if path == "/":
            return Asset("text/html; charset=utf-8", page("run.json").encode())
        if path == "/run.json":
            return self._run
        return asset(path.removeprefix("/"))

    def knows_host(self, host: str) -> bool:
        """Whether a request is meant for this server: web pages may have names that lead here."""
        return host in (f"{_HOST}:{self.server_port}", f"localhost:{self.server_port}")


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        found = self.server.find(self.path.split("?")[0])
        if not self.server.knows_host(self.headers.get("host", "")):
            self._answer(HTTPStatus.FORBIDDEN, Asset("text/plain", b"This host is not served.\n"))
        elif found is None:
            self._answer(HTTPStatus.NOT_FOUND, Asset("text/plain", b"There is nothing here.\n"))
        else:
            self._answer(HTTPStatus.OK, found)

    def _answer(self, status: HTTPStatus, found: Asset) -> None:
        self.send_response(status)
        self.send_header("content-type", found.media_type)
        self.send_header("content-length", str(len(found.content)))
        self.send_header("content-security-policy", POLICY)
        self.send_header("x-content-type-options", "nosniff")
        self.send_header("referrer-policy", "no-referrer")
        self.send_header("cache-control", "no-store")
        self.end_headers()
        self.wfile.write(found.content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing of each request."""
