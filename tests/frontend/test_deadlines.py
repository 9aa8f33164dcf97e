"""Requests whose time is over: what their clients are told, whoever notices it."""

import asyncio
import itertools
import time
from types import SimpleNamespace
from typing import Any

import msgspec
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI

from quire.common.config import ServerConfig
from quire.common.errors import RequestError
from quire.common.messages import MAX_TIMEOUT_S, Output, Quota, Status, Submit
from quire.common.sampling import SamplingParams
from quire.frontend.keys import _NAME, KeyRing
from quire.frontend.openai.protocol import CompletionRequest
from quire.frontend.openai.requests import routing_of, wire_salt
from quire.frontend.sequences import _PATIENCE_S, Sequences
from quire.frontend.streams import Routing, TokenStream

from .fake_scheduler import FakeScheduler, http
from .sequence_client import connected, expected, ids, until

SECONDS = st.floats(0.001, MAX_TIMEOUT_S)
TEXT = st.text("a:", max_size=4) | st.text(max_size=4)
PRINCIPALS = st.sampled_from(["", "a", "aa"]) | st.from_regex(_NAME, fullmatch=True)


def routed(principal: str = "", options: ServerConfig | None = None, **fields: Any) -> Routing:
    client = SimpleNamespace(config=SimpleNamespace(server=options or ServerConfig()))
    app = SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(client=client)))
    state = {"principal": principal, "quota": Quota(), "arrived_at": 5.0}
    request = SimpleNamespace(scope={"state": state}, app=app)
    return routing_of(request, CompletionRequest.model_validate(fields))  # type: ignore[arg-type]


@given(PRINCIPALS, TEXT)
def test_no_two_pairs_of_key_and_salt_share_prefixes(principal: str, salt: str) -> None:
    """From what goes over the wire follow both."""
    sent = wire_salt(principal, salt)
    key, _, rest = sent.partition(":")
    assert (key, rest) == (principal, salt)
    assert routed(principal, cache_salt=salt).salt == sent


def test_what_is_no_key_s_name_holds_the_border() -> None:
    """Names in a keys file have no colon, nor do digests, which are the names of keys without one."""
    assert not _NAME.fullmatch("a:b") and ":" not in KeyRing(["a:b"]).current(0.0)[0].tenant


@given(PRINCIPALS, TEXT)
def test_a_tenant_is_the_key_and_a_user_where_there_are_none(principal: str, user: str) -> None:
    assert routed(principal, user=user).tenant == (principal or user)


@given(st.none() | SECONDS, st.none() | SECONDS, st.none() | SECONDS, st.none() | SECONDS)
def test_a_request_s_own_limits_go_before_the_server_s(
    timeout: float | None, queue: float | None, server_timeout: float | None, server_queue: float | None
) -> None:
    options = ServerConfig(request_timeout=server_timeout, max_queue_time=server_queue)
    routing = routed(options=options, timeout=timeout, max_queue_time=queue)
    assert routing.timeout_s == (timeout or server_timeout or 0.0)
    assert routing.max_queue_s == (queue or server_queue or 0.0)
    assert routing.arrival == 5.0


# --- what clients see -------------------------------------------------------------------------------------------------


def timed_out(submit: Submit) -> Output:
    """It had two tokens by then if a client wants them as they come."""
    return Output(submit.id, 0, [5, 6], "timeout", error="the request's timeout is over")


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_timeout_is_504_and_not_to_be_repeated(url: str, engine: FakeScheduler, path: str) -> None:
    engine.answer = timed_out
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "timeout": 3}
    answer = http.post(f"{url}/v1/{path}", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (504, "timeout_error", "timeout")
    assert "timeout of 3 s" in error["message"] and answer.headers["x-should-retry"] == "false"


def test_a_stream_shows_what_there_is_and_then_why_it_ends(url: str, engine: FakeScheduler) -> None:
    engine.answer = timed_out
    answer = http.post(f"{url}/v1/completions", json={"prompt": "x", "timeout": 3, "stream": True})
    events = [msgspec.json.decode(line[6:]) for line in answer.text.split("\n\n") if line]
    assert answer.status_code == 200 and events[-1]["error"]["code"] == "timeout"
    assert len(events) == 2 and events[0]["choices"][0]["text"] and events[0]["choices"][0]["finish_reason"] is None
    engine.answer = lambda submit: Output(submit.id, 0, [], "timeout")
    assert http.post(f"{url}/v1/completions", json={"prompt": "x", "timeout": 3, "stream": True}).status_code == 504


def test_the_openai_client_repeats_what_waited_too_long_and_not_what_took_too_long(
    url: str, engine: FakeScheduler
) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1)
    engine.answer = timed_out
    with pytest.raises(openai.InternalServerError, match="timeout of 3 s"):
        client.completions.create(model="tiny", prompt="x", extra_body={"timeout": 3})
    assert len(engine.submits) == 1
    engine.submits.clear()
    engine.answer = lambda submit: Output(
        submit.id, 0, [], "timeout", error="late", rejection="expired", retry_after_s=0.3
    )
    with pytest.raises(openai.InternalServerError, match=r"max_queue_time of 2\.5 s") as caught:
        client.completions.create(model="tiny", prompt="x", extra_body={"max_queue_time": 2.5})
    assert (caught.value.status_code, caught.value.code) == (503, "queue_timeout")
    assert caught.value.response.headers["retry-after"] == "1" and len(engine.submits) == 2


