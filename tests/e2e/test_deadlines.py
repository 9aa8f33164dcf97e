"""Requests that run out of time, with the built-in model: what clients see, and that nothing is left of them."""

from collections.abc import Iterator

import httpx
import msgspec
import pytest

from .server import Server, wait_until

LONG = {"model": "demo", "prompt": "x", "max_tokens": 2000, "ignore_eos": True}  # takes seconds


@pytest.fixture(scope="module")
def narrow() -> Iterator[Server]:
    """Serves one sequence at a time, and none for longer than a second unless it asks for more."""
    with Server("--max-num-seqs", 1, "--request-timeout", 1) as server:
        yield server.wait_ready()


def timed_out(server: Server, phase: str) -> float:
    try:
        return server.metric("quire:requests_timed_out_total", phase=phase)
    except AssertionError:  # a labelled metric is not there before its first event
        return 0


def ask(server: Server, **fields: object) -> httpx.Response:
    return server.http.post("/v1/completions", json=LONG | fields)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("fields", [{}, {"timeout": 0.3}], ids=["the server's", "its own"])
def test_who_runs_for_too_long_ends_and_frees_its_blocks(
    narrow: Server, stream: bool, fields: dict[str, float]
) -> None:
    before = timed_out(narrow, "running")
    answer = ask(narrow, stream=stream, **fields)
    if stream:
        *chunks, last = [msgspec.json.decode(line[6:]) for line in answer.text.split("\n\n") if line]
        assert answer.status_code == 200 and chunks and last["error"]["code"] == "timeout"
    else:
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    assert f"timeout of {fields.get('timeout', 1)} s" in answer.text
    assert timed_out(narrow, "running") == before + 1
    assert narrow.metric("quire:kv_blocks_free") == narrow.metric("quire:kv_blocks")
    assert narrow.metric("vllm:num_requests_running") == 0
    assert ask(narrow, max_tokens=1).status_code == 200


def test_who_waits_for_too_long_is_dropped_before_anything_is_computed(narrow: Server) -> None:
    with narrow.http.stream("POST", "/v1/completions", json=LONG | {"timeout": 60, "stream": True}) as running:
        lines = running.iter_lines()
        next(lines)
        computed, waiting = narrow.metric("vllm:prompt_tokens_total"), timed_out(narrow, "waiting")
        late = ask(narrow, timeout=0.2)
        hasty = ask(narrow, max_queue_time=0.2, timeout=50)
        assert narrow.metric("vllm:num_requests_running") == 1, "the test is too slow for its long request"
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        assert (hasty.status_code, hasty.json()["error"]["code"]) == (503, "queue_timeout")
        assert int(hasty.headers["retry-after"]) >= 1
        assert timed_out(narrow, "waiting") == waiting + 2
        assert narrow.metric("vllm:prompt_tokens_total") == computed
    wait_until(lambda: narrow.metric("vllm:num_requests_running") == 0)


def test_a_sequence_that_has_begun_may_take_its_time(narrow: Server) -> None:
    answer = ask(narrow, max_queue_time=0.3, timeout=60, max_tokens=250)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 250
