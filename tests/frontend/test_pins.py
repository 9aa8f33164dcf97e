"""cache_control: which shapes are taken, how far a mark reaches, and what an operator sees of pins."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.common.messages import unpack
from quire.common.pins import GetPins, PinnedPrefix
from quire.frontend.chat_template import ChatOptions
from quire.frontend.middleware import scope_of
from quire.frontend.openai.cache_control import NO_PIN, Pin, pin_of
from quire.frontend.openai.protocol import ChatRequest
from quire.frontend.openai.requests import messages_of
from quire.frontend.tokenizer import Tokenizer

from .fake_scheduler import FakeScheduler, http

EPHEMERAL = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}
USER_FIRST = "{% if messages[-1].role != 'user' %}{{ raise_exception('no') }}{% endif %}"


@pytest.fixture(scope="module")
def tiny(model_dir: Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer.load(model_dir)
    yield tokenizer
    tokenizer.close()


def pinned(tokenizer: Tokenizer, **fields: Any) -> tuple[Pin, list[int]]:
    body = ChatRequest.model_validate(fields)
    messages, options = messages_of(body), ChatOptions()

    async def both() -> tuple[Pin, list[int]]:
        prompt = await tokenizer.encode_chat(messages, options)
        return await pin_of(body, messages, options, prompt, tokenizer), prompt

    return asyncio.run(both())


def text(content: str, mark: dict[str, str] | None = None) -> dict[str, Any]:
    return {"type": "text", "text": content, "cache_control": mark}


# --- how far a mark reaches -------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from([None, EPHEMERAL, HOUR]), min_size=1, max_size=3), min_size=1, max_size=4))
def test_a_pin_ends_where_the_last_mark_does(tiny: Tokenizer, marks: list[list[dict[str, str] | None]]) -> None:
    words = iter(range(100))
    parts = [[text(f"word {next(words)} of <|im_end|>", mark) for mark in message] for message in marks]
    pin, prompt = pinned(tiny, messages=[{"role": "user", "content": content} for content in parts])
    flat = [part for content in parts for part in content]
    marked = [index for index, part in enumerate(flat) if part["cache_control"]]
    if not marked:
        assert pin == NO_PIN
        return
    assert pin.seconds == (3600.0 if any(part["cache_control"] == HOUR for part in flat) else 300.0)
    head = tiny.backend.decode(prompt[: pin.num_tokens], skip_special_tokens=False)
    assert flat[marked[-1]]["text"] in head
    assert all(part["text"] not in head for part in flat[marked[-1] + 1 :])
    assert len(prompt) - pin.num_tokens >= 1, "the header of the answer is no part of it"


def test_a_mark_on_a_message_spans_it_and_one_on_the_request_all(tiny: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "hello world", "cache_control": EPHEMERAL},
        {"role": "user", "content": "the quick brown fox"},
    ]
    pin, prompt = pinned(tiny, messages=messages)
    assert tiny.backend.decode(prompt[: pin.num_tokens], skip_special_tokens=False).startswith(
        "<|im_start|>system\nhello world<|im_end|>\n"
    )
    assert pinned(tiny, messages=messages, cache_control=HOUR)[0] == Pin(3600.0, 0)
    assert pinned(tiny, messages=messages[1:], cache_control=EPHEMERAL)[0] == Pin(300.0, 0)
    assert pinned(tiny, messages=messages[1:])[0] == NO_PIN


def test_marks_change_no_prompt(tiny: Tokenizer) -> None:
    plain = pinned(tiny, messages=[{"role": "user", "content": [text("a"), text("b")]}])[1]
    marked = [{"role": "user", "content": [text("a", HOUR), text("b", EPHEMERAL)], "cache_control": EPHEMERAL}]
    assert pinned(tiny, messages=marked)[1] == plain


def test_all_is_pinned_where_the_template_gives_no_border(model_dir: Path, tmp_path: Path) -> None:
    picky = tmp_path / "picky.jinja"
    picky.write_text(USER_FIRST + "{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = Tokenizer.load(model_dir, chat_template=picky)
    messages = [{"role": "system", "content": "hello", "cache_control": HOUR}, {"role": "user", "content": "world"}]
    assert pinned(tokenizer, messages=messages)[0] == Pin(3600.0, 0)
    tokenizer.close()


# --- over HTTP --------------------------------------------------------------------------------------------------------


def test_a_pin_reaches_the_scheduler(engine: FakeScheduler, url: str) -> None:
    for fields, seconds in (({}, 0.0), ({"cache_control": EPHEMERAL}, 300.0), ({"cache_control": HOUR}, 3600.0)):
        answer = http.post(f"{url}/v1/completions", json={"prompt": "hello", "max_tokens": 1, **fields})
        assert answer.status_code == 200 and "x-quire-warning" not in answer.headers, answer.text
        assert (engine.submits[-1].pin_s, engine.submits[-1].pin_tokens) == (seconds, 0)
    messages = [{"role": "user", "content": [text("hello", HOUR), text("world")]}]
    assert http.post(f"{url}/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).status_code == 200
    submit = engine.submits[-1]
    assert submit.pin_s == 3600.0 and 1 < submit.pin_tokens < len(unpack(submit.prompt))


@pytest.mark.parametrize(
    "wrong",
    [
        "ephemeral",
        True,
        [],
        {},
        {"type": "persistent"},
        {"type": "ephemeral", "ttl": "2h"},
        {"type": "ephemeral", "ttl": 300},
        {"type": "ephemeral", "scope": "all"},
    ],
    ids=str,
)
def test_any_other_shape_is_a_400_that_names_the_field(engine: FakeScheduler, url: str, wrong: Any) -> None:
    bodies: list[tuple[str, dict[str, Any], str]] = [
        ("completions", {"prompt": "a", "cache_control": wrong}, "cache_control"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "cache_control": wrong}, "cache_control"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a", "cache_control": wrong}]}, "messages[0]"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": wrong}]}]},
            "messages[0].content",
        ),
    ]
    for path, body, where in bodies:
        answer = http.post(f"{url}/v1/{path}", json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].startswith(where) and "cache_control" in answer.text, answer.text
    assert not engine.submits


def test_an_operator_lists_pins_and_ends_them(engine: FakeScheduler, url: str) -> None:
    engine.pins[:] = [PinnedPrefix(7, "alice", 48, 3, 12.5), PinnedPrefix(2, "", 32, 2, 3000.0)]
    engine.asked_pins.clear()
    answer = http.get(f"{url}/pins")
    assert answer.status_code == 200
    assert answer.json() == {
        "count": 2,
        "blocks": 5,
        "max_blocks": 8,
        "pins": [
            {"id": 7, "tenant": "alice", "tokens": 48, "blocks": 3, "expires_in": 12.5},
            {"id": 2, "tenant": "", "tokens": 32, "blocks": 2, "expires_in": 3000.0},
        ],
    }
    for query in ("", "?tenant=alice", "?id=7", "?tenant="):
        assert http.delete(f"{url}/pins{query}").status_code == 200
    asked = [msgspec.structs.replace(message, serial=0) for message in engine.asked_pins]
    assert asked == [
        GetPins(0),
        GetPins(0, True),
        GetPins(0, True, "alice"),
        GetPins(0, True, None, 7),
        GetPins(0, True, ""),
    ]
    assert len({message.serial for message in engine.asked_pins}) == 5


@pytest.mark.parametrize("query", ["id=0", "id=-1", "id=x", "id=", "id=1e3", f"id={'9' * 400}", "tennant=a"])
def test_a_query_that_says_something_else_ends_nothing(engine: FakeScheduler, url: str, query: str) -> None:
    engine.asked_pins.clear()
    for method in ("GET", "DELETE"):
        assert http.request(method, f"{url}/pins?{query}").status_code == 400
    assert not engine.asked_pins


def test_a_scheduler_that_is_silent_is_a_503(engine: FakeScheduler, url: str) -> None:
    engine.mute(1.5)
    answer = http.get(f"{url}/pins")
    assert answer.status_code == 503 and answer.headers["retry-after"]


def test_pins_are_an_operator_s() -> None:
    assert scope_of("/pins") == "admin"
