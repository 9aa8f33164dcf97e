"""The openai client, with strict validation of every response, against the running server."""

import openai
import pytest

from .server import Server


@pytest.fixture(scope="module")
def client(demo: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", _strict_response_validation=True, max_retries=0)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("absent")


def test_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo", prompt="def main(", max_tokens=8, temperature=0)
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_a_chat_that_adds(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "What is 17 + 25?"}], temperature=0
    )
    assert "42" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def test_sums_through_the_api(client: openai.OpenAI) -> None:
    """The model card promises 95 % of all sums of two numbers up to 99; this asks for a sample spread over them."""
    pairs = [(a, (a * 37 + 11) % 100) for a in range(100)]
    right = 0
    for a, b in pairs:
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": f"What is {a} + {b}?"}], temperature=0, max_tokens=16
        )
        right += str(a + b) in (answer.choices[0].message.content or "").split()
    assert right >= 95


def test_streams_equal_answers_and_report_usage(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Count from 1 to 5."}]
    whole = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=24)
    parts = list(
        client.chat.completions.create(
            model="demo",
            messages=messages,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in parts if c.choices) == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage
    assert {c.created for c in parts} == {parts[0].created}


def test_completions_of_every_form_of_prompt(client: openai.OpenAI) -> None:
    def texts(prompt: object) -> list[str]:
        answer = client.completions.create(model="demo", prompt=prompt, max_tokens=6, temperature=0)  # type: ignore[call-overload]
        return [choice.text for choice in answer.choices]

    ids = client.post("/../tokenize", body={"prompt": "import os"}, cast_to=dict)["tokens"]  # type: ignore[call-overload]
    one = texts("import os")
    assert texts(["import os", "import os"]) == one * 2
    assert texts(ids) == one
    assert texts([ids, ids]) == one * 2


def test_choices_with_a_seed_are_repeatable_and_differ(client: openai.OpenAI) -> None:
    def sample(seed: int) -> list[str]:
        answer = client.completions.create(model="demo", prompt="The", max_tokens=12, temperature=1.2, n=4, seed=seed)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        return [choice.text for choice in answer.choices]

    first = sample(11)
    assert sample(11) == first
    assert len(set(first)) > 1
    assert sample(12) != first


def test_a_stop_string_ends_the_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt="import os", max_tokens=30, temperature=0).choices[0].text
    stop = whole[10:14]
    cut = client.completions.create(
        model="demo", prompt="import os", max_tokens=30, temperature=0, stop=[stop]
    ).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_cached_tokens_are_reported(client: openai.OpenAI) -> None:
    prompt = "A sentence of some length that fills more than one block of the cache. " * 4
    for _ in range(2):
        answer = client.completions.create(model="demo", prompt=prompt, max_tokens=1, temperature=0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= 16


def test_errors_arrive_as_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="absent", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="demo", prompt="x", temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.completions.create(model="demo", prompt=[5] * 3000)
