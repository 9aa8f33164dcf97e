"""What a body holds is counted before it is built, exactly, however it is cut into pieces."""

import json
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.common.errors import RequestError
from quire.frontend.json_body import MAX_DEPTH, MAX_FIELDS, MAX_PARTS, MAX_VALUES, Census, decode

from .fake_scheduler import FakeScheduler, http

texts = st.text(alphabet=st.sampled_from('a"\\,:[]{}\n é😀\u2028'), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)
objects = st.dictionaries(texts, values, max_size=5)


def counted(content: bytes, cuts: list[int]) -> Census:
    census, start = Census(), 0
    for end in [*sorted(cut % (len(content) + 1) for cut in cuts), len(content)]:
        census.add(content[start:end])
        start = end
    return census


def truth(value: Any) -> tuple[int, int, int]:
    """Strings, lists and objects; lists and objects; names."""
    if isinstance(value, str):
        return 1, 0, 0
    if not isinstance(value, dict | list):
        return 0, 0, 0
    inner = [truth(item) for item in (value.values() if isinstance(value, dict) else value)]
    parts, members, names = (sum(column) for column in zip(*inner, strict=True)) if inner else (0, 0, 0)
    own = len(value) if isinstance(value, dict) else 0
    return parts + own + 1, members + 1, names + own


@settings(max_examples=300, deadline=None)
@given(value=objects, cuts=st.lists(st.integers(0, 10**6), max_size=6), plain=st.booleans(), spaced=st.booleans())
def test_the_count_is_what_json_finds(value: dict[str, Any], cuts: list[int], plain: bool, spaced: bool) -> None:
    content = json.dumps(value, ensure_ascii=plain, indent=1 if spaced else None).encode()
    census = counted(content, cuts)
    assert (census.parts, census.lists_and_objects, census.names) == truth(value)
    assert decode(content, census) == value


@settings(max_examples=200, deadline=None)
@given(value=objects, name=texts, first=values, second=values, depth=st.integers(0, 3))
def test_a_field_given_twice_is_refused(value: dict[str, Any], name: str, first: Any, second: Any, depth: int) -> None:
    pairs = [*((k, v) for k, v in value.items() if k != name), (name, first), (name, second)]
    text = "{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in pairs) + "}"
    for _ in range(depth):
        text = f'{{"outer": [{text}, 5]}}'
    with pytest.raises(RequestError, match="twice"):
        decode(text.encode(), counted(text.encode(), []))


@pytest.mark.parametrize(
    ("one", "limit", "named"),
    [
        (b"5,", MAX_VALUES, MAX_VALUES),
        (b"[],", MAX_PARTS, MAX_PARTS),
        (b"{},", MAX_PARTS, MAX_PARTS),
        (b'"",', MAX_PARTS, MAX_PARTS),
        (b'"\\"",', MAX_PARTS, MAX_PARTS),
        (b"[", MAX_PARTS, MAX_PARTS),
        (b'{"":', MAX_PARTS // 2, MAX_PARTS),
    ],
)
def test_more_than_a_body_may_hold(one: bytes, limit: int, named: int) -> None:
    counted(one * (limit - 1), [])
    with pytest.raises(RequestError, match=str(named)) as caught:
        counted(b"[" + one * (limit + 1), [limit, 2 * limit])
    assert caught.value.headers["Connection"] == "close"


def test_text_is_no_values() -> None:
    content = json.dumps({"prompt": '[1,2,"3"],{"a":4}' * 400_000}).encode()
    census = counted(content, list(range(0, len(content), 65_536)))
    assert (census.parts, census.names) == (3, 1)
    assert len(decode(content, census)["prompt"]) == 17 * 400_000


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (nested(MAX_DEPTH + 1), "nested"),
        (nested(3000), "nested"),
        (json.dumps({str(i): i for i in range(MAX_FIELDS + 1)}).encode(), str(MAX_FIELDS)),
        (b'{"a": NaN}', "JSON"),
        (b'{"a": -Infinity}', "JSON"),
        (b'{"a": 1e999}', "range"),
        (b'{"a": "\xed\xa0\x80"}', "Unicode"),
        (b'{"a": "\\ud800"}', "JSON"),
        (b'{"a": "\\udc00\\ud800"}', "surrogate"),
        (b'{"a": 5', "JSON"),
        (b'{"a": 5}]', "JSON"),
        (b"\xef\xbb\xbf[]", "got a list"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "JSON"),
        (b"\xff\xfe{\x00}\x00", "JSON"),
    ],
)
def test_what_is_no_object_of_ours(content: bytes, told: str) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        decode(content, counted(content, []))
    assert caught.value.status == 400


def test_what_is() -> None:
    assert decode(nested(MAX_DEPTH), counted(nested(MAX_DEPTH), []))
    assert decode(b'\xef\xbb\xbf{"a": "\xef\xbb\xbf\\ud83d\\ude00"}', counted(b'{"a": ""}', [])) == {"a": "\ufeff😀"}
    for piece in (b'{"a":1}', bytearray(b'{"a":1}')):
        assert decode(piece, counted(b'{"a":1}', [])) == {"a": 1}


HEAVY = {
    "stop": b'{"prompt": "a", "stop": [' + b"5," * 900_000 + b"5]}",
    "logit_bias": b'{"prompt": "a", "logit_bias": {' + b",".join(b'"%d":"x"' % i for i in range(30_000)) + b"}}",
    "stop_token_ids": b'{"prompt": "a", "stop_token_ids": [' + b"1.5," * 900_000 + b"1]}",
    "prompt": b'{"prompt": [' + b"[1,2]," * 60_000 + b"[1]]}",
    "messages": b'{"messages": [' + b",".join([b'{"role":"user","content":[' + b"5," * 4000 + b"5]}"] * 200) + b"]}",
}


@pytest.mark.parametrize("name", HEAVY)
def test_a_heavy_body_costs_little(shared: tuple[FakeScheduler, str], engine: FakeScheduler, name: str) -> None:
    """Explaining each of a million mistakes took seven seconds, in which nobody else got a token."""
    url = shared[1]
    path = "/v1/chat/completions" if name == "messages" else "/v1/completions"
    process = serving(int(url.rpartition(":")[2]))
    before = process.cpu_times()
    answer = http.post(url + path, content=HEAVY[name], headers={"content-type": "application/json"}, timeout=60)
    after = process.cpu_times()
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(name)
    assert after.user + after.system - before.user - before.system < 1.0


def serving(port: int) -> psutil.Process:
    """The process of ours that listens on a port."""
    return next(
        child
        for child in psutil.Process().children()
        if any(c.laddr.port == port for c in child.net_connections("tcp") if c.status == "LISTEN")
    )
