"""Every request that cannot be served gets 400 with the field's name, at once, and the server lives."""

import contextlib
import json
import re
from typing import Any

import httpx
import pytest

from quire.common.messages import unpack

from .conftest import VOCABULARY
from .fake_scheduler import FakeScheduler, http
from .raw import connect, request, send, until_closed

COMPLETION = {"model": "tiny", "prompt": "hello"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}

SAMPLING: list[tuple[str, list[Any]]] = [
    ("n", [0, -1, 129, 10**9, 1.5, "1", True]),
    ("max_tokens", [0, -1, 513, 2**63, 2.0, "16", True]),
    ("min_tokens", [-1, 17, 2**63, "1"]),
    ("temperature", [-0.1, -1, 2.1, "hot", True, [1], 10**400]),
    ("top_k", [-2, 1.5, "3", 2**63]),
    ("top_p", [0, -0.5, 1.1, "0.5"]),
    ("min_p", [-0.1, 1.1, "0.5"]),
    ("repetition_penalty", [0, -1, 11, "1", 10**400]),
    ("presence_penalty", [-2.1, 2.1, "1", 10**400]),
    ("frequency_penalty", [-2.1, 2.1, {}]),
    ("logit_bias", [{"-1": 1}, {"x": 1}, {"5": 101}, {"5": "1"}, {"2048": 1}, {str(2**63): 1}, {"1.5": 1}, [5], {str(i): 1 for i in range(1025)}]),
    ("seed", [2**63, 2**64, -(2**63) - 1, 1.5, "7"]),
    ("stop", ["", [""], 5, [5], ["a"] * 17, "x" * 257, [["a"]], [""] * 10_000, ["a"] * 10_000]),
    ("stop_token_ids", [[-1], [2048], [2**63], [10**80], ["a"], 5, list(range(1025)), [1.5], [5] * 100_000]),
    ("ignore_eos", [1, "yes"]),
    ("include_stop_str_in_output", ["yes"]),
    ("skip_special_tokens", ["yes"]),
    ("stream", ["yes", 1]),
    ("priority", [2**63, "high", 1.5]),
    ("cache_salt", ["x" * 1025, 5]),
    ("best_of", [-1, 129, 10**400, "5", True]),
    ("timeout", [0, -1, 86401, 1e300, 10**400, "5", True, [5]]),
    ("max_queue_time", [0, -0.5, 86401, "5", {}]),
    ("user", ["x" * 257, 5]),
    ("stream_options", ["yes", {"include_usage": 1}, {"include_usage": True}]),  # the last one without stream
]  # fmt: skip
UNSUPPORTED: list[tuple[str, Any]] = [
    ("logprobs", True), ("top_logprobs", 5), ("tools", [{"type": "function"}]), ("tool_choice", "required"),
    ("response_format", {"type": "json_object"}), ("suffix", "x"), ("functions", [{}]), ("guided_json", {}), ("prompt_logprobs", 1),
    ("logprobs", -1), ("logprobs", 10**6), ("top_logprobs", -1), ("prompt_logprobs", -1), ("tools", [{"type": "function"}] * 1000),
    ("guided_regex", "(a+)+b"), ("guided_grammar", "(" * 30_000), ("guided_json", {"$ref": "#"}), ("structured_outputs", {"regex": "[.*"}), ("prompt_embeds", "AAAA"),
    ("reasoning_effort", "high"), ("modalities", ["audio"]), ("chat_template", "x"), ("bad_words", ["x"]),
]  # fmt: skip


def post(url: str, path: str, body: Any) -> httpx.Response:
    return http.post(url + path, content=json.dumps(body), headers={"content-type": "application/json"}, timeout=10)


def assert_refused(answer: httpx.Response, param: str | None, code: str | None = None) -> str:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert (error["param"] or "").partition(".")[0].partition("[")[0] == (param or ""), error
    assert answer.headers["x-should-retry"] == "false" and answer.headers["x-request-id"]
    assert len(answer.content) < 1500
    return error["message"]


