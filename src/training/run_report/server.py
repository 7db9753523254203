"""Serves a report on the loopback interface: the page, and a word that changes when a newer page is to be had."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from training.run_report.build import RunReport

HOST = "127.0.0.1"
_NAMES = ("127.0.0.1", "localhost", "[::1]")


def open_server(report: RunReport, port: int) -> ThreadingHTTPServer:
    """A server of ``report`` on ``port`` (0: any free one); ``serve_forever`` runs it. OSError: it is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Another site's name that leads here must not read the page.
            if self.headers.get("Host", "").rsplit(":", 1)[0] not in _NAMES:
                return self._answer(403, "text/plain", "this server answers to localhost alone")
            path = self.path.partition("?")[0]
            if path not in ("/", "/signature"):
                return self._answer(404, "text/plain", "there is one page, /")
            try:
                if path == "/signature":
                    return self._answer(200, "text/plain", report.signature())
                return self._answer(200, "text/html", report.served())
            except (ValueError, OSError) as error:
                return self._answer(503, "text/plain", str(error))

        def _answer(self, code: int, kind: str, text: str) -> None:
            content = text.encode("utf-8", "backslashreplace")
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Requests are not logged."""

    return ThreadingHTTPServer((HOST, port), Handler)
