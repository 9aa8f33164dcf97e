"""Requests that nobody wrote: none ends in a 500 or a hang, and memory stays what it is.

Some hundreds by default; `pytest tests/frontend/test_fuzz.py --long` sends 10^5: half of them bodies, a quarter bytes, a
quarter by the description.
"""

import json
import select
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from quire.common.messages import Hypothesis, Output, Submit

from .fake_scheduler import CONTEXT, frontend_process, until, wait_ready
from .raw import connect, until_closed

pytestmark = pytest.mark.timeout(3 * 3600)  # for the long run

LONG, SHORT = 10**5, 600
MAX_GROWTH_BYTES = 24 << 20
MAX_ECHO = 200
ANSWERS = {200, 400, 404, 405, 413, 414, 431}
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]
OPERATIONS = [
    *(
        ("get", path)
        for path in ("/health", "/ready", "/startup", "/metrics", "/version", "/v1/models", "/v1/models/{name}")
    ),
    *(("post", path) for path in ("/tokenize", "/detokenize", "/v1/completions", "/v1/chat/completions")),
]
NUM_MODES = sum(2 if method == "post" else 1 for method, _ in OPERATIONS)


@dataclass
class Target:
    url: str
    process: psutil.Process
    examples: int

    def bombard(self, one: Callable[..., None], *strategies: Any, share: int) -> None:
        """Call `one` with one in `share` of all examples, drawn from `strategies`; after the first of them, memory must not grow."""
        self._run(one, strategies, max(20, self.examples // share // 10))
        before = self.process.memory_full_info().uss
        self._run(one, strategies, max(20, self.examples // share))
        assert httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        assert self.process.memory_full_info().uss - before < MAX_GROWTH_BYTES

    def _run(self, one: Callable[..., None], strategies: tuple[Any, ...], examples: int) -> None:
        everywhere = settings(
            max_examples=examples,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        )
        everywhere(given(*strategies)(one))()


def searched(submit: Submit) -> Output | None:
    """What a beam search ends with, should a body ask for one."""
    if not submit.sampling.beam_width:
        return None
    best = [Hypothesis([i], "length", -1.0, -1.0) for i in range(submit.sampling.n)]
    return Output(submit.id, 0, [], "length", hypotheses=best)


@pytest.fixture(scope="module")
def target(request: pytest.FixtureRequest, make_scheduler) -> Iterator[Target]:
    examples = LONG if request.config.getoption("--long", default=False) else SHORT
    with make_scheduler() as scheduler, frontend_process(scheduler.address) as (process, url):
        scheduler.tokens_per_step, scheduler.answer = CONTEXT, searched
        wait_ready(url)
        yield Target(url, psutil.Process(process.pid), examples)
        until(lambda: scheduler.num_running == 0)


# --- bodies that are nearly right -------------------------------------------------------------------------------------

TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "\ue0f0", "\ufdd0", "\x00", "\u2028", "A" * 300, "é" * 5000]
strings = st.text(max_size=20) | st.sampled_from(
    [*TOKENS, "", "tiny", "org/tiny", "user", "assistant", "text", "auto", "none"]
)
numbers = st.sampled_from(
    [
        -(2**63) - 1,
        -(2**63),
        -1,
        0,
        1,
        2,
        128,
        129,
        511,
        512,
        513,
        2**31,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
        0.0,
        -0.0,
        0.5,
        1e308,
        5e-324,
    ]
)
some = st.recursive(
    st.none() | st.booleans() | numbers | strings,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=8,
)
anything = some | (numbers | strings.filter(lambda text: len(text) < 100)).map(lambda item: [item] * 1030)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]) | anything, "content": strings | anything}, optional={"name": strings | anything, "tool_calls": anything, "x": anything}) | anything,
    max_size=4,
)  # fmt: skip
NAMES = [
    *("model", "n", "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"),
    *("stream", "stream_options", "user", "priority", "cache_salt", "timeout", "max_queue_time", "echo", "add_special_tokens", "add_generation_prompt"),
    *("continue_final_message", "chat_template_kwargs", "max_completion_tokens", "return_token_strs", "tools", "logprobs", "best_of", "metadata"),
]  # fmt: skip
FITTING: dict[str, Any] = {
    "model": st.sampled_from(["tiny", "org/tiny"]),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(0, 20),
    "temperature": st.floats(0, 2),
    "logit_bias": st.dictionaries(st.integers(0, 2047).map(str), st.floats(-100, 100), max_size=3),
    "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans(), "continuous_usage_stats": st.booleans()}),
    "echo": st.booleans(),
}
fields = st.lists(st.sampled_from(NAMES), max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: FITTING.get(name, anything) | anything for name in names})
)
ids = st.lists(st.integers(0, 2047), min_size=1, max_size=5)
bodies = st.one_of(
    st.tuples(st.just("/v1/completions"), st.fixed_dictionaries({"prompt": st.text(min_size=1, max_size=20) | ids | st.lists(ids, max_size=3) | anything})),
    st.tuples(st.just("/v1/chat/completions"), st.fixed_dictionaries({"messages": messages | anything})),
    st.tuples(st.just("/tokenize"), st.fixed_dictionaries({}, optional={"prompt": strings | anything, "messages": messages})),
    st.tuples(st.just("/detokenize"), st.fixed_dictionaries({"tokens": ids | anything})),
)  # fmt: skip