@pytest.mark.parametrize(("name", "values"), SAMPLING, ids=[name for name, _ in SAMPLING])
def test_parameters_out_of_range_or_of_the_wrong_type(
    url: str, engine: FakeScheduler, name: str, values: list[Any]
) -> None:
    for value in values:
        for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", {"max_tokens": 16, **CHAT})):
            message = assert_refused(post(url, path, {**body, name: value}), name)
            assert name in message
    assert engine.submits == []


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "logit_bias"]
)
@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(url: str, engine: FakeScheduler, name: str, literal: str) -> None:
    value = f'{{"5": {literal}}}' if name == "logit_bias" else literal
    answer = http.post(
        f"{url}/v1/completions",
        content=f'{{"prompt": "a", "{name}": {value}}}',
        headers={"content-type": "application/json"},
    )
    assert_refused(answer, None)
    assert engine.submits == []


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED, ids=[name for name, _ in UNSUPPORTED])
def test_what_is_not_supported_is_refused_by_name(url: str, engine: FakeScheduler, name: str, value: Any) -> None:
    assert "not supported" in assert_refused(post(url, "/v1/chat/completions", {**CHAT, name: value}), name)
    if name != "chat_template":
        assert_refused(post(url, "/v1/completions", {**COMPLETION, name: value}), name)


def test_values_that_ask_for_nothing_are_accepted(url: str, engine: FakeScheduler) -> None:
    harmless = {
        "logprobs": False,
        "top_logprobs": 0,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "n": None,
        "stop": None,
    }
    answer = post(url, "/v1/chat/completions", {**CHAT, **harmless, "max_tokens": 2})
    assert answer.status_code == 200 and "x-quire-warning" not in answer.headers
    assert_refused(
        post(url, "/v1/completions", {**COMPLETION, "logprobs": 0}), "logprobs"
    )  # 0 asks for the chosen token's


def test_unknown_fields_are_named(url: str, engine: FakeScheduler) -> None:
    messages = [{"role": "user", "content": "hello", "colour": "red"}]
    answer = post(
        url,
        "/v1/chat/completions",
        {**CHAT, "messages": messages, "max_tokens": 2, "temprature": 1, "store": True, "a\r\nb": 1},
    )
    assert answer.status_code == 200
    for name in ("temprature", "messages[0].colour", "store"):
        assert name in answer.headers["x-quire-warning"]
    streamed = post(url, "/v1/completions", {**COMPLETION, "stream": True, "é": 1})
    assert streamed.headers["x-quire-warning"] == "fields without effect: \\xe9"


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        "",
        [],
        [[]],
        [""],
        5,
        True,
        [True],
        ["a", 5],
        [[1], "a"],
        [1.5],
        {},
        [[-1]],
        [-1],
        [10**6],
        [10**80],
        [2**70],
        ["a"] * 1025,
    ],
)
def test_prompts(url: str, engine: FakeScheduler, prompt: Any) -> None:
    for echo in (False, True):
        assert_refused(post(url, "/v1/completions", {"model": "tiny", "prompt": prompt, "echo": echo}), "prompt")


@pytest.mark.parametrize("item", [{"role": "user", "content": "a"}, {"role": "user", "content": ""}])
def test_lists_of_many_items_name_the_limit(url: str, engine: FakeScheduler, item: dict[str, str]) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": ""}] * 5000}]
    for messages in ([item] * 5000, parts):
        assert "4096" in assert_refused(post(url, "/v1/chat/completions", {"messages": messages}), "messages")
    assert "1048576" in assert_refused(post(url, "/detokenize", {"tokens": [5] * (1 << 20) + [5]}), "tokens")
    assert "512" in assert_refused(
        post(url, "/tokenize", {"prompt": "7" * 600, "return_token_strs": True}), "return_token_strs"
    )


def test_nulls_are_defaults(url: str, engine: FakeScheduler) -> None:
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT), ("/tokenize", COMPLETION)):
        names = http.get(f"{url}/openapi.json").json()["paths"][path]["post"]["requestBody"]["content"]
        optional = names["application/json"]["schema"]["properties"].keys() - body.keys()
        answer = post(url, path, {**dict.fromkeys(optional), **body})
        assert answer.status_code == 200, answer.text


def test_the_last_token_id_is_one(url: str, engine: FakeScheduler) -> None:
    """Logits may be wider than what the tokenizer knows; the model's width counts."""
    last = VOCABULARY - 1
    body = {"prompt": [0, last], "logit_bias": {str(last): 1, "0": -1}, "stop_token_ids": [last, 0], "max_tokens": 2}
    assert post(url, "/v1/completions", body).status_code == 200
    (submit,) = engine.submits
    assert unpack(submit.prompt) == [0, last] and submit.sampling.logit_bias == {last: 1, 0: -1}
    assert {0, last} <= set(submit.sampling.stop_token_ids)


@pytest.mark.parametrize(
    "given",
    [{"prompt": ["a"] * 10**6}, {"prompt": [[5]] * 10**5}, {"messages": [{"role": "user", "content": "a"}] * 10**5}],
)
def test_crowded_bodies_are_refused_before_they_are_built(url: str, engine: FakeScheduler, given: Any) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        assert "65536" in assert_refused(post(url, path, given), None)


LONG = "A" * 5000


