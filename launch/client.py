"""A small client of an OpenAI-compatible server, for the terminal commands."""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from ..common.errors import ConfigError, RequestError

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 5.0


def add_client_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help=f"The server. Default: {DEFAULT_URL}.")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("QUIRE_API_KEY", "").partition(",")[0],
        help="Its key, if it asks for one. [QUIRE_API_KEY]",
    )
    parser.add_argument("--model", metavar="NAME", help="Default: the first model that the server lists.")
    parser.add_argument("--max-tokens", metavar="N", type=int, help="Most tokens of an answer. Default: the server's.")
    parser.add_argument(
        "--temperature", metavar="T", type=float, help="0 always takes the likeliest token. Default: the model's."
    )
    parser.add_argument(
        "--top-p", metavar="P", type=float, help="Sample from the likeliest tokens that hold this much probability."
    )
    parser.add_argument("--seed", metavar="N", type=int, help="The same seed gives the same answer.")
    parser.add_argument("--stats", action="store_true", help="Show tokens, tokens per second and time to first token.")


def sampling_of(values: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of sampling; silence leaves it to the server."""
    named = {name: getattr(values, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    return {name: value for name, value in named.items() if value is not None}


@dataclass(slots=True)
class Stats:
    """Of one answer, filled while it streams."""

    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0
    tokens: int = 0

    def __str__(self) -> str:
        if self.first is None:
            return "no tokens"
        span = self.last - self.first
        rate = f"{(self.tokens - 1) / span:.1f} tokens/s, " if self.tokens > 1 and span > 0 else ""
        return f"{self.tokens} tokens, {rate}first after {self.first - self.began:.2f} s"


class Client:
    """Raises ConfigError when there is no server, RequestError with the server's own words when it refuses."""

    def __init__(self, url: str, api_key: str = "", *, timeout_s: float = TIMEOUT_S) -> None:
        """`timeout_s`: to connect, and for an answer that needs no model; one of the model may take as long as it takes."""
        url = url if "://" in url else f"http://{url}"
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._http = httpx.Client(
                base_url=self.url, headers=headers, timeout=httpx.Timeout(None, connect=timeout_s)
            )
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise ConfigError(f"--url {url}: {error}") from None

    def first_model(self) -> str:
        try:
            response = self._http.get("/v1/models", timeout=self._timeout_s)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None
        models = _checked(response).get("data") or []
        if not models:
            raise ConfigError(f"{self.url} lists no model")
        return str(models[0]["id"])

    def stream(self, path: str, body: dict[str, Any], stats: Stats) -> Iterator[str]:
        """The text of an answer, piece by piece. Closing the iterator makes the server stop."""
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    _checked(response)
                for event in _events(response):
                    stats.tokens = (event.get("usage") or {}).get("completion_tokens", stats.tokens)
                    if text := _text_of(event):
                        stats.last = time.monotonic()
                        stats.first = stats.first or stats.last
                        yield text
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> ConfigError:
        if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout):
            return ConfigError(
                f"{self.url} does not answer: the connection was taken, and nothing came for {self._timeout_s:g} s"
            )
        if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
            return ConfigError(f"{self.url} closed the connection: {error}")
        return ConfigError(
            f"there is no server at {self.url} ({error}); start one with `quire serve`, or name another with --url"
        )

    def close(self) -> None:
        self._http.close()


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if data:
            event = json.loads(data)
            if "error" in event:
                raise RequestError(event["error"].get("message", data), status=500)
            yield event


def _text_of(event: dict[str, Any]) -> str:
    """Of a chat or a completion chunk."""
    choices = event.get("choices") or [{}]
    return str((choices[0].get("delta") or {}).get("content") or choices[0].get("text") or "")


def _checked(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except json.JSONDecodeError:
        body = {}
    if response.status_code == httpx.codes.OK and isinstance(body, dict):
        return body
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else response.text[:200]
    hint = "; give it with --api-key" if response.status_code == httpx.codes.UNAUTHORIZED else ""
    raise RequestError(f"the server answered {response.status_code}: {message}{hint}", status=response.status_code)