def test_bodies(target: Target) -> None:
    with httpx.Client(base_url=target.url, verify=False, timeout=20) as client:

        def one(body: tuple[str, dict[str, Any]], more: dict[str, Any], unknown: dict[str, Any]) -> None:
            path, own = body
            answer = client.post(
                path,
                content=json.dumps({**unknown, "max_tokens": 4, **more, **own}),
                headers={"content-type": "application/json"},
            )
            note(f"{path} {answer.request.content!r:.2000}")
            assert answer.status_code in (200, 400, 404), answer.text
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert error["message"] and error["type"] == "invalid_request_error"
                assert len(error["message"]) <= 1000 and len(error["param"] or "") <= 100
                assert "A" * (MAX_ECHO + 1) not in answer.text and "é" * (MAX_ECHO + 1) not in answer.text
                assert answer.headers["x-should-retry"] == "false"
            elif "text/event-stream" in answer.headers["content-type"]:
                assert answer.text.endswith("data: [DONE]\n\n"), answer.text
            else:
                assert answer.json()

        target.bombard(one, bodies, fields, st.just({}) | st.dictionaries(strings, some, max_size=2), share=2)


# --- bytes that are nearly HTTP ---------------------------------------------------------------------------------------

BODY = b'{"prompt": "hello", "max_tokens": 2}'
HEAD = b"Host: localhost\r\nContent-Type: application/json\r\n"
REQUESTS = [
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /v1/models?x=%00#y HTTP/1.0\r\n\r\n",
    b"HEAD http://localhost/ready HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n%b" % (HEAD, len(BODY), BODY),
    b"POST /v1/completions HTTP/1.1\r\n%bExpect: 100-continue\r\nContent-Length: %d\r\n\r\n%b" % (HEAD, len(BODY), BODY),
    b"POST /tokenize HTTP/1.1\r\n%bTransfer-Encoding: chunked\r\n\r\n%x;a=b\r\n%b\r\n0\r\nX-Trailer: a\r\n\r\n" % (HEAD, len(BODY), BODY),
    b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
]  # fmt: skip
SPICES = [
    *(b"\r\n", b"\n", b"\r", b"\x00", b"\xff", b" ", b":", b"\r\n\r\n", b"0\r\n\r\n", b"Content-Length: 5\r\n", b"Content-Length: -1\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: identity, chunked\r\n", b"Host: evil.example\r\n", b"HTTP/1.1", b"%2e%2e/", b"a" * 9000),
    *(b"Connection: close\r\n", b"ffffffffffffffff\r\n", b"X: " + b"y" * 70_000 + b"\r\n", b"Expect: 100-continue\r\n"),
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A few requests in a row, with bytes taken out, doubled, changed and put in."""
    content = b"".join(draw(st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        piece = draw(st.sampled_from([b"", content[start:end] * 2]) | st.sampled_from(SPICES) | st.binary(max_size=8))
        content = content[:start] + piece + content[end:]
    return content


def test_bytes(target: Target) -> None:
    def one(content: bytes, cuts: list[int], patient: bool) -> None:
        with connect(target.url, timeout_s=5) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                start = 0
                for end in [*sorted(cut % (len(content) + 1) for cut in cuts), len(content)]:
                    connection.sendall(content[start:end])
                    start = end
                if patient:
                    select.select([connection], [], [], 0.05)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it was enough
            received = until_closed(connection)  # a TimeoutError is a hang
        if received:
            assert received.startswith(b"HTTP/1.1 "), received
            assert int(received[9:12]) in ANSWERS | {100, 401, 403, 408}, received
        assert b"HTTP/1.1 5" not in received

    contents = mutated() | st.binary(max_size=200)
    target.bombard(one, contents, st.lists(st.integers(0, 10**5), max_size=2), st.booleans(), share=4)


# --- what the description says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_the_description_is_true(target: Target, method: str, path: str) -> None:
    operation = schemathesis.openapi.from_url(f"{target.url}/openapi.json")[path][method]
    with requests.Session() as session:

        def one(case: schemathesis.Case) -> None:
            if path.endswith("completions") and isinstance(case.body, dict):
                case.body["max_tokens"] = 1  # thousands of them cost this test's time only
                case.body.pop("n", None)
            case.call_and_validate(session=session, checks=CHECKS, timeout=20)

        # Without a parameter there is nothing to be wrong; a path of a wrong type is one of the right type.
        for mode in GenerationMode if method == "post" else [GenerationMode.POSITIVE]:
            target.bombard(one, operation.as_strategy(generation_mode=mode), share=4 * NUM_MODES)
