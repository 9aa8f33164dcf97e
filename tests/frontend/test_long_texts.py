"""A text that cannot fit is refused before much of it is tokenized, and one that fits never is."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from quire.common.errors import RequestError
from quire.frontend import tokenizer as module
from quire.frontend.chat_template import ChatOptions
from quire.frontend.tokenizer import Tokenizer

LIMIT, SLICE = 50, 40  # tokens; characters


@pytest.fixture
def short(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.setattr(module, "SLICE_CHARACTERS", SLICE)
    return Tokenizer.load(model_dir, max_model_len=LIMIT)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(alphabet="ab é你😀\n<|im_start|>", max_size=6 * LIMIT)
    | st.integers(1, 300).map(lambda n: "hello " * n)
)
def test_only_what_cannot_fit_is_refused(short: Tokenizer, tokenizer: Backend, text: str) -> None:
    whole = tokenizer.encode(text).ids
    try:
        assert asyncio.run(short.encode(text)) == whole
    except RequestError as error:
        assert error.code == "context_length_exceeded" and len(whole) > LIMIT


def test_no_more_is_tokenized_than_it_takes(short: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(encode: Callable[..., list[list[int]]]) -> Callable[..., list[list[int]]]:
        def counting(*args: Any, **kwargs: Any) -> list[list[int]]:
            found = encode(*args, **kwargs)
            made.append(sum(map(len, found)))
            return found

        return counting

    monkeypatch.setattr(module, "encode", counted(module.encode))
    for ask in (short.encode("7" * 400), short.encode_chat([{"role": "user", "content": "7" * 400}], ChatOptions())):
        made.clear()
        with pytest.raises(RequestError, match=f"{LIMIT} tokens, and the prompt has more than") as caught:
            asyncio.run(ask)
        assert caught.value.code == "context_length_exceeded"
        assert LIMIT < sum(made) < 1.1 * LIMIT + SLICE
