"""`quire chat` and `quire complete`, against a server of a few lines that repeats what it was asked."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from quire.common.errors import ConfigError
from quire.launch.client import Client


class Echo(BaseHTTPRequestHandler):
    """Answers a chat with the number of messages and the last one, word by word; refuses the word "bad"."""

    seen: list[dict[str, Any]]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": "echo"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)  # type: ignore[attr-defined]
        asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if self.headers["Authorization"] != "Bearer sesame":
            self._answer(401, {"error": {"message": "no key"}})
        elif asked == "endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self._event({"choices": [{"delta": {"content": "on "}, "text": "on "}]})
                    time.sleep(0.01)
        elif asked == "bad":
            self._answer(400, {"error": {"message": "that is bad"}})
        else:
            self.send_response(200)
            self.end_headers()
            words = [f"{len(body.get('messages', []))}", *asked.split(), "\x1b[31m"]
            for word in words:
                text = f"{word} "
                self._event({"choices": [{"delta": {"content": text}} if "messages" in body else {"text": text}]})
            if asked == "broken":
                self._event({"error": {"message": "the engine died"}})
            self._event({"choices": [], "usage": {"completion_tokens": len(words)}})
            self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        server.seen = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def quire(
    server: ThreadingHTTPServer, *words: str, typed: str = "", key: str = "sesame", url: str = ""
) -> subprocess.CompletedProcess[str]:
    command, *options = words
    url = f"--url={url or f'http://127.0.0.1:{server.server_port}/v1'}"
    line = [sys.executable, "-m", "quire.launch.cli", command, *options, url, f"--api-key={key}"]
    return subprocess.run(line, input=typed, capture_output=True, text=True, timeout=30, check=False)


def test_one_question(server: ThreadingHTTPServer) -> None:
    result = quire(server, "chat", "-q", "what is it", "--stats", "--temperature", "0", "--max-tokens", "9")
    assert result.returncode == 0
    assert result.stdout == "1 what is it \x1b[31m \n"  # a pipe gets what was said, byte for byte
    assert "5 tokens" in result.stderr
    asked = server.seen[0]  # type: ignore[attr-defined]
    assert (asked["model"], asked["temperature"], asked["max_tokens"], asked["stream"]) == ("echo", 0.0, 9, True)


def test_a_pipe_is_a_conversation_with_commands(server: ThreadingHTTPServer) -> None:
    result = quire(
        server, "chat", "--system", "be brief", typed="one\n\ntwo\n/reset\nthree\n/system new\nfour\n/exit\nfive\n"
    )
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["2", "one"],
        ["4", "two"],
        ["2", "three"],
        ["2", "four"],
    ]
    last = server.seen[-1]["messages"]  # type: ignore[attr-defined]
    assert [m["content"] for m in last] == ["new", "four"]


def test_a_refused_turn_is_told_and_forgotten(server: ThreadingHTTPServer) -> None:
    result = quire(server, "chat", typed="bad\nbroken\ngood\n")
    assert result.returncode == 1
    assert "that is bad" in result.stderr
    assert "the engine died" in result.stderr
    assert result.stdout.splitlines()[-1].startswith("1 good")


def test_a_missing_key_is_told(server: ThreadingHTTPServer) -> None:
    result = quire(server, "chat", "-q", "hello", key="wrong")
    assert result.returncode == 1
    assert "401" in result.stderr
    assert "--api-key" in result.stderr
    assert "Traceback" not in result.stderr


def test_complete_takes_its_text_from_the_command_or_a_pipe(server: ThreadingHTTPServer) -> None:
    assert quire(server, "complete", "a b", "--echo").stdout.startswith("a b0 a b")
    result = quire(server, "complete", typed="from a pipe")
    assert result.stdout.startswith("0 from a pipe")
    assert result.returncode == 0
    assert quire(server, "complete", "bad").returncode == 1


def test_an_address_needs_no_scheme(server: ThreadingHTTPServer) -> None:
    result = quire(server, "chat", "-q", "hello", url=f"127.0.0.1:{server.server_port}")
    assert result.stdout.startswith("1 hello")


def test_a_server_that_does_not_answer_is_told_from_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{url} does not answer"):
            Client(url, timeout_s=0.2).first_model()
    with pytest.raises(ConfigError, match=f"no server at {url}"):
        Client(url, timeout_s=0.2).first_model()


@pytest.mark.parametrize("command", [["chat", "-q", "endless"], ["chat"], ["complete", "endless"]])
@pytest.mark.parametrize("how", ["Ctrl-C", "the reader leaves"])
def test_a_pipe_ends_quietly(server: ThreadingHTTPServer, command: list[str], how: str) -> None:
    url = f"--url=http://127.0.0.1:{server.server_port}"
    line = [sys.executable, "-m", "quire.launch.cli", *command, url, "--api-key=sesame"]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("endless\nendless\n")
        process.stdin.flush()
        assert process.stdout.read(3) == "on "
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
            rest = threading.Thread(target=process.stdout.read)
            rest.start()
        else:
            process.stdout.close()
        said = process.stderr.read()
        assert process.wait(10) == (130 if how == "Ctrl-C" else 141)
        assert "Traceback" not in said
        assert "Error" not in said


def test_ctrl_c_at_the_prompt_of_a_pipe_ends_it(server: ThreadingHTTPServer) -> None:
    line = [sys.executable, "-m", "quire.launch.cli", "chat", f"--url=http://127.0.0.1:{server.server_port}"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert "/help" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == ""
