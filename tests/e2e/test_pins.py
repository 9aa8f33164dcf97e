"""Prefixes that are pinned, on the real server: what stays cached through a flood, and who may look at it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from .server import Server

BLOCK = 16
KEYS = """
- {name: alice, key: alices-key}
- {name: bob, key: bobs-key}
- {name: root, key: roots-key, scopes: [admin]}
"""
EPHEMERAL = {"type": "ephemeral", "ttl": "1h"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """64 blocks, of which 16 may be pinned."""
    file: Path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(KEYS)
    file.chmod(0o600)
    with Server("--num-gpu-blocks-override", 64, "--max-model-len", 512, "--api-keys-file", file) as server:
        server.http.headers["authorization"] = "Bearer roots-key"
        yield server.wait_ready()


@pytest.fixture(autouse=True)
def nothing_pinned(small: Server) -> None:
    assert small.http.delete("/pins").status_code == 200


def post(server: Server, path: str, body: dict[str, Any], key: str = "alices-key") -> httpx.Response:
    return server.http.post(path, json={"max_tokens": 1, **body}, headers={"authorization": f"Bearer {key}"})


def cached(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    count: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return count


def ask(server: Server, prompt: list[int], key: str = "alices-key", **fields: Any) -> int:
    """How many of its tokens were cached."""
    return cached(post(server, "/v1/completions", {"prompt": prompt, **fields}, key))


def flood(server: Server) -> None:
    """Twice as much as there is room for."""
    for start in range(100, 116):
        ask(server, [start, *range(8 * BLOCK)], "bobs-key")


PREFIX = [7, *range(4 * BLOCK)]


def test_what_is_pinned_survives_a_flood_and_what_is_not_does_not(small: Server) -> None:
    ask(small, PREFIX)
    flood(small)
    assert ask(small, PREFIX) == 0
    ask(small, PREFIX, cache_control=EPHEMERAL)
    flood(small)
    assert ask(small, PREFIX) == 4 * BLOCK
    assert ask(small, PREFIX, "bobs-key") == 0, "prefixes are not shared between keys, pinned or not"
    assert small.metric("quire:kv_blocks_pinned") == 4
    small.http.delete("/pins")
    flood(small)
    assert ask(small, PREFIX) == 0 and small.metric("quire:kv_blocks_pinned") == 0


def test_a_marked_message_is_pinned_and_no_more(small: Server) -> None:
    marked = [{"type": "text", "text": "You are a helpful assistant. " * 8, "cache_control": EPHEMERAL}]

    def chat(question: str) -> int:
        messages = [{"role": "system", "content": marked}, {"role": "user", "content": question}]
        return cached(post(small, "/v1/chat/completions", {"messages": messages}))

    chat("How are you? " * 10)
    [pin] = small.http.get("/pins").json()["pins"]
    for question in ("How are you? ", "What is it? "):
        flood(small)
        assert chat(question * 10) == pin["tokens"] > BLOCK
    assert small.http.get("/pins").json()["count"] == 1


def test_tenants_share_what_may_be_pinned(small: Server) -> None:
    for start in range(6):
        ask(small, [start, *range(8 * BLOCK)], "bobs-key", cache_control=EPHEMERAL)
    told = small.http.get("/pins").json()
    assert (told["blocks"], told["max_blocks"], {pin["tenant"] for pin in told["pins"]}) == (16, 16, {"bob"})
    for start in range(6):
        ask(small, [start, *range(4 * BLOCK)], cache_control=EPHEMERAL)
        ask(small, [start, *range(8 * BLOCK)], "bobs-key", cache_control=EPHEMERAL)
    pins = small.http.get("/pins").json()["pins"]
    assert {name: sum(pin["blocks"] for pin in pins if pin["tenant"] == name) for name in ("alice", "bob")} == {
        "alice": 8,
        "bob": 8,
    }
    assert small.metric("quire:kv_blocks_unpinned_total", why="quota") > 0


def test_a_request_that_fills_the_cache_takes_what_is_pinned(small: Server) -> None:
    ask(small, PREFIX, cache_control=EPHEMERAL)
    answers = [
        post(small, "/v1/completions", {"prompt": [start] * 480, "n": 4, "max_tokens": 32, "ignore_eos": True})
        for start in (1, 2)
    ]
    assert all(answer.json()["usage"]["completion_tokens"] == 4 * 32 for answer in answers)


def test_operators_alone_see_pins_and_end_them(small: Server) -> None:
    ask(small, PREFIX, cache_control=EPHEMERAL)
    ask(small, PREFIX, "bobs-key", cache_control={"type": "ephemeral"})
    for method in ("GET", "DELETE"):
        answer = small.http.request(method, "/pins", headers={"authorization": "Bearer alices-key"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "scope_missing")
        assert httpx.request(method, f"{small.url}/pins").status_code == 401
    bobs, alices = small.http.get("/pins").json()["pins"]
    assert bobs.items() >= {"tenant": "bob", "tokens": 4 * BLOCK, "blocks": 4}.items() and 0 < bobs["expires_in"] <= 300
    assert alices["tenant"] == "alice" and 300 < alices["expires_in"] <= 3600
    assert small.http.delete(f"/pins?id={alices['id']}").json()["pins"][0]["tenant"] == "alice"
    assert small.http.delete("/pins?tenant=alice").json()["count"] == 0
    assert small.http.delete("/pins?tenant=bob").json()["count"] == 1
    assert small.http.get("/pins").json() == {"count": 0, "blocks": 0, "max_blocks": 16, "pins": []}


@pytest.mark.parametrize("mark", [{"type": "ephemeral", "ttl": "1d"}, {"type": "forever"}, "1h"])
def test_another_shape_is_refused(small: Server, mark: Any) -> None:
    answer = post(small, "/v1/completions", {"prompt": PREFIX, "cache_control": mark})
    assert answer.status_code == 400 and "cache_control" in answer.json()["error"]["param"]
