"""The openai client, with strict validation of answers, against a real frontend process."""

import httpx
import openai
import pytest
from openai import OpenAI
from tokenizers import Tokenizer

from quire.common.messages import Output

from .fake_scheduler import CONTEXT, FakeScheduler, http, until

PROMPT = "hello world, the quick brown fox"
MESSAGES = [{"role": "user", "content": "hello world"}]


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20, _strict_response_validation=True)


@pytest.fixture
def lenient(url: str) -> OpenAI:
    """For streamed completions: their finish_reason is null until the end, as OpenAI's is, and the strict client has no null there."""
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)


@pytest.fixture
def expected(tokenizer: Tokenizer):
    """The text of `count` tokens that the model answers to prompt ids, from `seed` on."""
    return lambda ids, count, seed=0: tokenizer.decode([ids[(seed + i) % len(ids)] for i in range(count)])


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "org/tiny"]
    assert client.models.retrieve("org/tiny").owned_by == "quire"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_completion(client: OpenAI, engine: FakeScheduler, tokenizer: Tokenizer, expected) -> None:
    ids = tokenizer.encode(PROMPT).ids
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, seed=0)
    assert answer.choices[0].text == expected(ids, 20)
    assert answer.choices[0].finish_reason == "length" and answer.id.startswith("cmpl-")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(ids), 20, len(ids) + 20)
    assert usage.prompt_tokens_details.cached_tokens == len(ids) // 2
    default = client.completions.create(model="org/tiny", prompt=PROMPT)
    assert default.usage.completion_tokens == 16 and default.model == "org/tiny"


@pytest.mark.parametrize("shape", ["text", "texts", "ids", "lists of ids"])
def test_prompt_shapes_and_choices(client: OpenAI, lenient: OpenAI, tokenizer: Tokenizer, expected, shape: str) -> None:
    one, two = tokenizer.encode(PROMPT).ids, tokenizer.encode("0123456789").ids
    prompt, encoded = {
        "text": (PROMPT, [one]),
        "texts": ([PROMPT, "0123456789"], [one, two]),
        "ids": (one, [one]),
        "lists of ids": ([one, two], [one, two]),
    }[shape]
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, n=2, seed=3)
    texts = [expected(ids, 9, 3 + choice) for ids in encoded for choice in range(2)]
    assert [c.text for c in answer.choices] == texts
    assert [c.index for c in answer.choices] == list(range(len(texts)))
    assert answer.usage.prompt_tokens == sum(map(len, encoded)) and answer.usage.completion_tokens == 9 * len(texts)
    streamed = dict.fromkeys(range(len(texts)), "")
    reasons: dict[int, list[str | None]] = {index: [] for index in streamed}
    for chunk in lenient.completions.create(model="tiny", prompt=prompt, max_tokens=9, n=2, seed=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            reasons[choice.index].append(choice.finish_reason)
    assert list(streamed.values()) == texts
    assert all(set(given[:-1]) <= {None} and given[-1] == "length" for given in reasons.values())


def test_echo(client: OpenAI, lenient: OpenAI, tokenizer: Tokenizer, expected) -> None:
    ids = tokenizer.encode(PROMPT).ids
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=5, seed=0, echo=True).choices[
        0
    ].text == PROMPT + expected(ids, 5)
    nothing = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True)
    assert (nothing.choices[0].text, nothing.usage.completion_tokens) == (PROMPT, 0)
    streamed = lenient.completions.create(model="tiny", prompt=PROMPT, max_tokens=5, seed=0, echo=True, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == PROMPT + expected(ids, 5)


def test_chat(client: OpenAI, tokenizer: Tokenizer, expected) -> None:
    rendered = "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(rendered).ids
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=3, seed=1)
    assert answer.choices[0].message.content == tokenizer.decode([ids[(1 + i) % len(ids)] for i in range(3)])
    assert answer.choices[0].message.role == "assistant" and answer.id.startswith("chatcmpl-")
    stopped = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=1)  # no limit: ends at <|im_end|>
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == "user\nhello world"
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello world"}]}]
    assert (
        client.chat.completions.create(model="tiny", messages=parts, seed=1).choices[0].message.content
        == "user\nhello world"
    )


def test_chat_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=30, n=2, seed=1, extra_body={"ignore_eos": True}
    )
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=30,
            n=2,
            seed=1,
            stream=True,
            stream_options=options,
            extra_body={"ignore_eos": True},
        )
    )
    for index in range(2):
        deltas = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert deltas[0].delta.role == "assistant" and all(d.delta.role is None for d in deltas[1:])
        assert "".join(d.delta.content or "" for d in deltas) == whole.choices[index].message.content
        assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 60
    assert all(c.usage is None for c in chunks[:-1]) and len({(c.id, c.created) for c in chunks}) == 1


