#!/usr/bin/env python3
"""Serves chat.html, and the gateway below /v1/ at the same origin:  python3 examples/serve.py [PORT]

BASE is the gateway. For trying the page: in production the load balancer does both.
"""

import http.client
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

BASE = urlsplit(os.environ.get("BASE", "http://127.0.0.1:8080"))
PAGE = Path(__file__).with_name("chat.html")
OF_THE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "host"}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/v1/"):
            return self.forward()
        if urlsplit(self.path).path != "/":
            return self.send_error(404)
        page = PAGE.read_bytes()
        self.send_response(200)
        self.send_header("content-type", "text/html; charset=utf-8")
        self.send_header("content-length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def forward(self):
        connect = http.client.HTTPSConnection if BASE.scheme == "https" else http.client.HTTPConnection
        gateway = connect(BASE.netloc, timeout=60)
        try:
            body = self.rfile.read(int(self.headers.get("content-length", 0))) or None
            gateway.request(self.command, BASE.path + self.path, body, passed_on(self.headers))
            answer = gateway.getresponse()
        except (OSError, http.client.HTTPException) as error:
            return self.send_error(502, explain=f"The gateway at {BASE.geturl()} does not answer: {error}")
        self.send_response_only(answer.status)
        for name, value in passed_on(answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            while piece := answer.read1():  # as soon as it is there, or a stream would not look like one
                self.wfile.write(piece)
        except (OSError, http.client.HTTPException):
            pass  # either side left
        finally:
            gateway.close()

    do_POST = do_PATCH = do_DELETE = forward

    def log_message(self, *_):
        pass


def passed_on(headers):
    return {name: value for name, value in headers.items() if name.lower() not in OF_THE_CONNECTION}


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8000), Handler)
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
