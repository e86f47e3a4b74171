#!/usr/bin/env python3
"""A chat in the terminal, with nothing but Python 3.9:  python3 examples/chat.py [TEXT]

Without TEXT it asks for one message after the other. Ctrl-C stops the reply.
BASE is the gateway, TOKEN a key or token for it, CHAT_USER the user who speaks.
"""

import http.client
import json
import os
import random
import sys
import time
import uuid
from urllib.error import HTTPError
from urllib.parse import quote, urljoin
from urllib.request import Request, urlopen

SILENCE = float(os.environ.get("SILENCE", 45))  # seconds; the gateway sends a comment every 15
ATTEMPTS = 5  # in a row that bring nothing new
ENDS = {"run.completed", "run.incomplete", "run.failed", "run.cancelled", "run.expired"}


class Conversation:
    """The one conversation of a user."""

    def __init__(self, base, user, token=None):
        self.scope = f"{base}/v1/users/{quote(user, safe='')}"
        self.headers = {"authorization": f"Bearer {token}"} if token else {}
        self.run = None  # the id of the run that answers

    def call(self, method, url, body=None, **headers):
        data = None if body is None else json.dumps(body).encode()
        headers = {name.replace("_", "-"): value for name, value in headers.items() if value}
        headers |= self.headers | ({"content-type": "application/json"} if data else {})
        return urlopen(Request(url, data, headers, method=method), timeout=SILENCE)

    def say(self, content, strategy="enqueue"):
        """Sends a message once, and yields each event (name, data) of its run once, whatever breaks."""
        key, message = str(uuid.uuid4()), {"content": content, "multitask_strategy": strategy, "stream": True}
        self.run = events_url = last_id = None
        failure, attempt = ConnectionError("each stream ended before its run"), 0
        while True:
            attempt += 1
            pause = None
            try:
                if events_url is None:  # the key makes a repeat harmless
                    answer = self.call("POST", f"{self.scope}/messages", message, idempotency_key=key)
                else:
                    answer = self.call("GET", events_url, last_event_id=last_id)
                with answer:
                    for event_id, name, data in server_sent_events(answer):
                        if name == "stream.reconnect":  # this replica stops, and another one continues
                            events_url = urljoin(self.scope, data["events"])
                            continue
                        if self.run is None:
                            self.run = data["run_id"]
                            events_url = f"{self.scope}/runs/{self.run}/events"
                        last_id, attempt = event_id, 0
                        yield name, data
                        if name in ENDS:
                            return
            except HTTPError as error:
                failure, error.problem = error, problem_of(error)
                # A problem with a run tells how the run ended: there is nothing to wait for.
                if error.code not in (429, 502, 503) or "run_id" in error.problem:
                    raise
                pause = error.headers.get("retry-after")
            except (OSError, http.client.HTTPException) as error:  # broken, or silent for too long
                failure = error
            if attempt == ATTEMPTS:
                raise failure
            time.sleep(float(pause or random.uniform(0.25, 0.5) * 2**attempt))

    def cancel(self):
        """Ends the run that answers. The text so far stays in the transcript, and the model knows it."""
        with self.call("POST", f"{self.scope}/runs/{self.run}/cancel") as answer:
            return json.load(answer)["run"]


def server_sent_events(lines):
    fields = {}
    for line in lines:
        name, _, value = line.decode().rstrip("\r\n").partition(":")
        if name:  # the gateway writes `data` on one line
            fields[name] = value.strip()
        elif not line.strip():
            if "data" in fields:
                yield fields.get("id"), fields["event"], json.loads(fields["data"])
            fields = {}


def problem_of(error):
    try:
        return json.loads(error.read())
    except ValueError:  # not the gateway's answer
        return {}


def reply(chat, text):
    """Prints the reply as it comes, and tells whether it is whole."""
    try:
        for name, data in chat.say(text):
            if name == "run.queued":
                print(f"(place {data['position']} in the queue)", file=sys.stderr)
            elif name == "message.delta":
                print(data["text"], end="", flush=True)
            elif name in ENDS:
                run = data["run"]
    except KeyboardInterrupt:
        if chat.run is None:
            raise
        run = chat.cancel()
    print()
    if run["status"] != "completed":
        why = (run["error"] or {}).get("message", "")
        print(f"({run['status']}) {why}", file=sys.stderr)
    return run["status"] == "completed"


def main():
    base = os.environ.get("BASE", "http://127.0.0.1:8080")
    chat = Conversation(base, os.environ.get("CHAT_USER", "example"), os.environ.get("TOKEN"))
    try:
        if len(sys.argv) > 1:
            sys.exit(0 if reply(chat, " ".join(sys.argv[1:])) else 1)
        while True:
            text = input("> ").strip()
            if text:
                reply(chat, text)
    except HTTPError as error:
        sys.exit(f"{error.code}: {error.problem.get('detail', error.reason)}")
    except OSError as error:
        sys.exit(f"{base}: {error}")
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    main()