@pytest.mark.parametrize(
    "body",
    [
        *({"model": LONG}, {"user": LONG}, {"cache_salt": LONG}, {"seed": LONG}, {"n": LONG}, {"stop": [LONG]}, {"logit_bias": {LONG: 1}}, {"logit_bias": {"5": LONG}}),
        *({"logit_bias": {LONG: LONG}}, {"stop_token_ids": [LONG]}, {"tools": LONG}, {LONG: LONG}, {"prompt": [LONG, 5]}, {"stream_options": {LONG: 1}}, {"stream_options": LONG}),
        *({"messages": [LONG]}, {"messages": [{"role": LONG}]}, {"messages": [{"role": "user", "content": [{"type": LONG}]}]}, {"messages": [{"role": "user", LONG: 1}]}),
        *({"chat_template_kwargs": {LONG: 1}}, {"chat_template_kwargs": LONG}, {"max_tokens": int("9" * 4000)}, {"prompt": [int("9" * 4000)]}, {"tokens": [int("9" * 4000)]}),
        *({f"{LONG}{i}": i for i in range(100)}, {"priority": int("9" * 4000)}, {"temperature": float("1" * 300)}, {"messages": [{"role": "user", "content": "a", "tool_calls": LONG}]}),
    ],
)  # fmt: skip
def test_errors_do_not_repeat_what_was_sent(url: str, engine: FakeScheduler, body: dict[str, Any]) -> None:
    sent = httpx.Request("GET", f"{url}/{LONG}")
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        answer = post(url, path, {**COMPLETION, **CHAT, "max_tokens": 1, **body} if path.startswith("/v1") else body)
        assert answer.status_code in (200, 400, 404)
        for text in (*answer.headers.values(), *([answer.text] if answer.status_code != 200 else [])):
            assert not re.search(r"A{201}|9{201}|1{201}", text) and text.count("AAAAAAAAAA, AAAAAAAAAA") <= 10
    assert len(http.send(sent).text) < 400


def test_prompts_times_n(url: str, engine: FakeScheduler) -> None:
    assert_refused(post(url, "/v1/completions", {"prompt": ["a"] * 1000, "n": 100}), "n")


@pytest.mark.parametrize(
    "messages",
    [
        *(None, [], "hi", [5], [{}], [{"role": "user"}], [{"role": "root", "content": "a"}], [{"role": "tool", "content": "a"}]),
        *([{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]),
        *([{"role": "user", "content": [{"type": "text"}]}], [{"role": "assistant", "tool_calls": [{"id": "x"}]}]),
    ],
)  # fmt: skip
def test_messages(url: str, engine: FakeScheduler, messages: Any) -> None:
    assert_refused(post(url, "/v1/chat/completions", {"model": "tiny", "messages": messages}), "messages")


def test_template_arguments(url: str, engine: FakeScheduler) -> None:
    assert_refused(
        post(url, "/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"tokenize": True}}), "chat_template_kwargs"
    )
    both = {"add_generation_prompt": True, "continue_final_message": True}
    assert_refused(post(url, "/v1/chat/completions", {**CHAT, **both}), "continue_final_message")


def test_a_prompt_longer_than_the_context(url: str, engine: FakeScheduler) -> None:
    for path, body, param in (
        ("/v1/completions", {"prompt": [5] * 600}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "7" * 600}]}, "messages"),
        ("/v1/completions", {"prompt": "7" * 600_000}, "prompt"),  # known without tokenizing
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "7" * 600_000}]}, "messages"),
    ):
        message = assert_refused(post(url, path, body), param, "context_length_exceeded")
        assert "512" in message and " 6" in message


