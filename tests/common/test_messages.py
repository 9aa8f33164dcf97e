"""Whatever is sent arrives equal; whatever else arrives is dropped."""

import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.common import messages
from quire.common.channel import Codec, encode, memory_pair
from quire.common.config import EngineConfig
from quire.common.model_info import ModelInfo
from quire.common.sampling import SamplingParams

from .mutation import Mutator

INT = st.integers(-(2**63), 2**63 - 1)
INFO = st.builds(
    ModelInfo,
    vocab_size=INT,
    context_length=INT,
    max_model_len=INT,
    eos_token_ids=st.tuples(INT, INT),
    default_sampling=st.dictionaries(st.text(), INT),
)
SAMPLING = st.builds(
    SamplingParams,
    n=st.integers(1, 128),
    max_tokens=st.none() | st.integers(1, 2**40),
    temperature=st.floats(0, 2),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=5),
    seed=st.none() | INT,
    stop=st.lists(st.text(min_size=1, max_size=9), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 9), max_size=3),
)
FIELDS = {
    SamplingParams: SAMPLING,
    ModelInfo: INFO,
    EngineConfig: st.just(EngineConfig()),
    int: INT,
    float: st.floats(allow_nan=False),
}


def strategy(kind: type) -> st.SearchStrategy:
    """Values of a field, from its type."""
    if kind in FIELDS:
        return FIELDS[kind]
    if kind == messages.Label:
        return st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=200)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return struct(kind)
    if typing.get_origin(kind) is list:
        return st.lists(strategy(typing.get_args(kind)[0]), max_size=3)
    if typing.get_origin(kind) is tuple:
        return st.tuples(*map(strategy, typing.get_args(kind)))
    return st.one_of(*map(strategy, args)) if (args := typing.get_args(kind)) else st.from_type(kind)


def struct(kind: type[msgspec.Struct]) -> st.SearchStrategy:
    hints = typing.get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: strategy(hints[name]) for name in kind.__struct_fields__})


UNIONS = [messages.FromFrontend, messages.ToFrontend, messages.FromWorker, messages.ToWorker]
MESSAGES = [(union, kind) for union in UNIONS for kind in typing.get_args(union)]


@pytest.mark.parametrize(("union", "kind"), MESSAGES, ids=lambda x: getattr(x, "__name__", ""))
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_every_message_arrives_as_it_was_sent(union: object, kind: type, data: st.DataObject) -> None:
    message = data.draw(struct(kind))
    near, far = memory_pair(union, messages.Hello)
    far.send(message)
    assert near.receive() == message


@pytest.mark.parametrize("union", UNIONS, ids=["FromFrontend", "ToFrontend", "FromWorker", "ToWorker"])
@settings(max_examples=150, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_spoilt_messages_decode_to_others_or_are_dropped_and_counted(
    union: object, data: st.DataObject, seed: int
) -> None:
    kinds = typing.get_args(union)
    mutator = Mutator(seed, [data.draw(struct(data.draw(st.sampled_from(kinds))))])
    codec: Codec[object] = Codec(union)
    decoded = [codec.decode(mutator.next()) for _ in range(20)]
    assert all(message is None or isinstance(message, kinds) for message in decoded)
    assert codec.bad_frames == decoded.count(None)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_dropped_and_counted(frame: bytes) -> None:
    codec: Codec[object] = Codec(messages.FromFrontend)
    if codec.decode(frame) is None:
        assert codec.bad_frames == 1


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.integers(0, 10**6))
def test_mutated_frames_decode_to_a_valid_message_or_to_nothing(position: int, byte: int, cut: int) -> None:
    frame = bytearray(encode(messages.Submit(1, messages.pack([1, 2, 3]), SamplingParams(seed=5), salt="x")))
    frame[position % len(frame)] = byte
    decoded = Codec(messages.FromFrontend).decode(bytes(frame[: cut % len(frame) + 1]))
    assert decoded is None or isinstance(decoded, typing.get_args(messages.FromFrontend))


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31m", "x" * 201])
def test_a_peer_with_a_name_that_a_log_cannot_show_is_not_heard(name: str) -> None:
    codec: Codec[object] = Codec(messages.FromFrontend)
    assert codec.decode(encode(messages.Hello(messages.PROTOCOL, "frontend", name))) is None


def test_deeply_nested_and_oversized_frames_are_dropped() -> None:
    codec: Codec[object] = Codec(messages.FromFrontend)
    assert codec.decode(b"\x91" * 100_000 + b"\x00") is None
    assert codec.decode(b"\x00" * (messages.MAX_FRAME_BYTES + 1)) is None
    assert codec.bad_frames == 2


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_columns_round_trip(values: list[int]) -> None:
    assert messages.unpack(messages.pack(values)) == values


def test_a_torn_column_is_an_error() -> None:
    with pytest.raises(ValueError):
        messages.unpack(b"abc")
