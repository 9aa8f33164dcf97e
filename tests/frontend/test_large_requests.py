"""Large requests: a text that cannot fit is refused before much of it is tokenized, and one that fits never is; many
prompts are taken up a few at a time."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from quire.common.errors import RequestError
from quire.common.messages import Output
from quire.common.model_info import read_model_info
from quire.common.sampling import SamplingParams
from quire.frontend import tokenizer as module
from quire.frontend.chat_template import ChatOptions
from quire.frontend.generator import AT_ONCE, Generator
from quire.frontend.streams import Routing, TokenStream
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


class Client:
    """An engine whose sequences are done as soon as they are submitted."""

    capacity = None

    def __init__(self, model_dir: Path) -> None:
        self.model = read_model_info(str(model_dir), model_dir)

    def submit(self, prompt: Any, sampling: SamplingParams, *, routing: Routing, wake: asyncio.Event) -> TokenStream:
        stream = TokenStream(prompt, sampling, routing, abort=lambda _: None, wake=wake)
        stream.accept(Output(1, 0, [5], "length"))
        return stream


def test_many_prompts_let_others_in(model_dir: Path) -> None:
    async def main() -> tuple[int, int]:
        turns = answers = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(others())
        generator = Generator(Client(model_dir), Tokenizer.load(model_dir))  # type: ignore[arg-type]
        params = SamplingParams(max_tokens=1, n=2)
        async for _ in generator.generate_many([[5]] * 1024, params, request_id="x", routing=Routing()):
            answers += 1
        beside.cancel()
        return turns, answers

    turns, answers = asyncio.run(main())
    assert answers == 1024 and turns >= 2 * 1024 // AT_ONCE