def test_raw_stream(url: str, engine: FakeScheduler) -> None:
    body = {
        "model": "tiny",
        "prompt": PROMPT,
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    answer = http.post(f"{url}/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""] and '"usage":{' in frames[0]


def test_stop_strings_and_their_reason(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=100, seed=0, stop=["brown"])
    assert answer.choices[0].text == "hello world, the quick " and answer.choices[0].finish_reason == "stop"
    kept = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=100,
        seed=0,
        stop="brown",
        extra_body={"include_stop_str_in_output": True},
    )
    assert kept.choices[0].text == "hello world, the quick brown" and kept.choices[0].stop_reason == "brown"


def test_parameters_reach_the_engine(client: OpenAI, engine: FakeScheduler) -> None:
    extra = {
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "stop_token_ids": [9],
        "priority": -3,
        "cache_salt": "s",
        "timeout": 60,
        "max_queue_time": 2.5,
    }
    client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=3, temperature=0, top_p=0.5, presence_penalty=0.25, frequency_penalty=-0.5,
        logit_bias={"11": 5}, seed=8, user="me", extra_body=extra,
    )  # fmt: skip
    submit = engine.submits[0]
    sampling = submit.sampling
    assert (submit.priority, submit.tenant, submit.salt) == (-3, "me", ":s") and 0 <= submit.waited_s < 5
    assert (submit.timeout_s, submit.max_queue_s) == (60.0, 2.5)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0, 0.5, 7, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.1, 0.25, -0.5)
    assert (sampling.logit_bias, sampling.seed, sampling.min_tokens, sampling.max_tokens) == ({11: 5.0}, 8, 2, 3)
    assert 9 in sampling.stop_token_ids and len(sampling.stop_token_ids) == 2
    client.completions.create(model="tiny", prompt=PROMPT, extra_body={"ignore_eos": True})
    assert engine.submits[1].sampling.stop_token_ids == [] and engine.submits[1].sampling.seed is not None


def test_errors_before_and_within_a_stream(client: OpenAI, engine: FakeScheduler) -> None:
    engine.answer = lambda submit: Output(submit.id, 0, [], "error", error="the queue is full", rejection="overloaded")
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tiny", prompt=PROMPT, stream=True)
    assert (
        caught.value.status_code == 503
        and caught.value.code == "overloaded"
        and caught.value.response.headers["retry-after"]
    )
    engine.answer = lambda submit: Output(submit.id, 0, [5, 6], "error", error="NaN logits")
    with pytest.raises(openai.InternalServerError, match="NaN logits"):
        client.chat.completions.create(model="tiny", messages=MESSAGES)
    with pytest.raises(openai.APIError, match="NaN logits"):
        list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_aborted(url: str, engine: FakeScheduler, stream: bool) -> None:
    engine.delay_s = 0.01
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, "n": 2, "stream": stream}
    if stream:
        with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post(f"{url}/v1/completions", json=body, timeout=0.2)
    until(lambda: sorted(engine.aborts) == [s.id for s in engine.submits])
    assert len(engine.aborts) == 2 and engine.num_running == 0


def test_a_client_that_goes_away_before_the_first_token_is_aborted(url: str, engine: FakeScheduler) -> None:
    engine.hold.clear()
    with pytest.raises(httpx.ReadTimeout):
        http.post(
            f"{url}/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES, "stream": True}, timeout=0.2
        )
    until(lambda: len(engine.aborts) == 1)


def test_a_restarted_scheduler_goes_unnoticed(
    lenient: OpenAI, engine: FakeScheduler, tokenizer: Tokenizer, expected
) -> None:
    ids = tokenizer.encode(PROMPT).ids
    engine.delay_s = 0.005
    text = ""
    for count, chunk in enumerate(
        lenient.completions.create(model="tiny", prompt=PROMPT, max_tokens=100, seed=0, stream=True)
    ):
        text += chunk.choices[0].text
        if count == 20:
            engine.restart()
    assert text == expected(ids, 100) and len(engine.submits) == 2


def test_many_at_once(client: OpenAI, url: str, tokenizer: Tokenizer, expected) -> None:
    from concurrent.futures import ThreadPoolExecutor

    ids = tokenizer.encode(PROMPT).ids

    def ask(seed: int) -> str:
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "seed": seed}
        return http.post(f"{url}/v1/completions", json=body, timeout=20).json()["choices"][0]["text"]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(48))) == [expected(ids, 30, seed) for seed in range(48)]


def test_tokenize_and_back(url: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT).ids
    answer = http.post(f"{url}/tokenize", json={"model": "tiny", "prompt": PROMPT, "return_token_strs": True}).json()
    assert answer == {
        "count": len(ids),
        "max_model_len": CONTEXT,
        "tokens": ids,
        "token_strs": tokenizer.encode(PROMPT).tokens,
    }
    assert http.post(f"{url}/detokenize", json={"tokens": ids}).json() == {"prompt": PROMPT}
    chat = http.post(f"{url}/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    assert chat == tokenizer.encode("<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n").ids


def test_probes_metrics_version(url: str, engine: FakeScheduler) -> None:
    for path in ("/health", "/ready"):
        assert http.get(url + path).status_code == http.head(url + path).status_code == 200
    assert http.get(f"{url}/metrics").text == "quire:fake 1\n"
    assert http.get(f"{url}/version").json()["version"]