# --- while there is no scheduler that would notice --------------------------------------------------------------------


def stream(**routing: float) -> TokenStream:
    params = SamplingParams(max_tokens=9, seed=0)
    limits = Routing(arrival=100.0, **routing)  # type: ignore[arg-type]
    return TokenStream([1], params, limits, abort=lambda _: None, wake=asyncio.Event())


@given(st.floats(0.1, 50), st.floats(0.1, 50), st.floats(0.0, 60), st.booleans(), st.booleans())
def test_nobody_waits_for_longer_than_it_said(
    timeout_s: float, max_queue_s: float, waited_s: float, held: bool, begun: bool
) -> None:
    sequences, now = Sequences(), 100.0 + waited_s
    one, patient = stream(timeout_s=timeout_s, max_queue_s=max_queue_s), stream()
    sequences.add(one)
    sequences.add(patient)
    [submit, _] = sequences.due(100.0)
    assert (submit.timeout_s, submit.max_queue_s) == (timeout_s, max_queue_s)
    if begun:
        sequences.accept(Output(submit.id, 0, [5]), overload_status=503, now=100.0)
    if not held:
        sequences.withdraw(died=False)
    ended = sequences.overdue(overload_status=429, now=now)
    late = 100.0 + timeout_s + (_PATIENCE_S if held else 0.0) <= now
    unbegun = not held and not begun and 100.0 + max_queue_s <= now
    assert ended == ([submit.id] if held and late else []) and not patient.done
    assert one.done == (late or unbegun) and len(sequences) == 2 - one.done
    if one.done:
        with pytest.raises(RequestError) as caught:
            for _ in range(2):
                one.take()
        assert (caught.value.status, caught.value.code) == ((504, "timeout") if late else (429, "queue_timeout"))


def test_what_waits_here_ends_in_time_and_what_has_begun_goes_on(make_scheduler, impatient: None) -> None:
    numbers = itertools.count()

    async def main(scheduler: FakeScheduler) -> None:
        async with connected(scheduler) as client:

            def submit(**limits: float) -> TokenStream:
                params = SamplingParams(max_tokens=40, seed=next(numbers), ignore_eos=True)
                resolved = params.resolve(eos_token_ids=(), vocab_size=99, room=500)
                return client.submit([5, 6, 7], resolved, routing=Routing(arrival=time.monotonic(), **limits))  # type: ignore[arg-type]

            begun = submit(max_queue_s=0.2)
            await until(lambda: begun.output)
            await asyncio.to_thread(scheduler.restart, status=Status("loading", 0.5))
            await until(lambda: client.status.phase == "loading")
            late, hasty, patient = submit(timeout_s=0.3), submit(max_queue_s=0.3), submit(timeout_s=600.0)
            for waits, code in ((late, "timeout"), (hasty, "queue_timeout")):
                with pytest.raises(RequestError) as caught:
                    await ids(waits)
                assert caught.value.code == code
            scheduler.hold.clear()  # from now on it takes sequences and says nothing of them
            await asyncio.to_thread(scheduler.set_status, Status("ready", 1.0, capacity=client.capacity))
            hung = submit(timeout_s=0.1)
            with pytest.raises(RequestError, match=r"timeout of 0\.1 s"):
                await ids(hung)
            await until(lambda: scheduler.aborts == [hung.id])
            scheduler.hold.set()
            assert await ids(begun) == expected() and await ids(patient) == expected(3)

    with make_scheduler() as scheduler:
        scheduler.delay_s = 0.005
        asyncio.run(main(scheduler))
