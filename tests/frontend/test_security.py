"""Keys and their scopes, host names, and what one key may learn of another."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.routing import Match

from quire.common.config import ServerConfig
from quire.common.errors import EXIT_CONFIG
from quire.common.keys import configured
from quire.common.messages import Quota
from quire.frontend import routes
from quire.frontend.middleware import OPEN_PATHS, scope_of
from quire.frontend.openai import chat, completions, models

from .fake_scheduler import FakeScheduler, frontend_process, http, until, wait_ready
from .raw import request

KEYS = ("first-key", "second-kéy")
FILE = """
- {name: alice, key: alices-key, requests_per_minute: 60, tokens_per_minute: 5000}
- {name: bob, key: bobs-key, scopes: [inference]}
- {name: prometheus, key: prometheus-key, scopes: [admin]}
- {name: root, key: roots-key, scopes: [inference, admin]}
"""
INFERENCE = [
    "/v1/models",
    "/v1/models/tiny",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/nothing",
    "/tokenize",
    "/detokenize",
]
ADMIN = [
    "/metrics",
    "/version",
    "/openapi.json",
    "/docs",
    "/nothing",
    "/",
    "//v1/models",
    "/V1/models",
    "/v1",
    "/tokenize/",
    "/health/",
]
# As they stand in the request line: what a client library would tidy up.
TARGETS = [
    *INFERENCE,
    *ADMIN,
    *("/v1/../v1/models", "/v1/./models", "/health/../v1/models", "/health/x", "/health%2F..%2Fv1/models", "/%68ealth/..", "/health%00", "/health%0A"),
    *("/metrics%0A", "/v1%2Fmodels", "/%2Fv1/models", "/v1/models?/health", "/v1/models#/health", "/v1/models;/health", "/\\health"),
    *("http://localhost/v1/models", "http://evil.example/v1/models", "http://localhost/health/../metrics", "HTTP://localhost//v1/models"),
    *("/v1/models?x=http://localhost/health", "http://user@localhost/v1/models", "http://localhost:1/metrics"),
]  # fmt: skip
METHODS = ["GET", "POST", "OPTIONS", "HEAD", "PUT", "DELETE", "TRACE", "PROPFIND"]
HOSTS = [
    "localhost",
    "localhost/health",
    "localhost/health?",
    "localhost:80/health#",
    "localhost/ready",
    "[::1]/health",
]


@pytest.fixture(scope="module")
def guarded(make_scheduler) -> Iterator[tuple[FakeScheduler, str]]:
    options = ServerConfig(api_key=tuple(map(configured, KEYS)), strict_fields=True, max_body_bytes=2048)
    with make_scheduler(options) as scheduler, frontend_process(scheduler.address) as (_, url):
        wait_ready(url)
        yield scheduler, url


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.touch(0o600)
    path.write_text(FILE)
    return path


@pytest.fixture(scope="module")
def filed(make_scheduler, keys_file: Path) -> Iterator[tuple[FakeScheduler, str]]:
    options = ServerConfig(api_key=tuple(map(configured, KEYS)), api_keys_file=str(keys_file))
    with make_scheduler(options) as scheduler, frontend_process(scheduler.address) as (_, url):
        wait_ready(url)
        yield scheduler, url


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + key.encode()}


@pytest.mark.parametrize("target", TARGETS)
def test_every_route_but_the_probes_asks_for_a_key(guarded, target: str) -> None:
    wrong = ["first-ke", "first-keyx", "FIRST-KEY", "first-key second-key", configured(KEYS[0]), ""]
    headers = [
        *(f"Authorization: Bearer {key}" for key in wrong),
        f"Authorization: {KEYS[0]}",
        f"Authorization: Basic {KEYS[0]}",
    ]
    for method in METHODS:
        answer = request(guarded[1], method, target)
        assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert (answer.json()["error"]["code"] == "invalid_api_key") if method != "HEAD" else not answer.body
    for header in (*headers, "X-Api-Key: first-key", "Cookie: key=first-key"):
        assert request(guarded[1], "GET", target, header).status == 401
    for host in HOSTS:
        assert request(guarded[1], "GET", target, host=host).status in (401, 403)


def test_targets_that_are_none(guarded) -> None:
    for method, target in (
        ("OPTIONS", "*"),
        ("CONNECT", "localhost:80"),
        ("GET", "v1/models"),
        ("GET", "http://"),
        ("GET", "http://localhost"),
    ):
        assert request(guarded[1], method, target).status in (400, 401)


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(guarded, key: str) -> None:
    for path in ("/v1/models", "/metrics", "/version"):
        assert http.get(guarded[1] + path, headers=bearer(key)).status_code == 200
    assert (
        http.get(f"{guarded[1]}/v1/models", headers={b"authorization": b"bearer  " + key.encode()}).status_code == 200
    )


@pytest.mark.parametrize("path", ["/health", "/ready", "/startup"])
def test_probes_are_open(guarded, filed, path: str) -> None:
    for _, url in (guarded, filed):
        assert http.get(url + path).status_code == 200
        assert http.get(url + path, headers=bearer("wrong")).status_code == 200


@pytest.mark.parametrize("path", [*INFERENCE, *ADMIN])
def test_each_path_has_its_scope(filed, path: str) -> None:
    needed = "inference" if path in INFERENCE else "admin"
    for key, scopes in (
        ("bobs-key", {"inference"}),
        ("prometheus-key", {"admin"}),
        ("roots-key", {"inference", "admin"}),
        (KEYS[0], {"inference", "admin"}),
    ):
        for method in ("GET", "POST", "OPTIONS"):
            answer = request(filed[1], method, path, f"Authorization: Bearer {key}")
            assert (answer.status == 403) == (needed not in scopes)
            if answer.status == 403:
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("permission_error", "scope_missing")
                assert needed in error["message"] and key not in error["message"]
    assert request(filed[1], "GET", path).status == 401


ROUTES = [route for module in (routes, models, completions, chat) for route in module.router.routes]


@given(
    path=st.builds(
        "".join,
        st.tuples(st.sampled_from(["", "/", *INFERENCE, *ADMIN, *OPEN_PATHS]), st.text("/v1.health\n\r%", max_size=4)),
    )
)
def test_no_path_is_open_or_inferences_unless_its_route_is(path: str) -> None:
    """What the router matches must not be more than what the guard has read."""
    needed = scope_of(path)
    scope = {"type": "http", "path": path, "method": "GET", "headers": [], "root_path": ""}
    matched = {route.path for route in ROUTES if route.matches(scope)[0] != Match.NONE}
    if needed is None:
        assert matched <= OPEN_PATHS
    elif needed == "inference":
        assert all(route.startswith("/v1/") or route in ("/tokenize", "/detokenize") for route in matched)


def test_a_file_names_tenants_and_their_quotas(filed) -> None:
    scheduler, url = filed
    scheduler.submits.clear()
    for key in ("alices-key", "bobs-key", KEYS[0]):
        body = {"prompt": "hello", "max_tokens": 1, "user": "somebody else", "cache_salt": "s"}
        http.post(f"{url}/v1/completions", json=body, headers=bearer(key)).raise_for_status()
    alice, bob, option = scheduler.submits
    assert (alice.tenant, alice.salt, alice.quota) == ("alice", "alice:s", Quota(60, 5000))
    assert (bob.tenant, bob.salt, bob.quota) == ("bob", "bob:s", Quota())
    assert option.tenant == configured(KEYS[0])[7:23] and option.quota == Quota()


def test_keys_come_and_go_while_the_server_runs(filed, keys_file: Path) -> None:
    url = filed[1]

    def status(key: str) -> int:
        return http.get(f"{url}/v1/models", headers=bearer(key)).status_code

    assert (status("bobs-key"), status("carols-key")) == (200, 401)
    try:
        keys_file.write_text("- {name: carol, key: carols-key}")
        until(lambda: (status("bobs-key"), status("carols-key")) == (401, 200))
        keys_file.write_text("")
        keys_file.chmod(0o644)
        assert (status("carols-key"), status("none")) == (200, 401)  # nobody gets in by what is not there
    finally:
        keys_file.chmod(0o600)
        keys_file.write_text(FILE)
    until(lambda: (status("bobs-key"), status("carols-key")) == (200, 401))
    assert status(KEYS[0]) == 200


def test_a_bad_keys_file_ends_the_process(make_scheduler, tmp_path: Path) -> None:
    with (
        make_scheduler(ServerConfig(api_keys_file=str(tmp_path / "absent.yaml"))) as scheduler,
        frontend_process(scheduler.address) as (process, _),
    ):
        assert process.wait(20) == EXIT_CONFIG


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
