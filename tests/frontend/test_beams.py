"""Beam search as clients ask for it: what the engine is sent, what comes back, and what is refused."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tokenizers import Tokenizer

from quire.common.messages import Hypothesis, Output, Submit

from .fake_scheduler import FakeScheduler, http

Answer = Callable[[Submit], Output]
PROMPT = {"prompt": "ab", "use_beam_search": True}


@pytest.fixture
def found(tokenizer: Tokenizer) -> Answer:
    """An engine whose hypothesis i is i + 1 times the letter i of the alphabet."""

    def answer(submit: Submit) -> Output:
        ids = tokenizer.encode("abc", add_special_tokens=False).ids
        best = [Hypothesis([ids[i]] * (i + 1), "length", -1.5 * (i + 1), -1.5) for i in range(submit.sampling.n)]
        return Output(submit.id, 0, [], "length", 1, hypotheses=best)

    return answer


def post(url: str, body: dict[str, Any], path: str = "/v1/completions") -> Any:
    return http.post(url + path, json=body)


@pytest.mark.parametrize(
    ("asked", "width", "n"),
    [
        ({"n": 3}, 3, 3),
        ({}, 1, 1),
        ({"n": 2, "best_of": 5}, 5, 2),
        ({"n": 2, "best_of": None, "temperature": 0.0}, 2, 2),
        ({"use_beam_search": False, "beam_width": 4, "n": 2}, 4, 2),
    ],
    ids=str,
)
def test_width_and_number_of_answers(
    url: str, engine: FakeScheduler, found: Answer, asked: dict[str, Any], width: int, n: int
) -> None:
    engine.answer = found
    answer = post(url, PROMPT | asked | {"length_penalty": 0.5, "early_stopping": "never"})
    assert answer.status_code == 200, answer.text
    (submit,) = engine.submits
    sent = submit.sampling
    assert (sent.beam_width, sent.n, sent.length_penalty, sent.early_stopping) == (width, n, 0.5, "never")
    assert [choice["text"] for choice in answer.json()["choices"]] == ["a", "bb", "ccc"][:n]
    assert answer.json()["usage"]["completion_tokens"] == n * (n + 1) // 2
    assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 1


def test_a_stream_has_all_at_its_end(url: str, engine: FakeScheduler, found: Answer) -> None:
    engine.answer = found
    body = PROMPT | {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
    events = [json.loads(line[6:]) for line in post(url, body).text.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    assert [(choice["index"], choice["text"], choice["finish_reason"]) for choice in choices] == [
        (0, "a", "length"),
        (1, "bb", "length"),
    ]
    assert events[-1]["usage"]["completion_tokens"] == 3


def test_a_chat_may_search(url: str, engine: FakeScheduler, found: Answer) -> None:
    engine.answer = found
    chat = {"messages": [{"role": "user", "content": "a"}], "use_beam_search": True, "n": 2, "max_tokens": 9}
    answer = post(url, chat, "/v1/chat/completions").json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["a", "bb"]


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("top_p", 0.5, "top_p"),
        ("top_k", 4, "top_k"),
        ("min_p", 0.1, "min_p"),
        ("temperature", 0.7, "temperature"),
        ("stop", "x", "stop"),
        ("min_tokens", 2, "min_tokens"),
        ("presence_penalty", 1.0, "presence_penalty"),
        ("logit_bias", {"5": 1.0}, "logit_bias"),
        ("n", 17, "beam_width"),  # more than the engine computes at once
        ("best_of", 1, "n"),  # n is 2
        ("length_penalty", 6.0, "length_penalty"),
        ("early_stopping", "sometimes", "early_stopping"),
        ("max_tokens", 500, "max_tokens"),  # beams as long as that do not fit the KV cache
    ],
)
def test_what_has_no_part_in_a_search_is_refused_by_name(
    url: str, engine: FakeScheduler, field: str, value: Any, param: str
) -> None:
    answer = post(url, PROMPT | {"n": 2, "best_of": 8} | ({"best_of": None} if field == "n" else {}) | {field: value})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert engine.submits == []


@pytest.mark.parametrize("field", ["length_penalty", "early_stopping"])
def test_without_a_search_its_fields_are_refused(url: str, engine: FakeScheduler, field: str) -> None:
    answer = post(url, {"prompt": "a", field: 0.5 if field == "length_penalty" else True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert engine.submits == []


def test_a_search_begins_again_when_the_scheduler_died(url: str, engine: FakeScheduler, found: Answer) -> None:
    """Its client sees nothing."""
    engine.hold.clear()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, url, PROMPT | {"n": 2})
        while not engine.num_running:
            time.sleep(0.001)
        engine.answer = found
        engine.restart()
        assert [choice["text"] for choice in answer.result().json()["choices"]] == ["a", "bb"]
    first, second = engine.submits
    assert first.prompt == second.prompt and first.sampling == second.sampling and not second.output
