"""`best_of` as clients ask for it: what the engine is sent, which sequences come back, and what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer

from quire.common.messages import Output, Submit

from .fake_scheduler import FakeScheduler, http

PROMPT = {"prompt": "ab", "seed": 0, "max_tokens": 4}


@pytest.fixture
def drawn(tokenizer: Tokenizer) -> Callable[[Submit], Output]:
    """An engine whose sequence of seed i is "abc" and then i times an "a". The "abc" of odd ones is likelier."""

    def answer(submit: Submit) -> Output:
        seed = submit.sampling.seed or 0
        ids = tokenizer.encode("abc" + "a" * seed, add_special_tokens=False).ids
        logprobs = [-1.0 if seed % 2 else -2.0] * 3 + [-2.0] * seed
        return Output(submit.id, 0, ids, "length", 1, logprobs=logprobs)

    return answer


def post(url: str, body: dict[str, Any], path: str = "/v1/completions") -> Any:
    return http.post(url + path, json=body)


def test_the_likeliest_come_back_best_first(url: str, engine: FakeScheduler, drawn: Callable[[Submit], Output]) -> None:
    engine.answer = drawn
    answer = post(url, PROMPT | {"n": 3, "best_of": 5}).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "abca"),
        (1, "abc"),
        (2, "abcaaa"),
    ]
    assert sorted(submit.sampling.seed or 0 for submit in engine.submits) == [0, 1, 2, 3, 4]
    assert {(submit.sampling.n, submit.sampling.best_of) for submit in engine.submits} == {(1, 1)}


def test_what_a_stop_string_cuts_off_does_not_count(
    url: str, engine: FakeScheduler, drawn: Callable[[Submit], Output]
) -> None:
    """All that have an "a" end with the first one: the odd ones come before that without any, the even ones behind."""
    engine.answer = drawn
    answer = post(url, PROMPT | {"n": 5, "best_of": 6, "stop": "ca"}).json()
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "ab", "ab", "abc", "ab"]


def test_a_stream_has_everything_at_its_end(url: str, engine: FakeScheduler, drawn: Callable[[Submit], Output]) -> None:
    engine.answer = drawn
    lines = post(url, PROMPT | {"n": 2, "best_of": 3, "stream": True}).text
    assert lines.count('finish_reason":"length') == 2 and lines.index("abca") < lines.rindex("abc")


@pytest.mark.parametrize("same", [1, 3])
def test_all_of_them_are_no_choice(url: str, engine: FakeScheduler, same: int) -> None:
    """They come as they are drawn, and the workers are asked for nothing."""
    assert post(url, PROMPT | {"n": same, "best_of": same}).status_code == 200
    assert len(engine.submits) == same and {submit.sampling.best_of for submit in engine.submits} == {0}


def test_fewer_than_are_wanted_are_refused(url: str, engine: FakeScheduler) -> None:
    answer = post(url, PROMPT | {"n": 3, "best_of": 2})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "best_of" and not engine.submits
