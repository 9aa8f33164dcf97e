"""Keys, host names, and what one key may learn of another."""

import socket
from collections.abc import Iterator

import pytest

from quire.common.config import ServerConfig
from quire.common.keys import configured

from .fake_scheduler import FakeScheduler, frontend_process, http, wait_ready

KEYS = ("first-key", "second-kéy")
PATHS = [
    "/v1/models",
    "/v1/models/tiny",
    "/metrics",
    "/version",
    "/v1/completions",
    "/tokenize",
    "/nothing",
    "//v1/models",
    "/v1/../v1/models",
    "/health/",
    "/health/x",
    "/%68ealth/..",
    "/",
]


@pytest.fixture(scope="module")
def guarded(make_scheduler) -> Iterator[tuple[FakeScheduler, str]]:
    with (
        make_scheduler(
            ServerConfig(api_key=tuple(map(configured, KEYS)), strict_fields=True, max_body_bytes=2048)
        ) as scheduler,
        frontend_process(scheduler.address) as (_, url),
    ):
        wait_ready(url)
        yield scheduler, url


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + key.encode()}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
def test_every_route_but_the_probes_asks_for_a_key(guarded, path: str, method: str) -> None:
    url = guarded[1]
    wrong = ["first-ke", "first-keyx", "FIRST-KEY", "first-key second-key", configured(KEYS[0])]
    for headers in (
        {},
        *(bearer(key) for key in wrong),
        {"authorization": KEYS[0]},
        {"authorization": f"Basic {KEYS[0]}"},
    ):
        answer = http.request(method, url + path, headers=headers)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(guarded, key: str) -> None:
    assert http.get(f"{guarded[1]}/v1/models", headers=bearer(key)).status_code == 200
    assert http.get(f"{guarded[1]}/v1/models", headers={b"authorization": b"bearer " + key.encode()}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_are_open(guarded, path: str) -> None:
    assert http.get(guarded[1] + path).status_code == 200


def test_keys_do_not_share_prefixes(guarded) -> None:
    scheduler, url = guarded
    scheduler.submits.clear()
    for key in (*KEYS, KEYS[0]):
        for salt in ("", "mine"):
            http.post(
                f"{url}/v1/completions",
                json={"prompt": "hello", "cache_salt": salt, "max_tokens": 1},
                headers=bearer(key),
            ).raise_for_status()
    salts = [submit.salt for submit in scheduler.submits]
    assert salts[:2] == salts[4:] and len(set(salts)) == 4
    tenants = [submit.tenant for submit in scheduler.submits]
    assert len(set(tenants)) == 2 and not any(key in field for field in (*salts, *tenants) for key in KEYS)


def test_strict_fields(guarded) -> None:
    answer = http.post(f"{guarded[1]}/v1/completions", json={"prompt": "a", "temprature": 1}, headers=bearer(KEYS[0]))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "temprature"


def test_the_configured_body_limit(guarded) -> None:
    answer = http.post(f"{guarded[1]}/v1/completions", json={"prompt": "a" * 3000}, headers=bearer(KEYS[0]))
    assert answer.status_code == 413 and "2048" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_loopback_names_are_answered(url: str, host: str) -> None:
    port = url.rpartition(":")[2]
    assert http.get(f"{url}/v1/models", headers={"host": f"{host}:{port}"}).status_code == 200
    assert http.get(f"{url}/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "x/health",
        "localhost@evil.example",
        "",
    ],
)
def test_other_names_are_not(url: str, host: str) -> None:
    for path in ("/v1/models", "/health"):
        answer = http.get(url + path, headers={"host": host})
        assert answer.status_code == 403 and answer.json()["error"]["type"] == "permission_error"


def test_no_header_opens_other_origins(url: str) -> None:
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = http.options(f"{url}/v1/completions", headers=asked)
    assert answer.status_code == 405 and not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("given", "kept"), [("req-1", True), ("a" * 129, False), ("a b", False), ("<script>", False)])
def test_request_ids(url: str, given: str, kept: bool) -> None:
    answer = http.get(f"{url}/health", headers={"x-request-id": given})
    assert (answer.headers["x-request-id"] == given) == kept and answer.headers["x-request-id"]
    assert "server" not in answer.headers


def test_an_upgrade_to_websocket_is_an_ordinary_request(guarded) -> None:
    host, port = guarded[1].removeprefix("http://").split(":")
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\nSec-WebSocket-Version: 13\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head)
        assert connection.recv(64).startswith(b"HTTP/1.1 401")
