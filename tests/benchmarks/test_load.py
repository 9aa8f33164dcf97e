"""The HTTP client and what is made of its answers: nothing is counted twice, nothing that went wrong is hidden."""

import argparse
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.benchmarks import frontend, load, traffic
from quire.benchmarks.http_client import Answer, Events
from quire.benchmarks.load import Objective, Run, Target, closed, opened

TOKENS = [b'data: {"choices":[{"text":"%d"}]}' % i for i in range(5)]
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":9,"prompt_tokens_details":{"cached_tokens":4}}}'
DONE = b"data: [DONE]"


def read(*pieces: bytes, keep: bool = False) -> Answer:
    answer = Answer()
    events = Events(answer, keep=keep)
    for at, piece in enumerate(pieces):
        events.feed(piece, float(at))
    events.end()
    return answer


@given(st.data(), st.sampled_from([b"\n", b"\r\n"]))
def test_however_a_stream_is_cut_it_says_the_same(data: st.DataObject, line: bytes) -> None:
    whole = (line + line).join([b": a comment", *TOKENS, USAGE, DONE, b""])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    answer = read(*pieces, keep=True)
    assert not answer.error
    assert len(answer.times) == len(TOKENS) and answer.times == sorted(answer.times)
    assert (answer.tokens, answer.prompt_tokens, answer.cached_tokens, answer.text) == (9, 7, 4, "01234")


def test_without_usage_events_are_counted() -> None:
    assert read(b"\n\n".join([*TOKENS, DONE, b""])).tokens == len(TOKENS)


def test_a_chats_first_event_is_no_token() -> None:
    role = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    token = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
    assert read(role, token, DONE + b"\n\n").times == [1.0]


@pytest.mark.parametrize(
    "stream", [b"", b"\n\n".join([*TOKENS, b""]), b'data: {"error":{"message":"no"}}\n\n' + DONE + b"\n\n"]
)
def test_a_stream_without_a_good_end_is_an_error(stream: bytes) -> None:
    assert read(stream).error


def test_goodput_counts_what_kept_the_objective_alone() -> None:
    def answered(ttft_s: float, per_token_s: float, tokens: int = 3, error: str = "") -> Answer:
        times = [ttft_s + i * per_token_s for i in range(tokens)]
        return Answer(times=times, ended_at=times[-1] if times else 0.0, tokens=tokens, error=error)

    kept = [answered(0.1, 0.01), answered(0.1, 9.0, tokens=1)]
    missed = [answered(0.3, 0.01), answered(0.1, 0.03), answered(0.1, 0.01, error="gone"), answered(0.0, 0.0, tokens=0)]
    run = Run(kept + missed, 2.0, 0.0)
    assert run.goodput(Objective(0.2, 0.02)) == len(kept) / 2.0
    assert run.goodput(Objective(float("inf"), float("inf"))) == (len(kept) + 2) / 2.0
    assert len(run.errors) == 1 and run.summary(None)["errors"] == 1


@contextmanager
def answering(answer: Callable[[int], bytes], asked: list[bytes] | None = None) -> Iterator[Target]:
    """A server that gives the nth request, of any connection, these bytes, and hangs up. `asked` is what it was sent."""
    listening = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        number = 0
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                came = connection.recv(65536)
                if asked is not None:
                    asked.append(came)
                connection.sendall(answer(number))
            number += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield Target("127.0.0.1", listening.getsockname()[1], "m")
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def test_every_way_of_failing_is_counted() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    answers = [
        head + b"\n\n".join([*TOKENS, DONE, b""]),
        head + TOKENS[0] + b"\n\n",
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\nConnection: close\r\n\r\nfull",
        b"",
        b"what?",
    ]
    jobs = traffic.random_ids(traffic.same_length(4, 5), 0)
    with answering(lambda number: answers[number]) as target:
        run = closed(target, jobs, 1, len(answers), {})
    assert [bool(answer.error) for answer in run.answers] == [False, True, True, True, True]
    assert "503 full" in run.answers[2].error
    assert sum(answer.tokens for answer in run.well) == len(TOKENS)


def test_a_server_that_never_answers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "PATIENCE_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = Target("127.0.0.1", silent.getsockname()[1], "m")
        run = closed(target, traffic.random_ids(traffic.same_length(4, 5), 0), 1, 2, {})
    assert ["no end" in answer.error for answer in run.answers] == [True, True]


def test_who_cannot_connect_is_an_error_too() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = Target("127.0.0.1", free.getsockname()[1], "m")
        run = closed(target, traffic.random_ids(traffic.same_length(4, 5), 0), 2, 3, {})
    assert len(run.errors) == 3


def test_a_late_answer_waited_from_the_time_it_should_have_been_sent() -> None:
    """Three arrive at once at a server that serves one after the other; latencies count from arrival."""
    body = msgspec.json.encode({"choices": [{"text": ""}], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    jobs = traffic.random_ids(traffic.same_length(4, 1), 0)
    with answering(lambda _: head + body) as target:
        run = opened(target, jobs, [-5.0, -1.0], {"stream": False})
    assert not run.errors
    first, second = (answer.whole_s for answer in run.answers)
    assert first >= 5.0 and 1.0 <= second < first


def test_each_turn_of_a_conversation_brings_all_before_it() -> None:
    asked: list[bytes] = []
    answers = [b'data: {"choices":[{"delta":{"content":"answer %d"}}]}' % i for i in range(3)]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    jobs = traffic.conversations(traffic.same_length(2, 1), 3, 0)
    with answering(lambda number: head + answers[number] + b"\n\n" + DONE + b"\n\n", asked) as target:
        assert not closed(target, jobs, 1, 1, {}).errors
    turns = [msgspec.json.decode(request.partition(b"\r\n\r\n")[2])["messages"] for request in asked]
    assert [[message["role"] for message in turn] for turn in turns] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user", "assistant", "user", "assistant", "user"],
    ]
    assert turns[2][:3] == turns[1] and turns[1][:1] == turns[0]
    assert [message["content"] for message in turns[2][1::2]] == ["answer 0", "answer 1"]


def test_a_frontend_carries_streams_and_short_requests() -> None:
    """From end to end: a real frontend process before the scheduler that costs nothing."""
    options = argparse.Namespace(streams=4, seconds=0.0)
    with frontend.bench(options) as bench:
        streams, short = bench.streams(0.0, 0), bench.short(0)
        conversations = traffic.conversations(traffic.same_length(3, 2), 3, 0)
        chats = closed(bench.target, islice(conversations, 2), 2, 2, {})
    assert all(answer.tokens == frontend.OUTPUT for answer in streams.run.answers) and streams.cpu_s > 0
    assert all(answer.tokens == 1 and len(answer.times) == 1 for answer in short.run.answers)
    assert len(streams.run.answers) == len(short.run.answers) == 4 * options.streams
    assert [answer.tokens for answer in chats.answers] == [2] * 6 and not chats.errors