def test_a_newer_name_is_named_as_it_was_sent(url: str, engine: FakeScheduler) -> None:
    for value in (0, 513):
        answer = post(url, "/v1/chat/completions", {**CHAT, "max_completion_tokens": value})
        assert "max_completion_tokens" in assert_refused(answer, "max_completion_tokens")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"nonsense", b"[]", b"5", b'"a"', b"null", b"\xff\xfe{}", b'{"prompt": "\xff"}', b'{"prompt": "a",}'),
        *(b"[" * 100_000, b'{"a":' * 100_000, b'{"prompt": "\\ud800"}', b'{"prompt": "a", "user": "\\uDFFF"}', b'{"seed": ' + b"9" * 10_000 + b"}"),
        *(b'{"prompt": "\xed\xa0\x80"}', '{"prompt": "a"}'.encode("utf-16"), '{"prompt": "\\ud800"}'.encode("utf-16"), '{"a": 1}'.encode("utf-32-le")),
    ],
)  # fmt: skip
def test_bodies_that_are_no_json_object(url: str, engine: FakeScheduler, content: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert_refused(http.post(url + path, content=content, headers={"content-type": "application/json"}), None)


def test_emoji_escapes_are_text(url: str, engine: FakeScheduler) -> None:
    answer = http.post(
        f"{url}/tokenize", content=b'{"prompt": "\\ud83d\\ude00"}', headers={"content-type": "application/json"}
    )
    assert http.post(f"{url}/detokenize", json={"tokens": answer.json()["tokens"]}).json()["prompt"] == "😀"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types(url: str, engine: FakeScheduler, kind: str) -> None:
    assert_refused(
        http.post(f"{url}/v1/completions", content=json.dumps(COMPLETION), headers={"content-type": kind}), None
    )


def test_unknown_model_and_path_and_method(url: str, engine: FakeScheduler) -> None:
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT), ("/tokenize", COMPLETION)):
        error = post(url, path, {**body, "model": "gpt-9"})
        assert (
            error.status_code == 404
            and error.json()["error"]["code"] == "model_not_found"
            and error.json()["error"]["param"] == "model"
        )
    for path in ("/v2/x", "/v1/models/"):
        missing = http.get(url + path)
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"
    wrong = http.get(f"{url}/v1/completions")
    assert (
        wrong.status_code == 405
        and wrong.json()["error"]["code"] == "method_not_allowed"
        and wrong.headers["allow"] == "POST"
    )


@pytest.mark.parametrize("tokens", [[-1], [10**6], [2**70], "a", [1.5], None])
def test_detokenize(url: str, engine: FakeScheduler, tokens: Any) -> None:
    assert_refused(post(url, "/detokenize", {"tokens": tokens}), "tokens")


def test_limits_on_urls_headers_and_bodies(url: str, engine: FakeScheduler) -> None:
    assert http.get(f"{url}/v1/models?x={'a' * 9000}").status_code == 414
    assert http.get(f"{url}/health", headers={"x": "a" * 70_000}).status_code == 431
    assert http.get(f"{url}/health", headers={f"x-{i}": "a" for i in range(200)}).status_code == 431
    assert request(url, "GET", "/v1/models?" + "a" * (1 << 20)).status == 431
    assert request(url, "GET", "/v1/models", *["x: a"] * 10_000).status == 431
    assert request(url, "GET", "/v1/models", "X-Forwarded-For: " + "A" * 5_800_000).status == 431
    large = http.post(
        f"{url}/v1/completions",
        content=iter([b'{"prompt": "', *[b"a" * (1 << 20)] * 17]),
        headers={"content-type": "application/json"},
    )
    assert large.status_code == 413 and large.json()["error"]["code"] == "request_too_large"
    declared = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999999999\r\n\r\n{"
    assert send(url, declared).startswith(b"HTTP/1.1 413")
    assert b"413" in send(url, declared.replace(b"999999999", b"9" * 30)) or b"400" in send(
        url, declared.replace(b"999999999", b"9" * 30)
    )


def test_a_head_without_end_is_cut_off(url: str, engine: FakeScheduler) -> None:
    assert b"431" in send(url, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 6_000_000)
    assert send(url, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert http.get(f"{url}/health").status_code == 200


UPLOAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_body_without_end_is_cut_off(url: str, engine: FakeScheduler) -> None:
    """Text is refused by its size, values by their number: long before a megabyte of them has come."""
    for begin, more, limit in ((b'{"prompt": "', b"a", 16 << 20), (b'{"prompt": [', b"[],", 1 << 20)):
        with connect(url) as connection:
            connection.sendall(UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(begin), begin))
            piece, sent = more * (65536 // len(more)), 0
            with contextlib.suppress(ConnectionError):
                while sent < 4 * limit:
                    connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
                    sent += len(piece)
            assert sent < limit + (8 << 20)  # what is on its way in buffers
            assert until_closed(connection)[:12] in (b"HTTP/1.1 413", b"HTTP/1.1 400")


def test_a_body_of_another_length_than_declared(url: str, engine: FakeScheduler) -> None:
    body = b'{"prompt": "hello", "max_tokens": 1}'
    longer = UPLOAD + b"Content-Length: %d\r\n\r\n%b" % (len(body) - 1, body)
    assert b" 200 " not in send(url, longer)
    shorter = UPLOAD + b"Content-Length: %d\r\n\r\n%b" % (len(body) + 1, body)
    assert send(url, shorter) == b""
    for both in (
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: -5\r\n",
    ):
        assert send(url, UPLOAD + both + b"\r\n" + body).startswith(b"HTTP/1.1 400")
    assert engine.submits == []
