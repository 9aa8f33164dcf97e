"""Many clients, few blocks; clients that go away."""

import asyncio

import httpx
import pytest

from .server import Server, wait_until

CLIENTS = 64


@pytest.fixture(scope="module")
def crowded() -> "object":
    with Server("--num-gpu-blocks-override", 64, "--max-model-len", 512) as server:
        yield server.wait_ready()


def body(i: int) -> dict[str, object]:
    prompt = f"def function_{i}(argument):\n" * (1 + i % 7)
    return {"model": "demo", "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}


async def ask_all(url: str, clients: int = CLIENTS) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=CLIENTS)) as http:

        async def ask(i: int) -> str:
            answer = await http.post("/v1/completions", json=body(i))
            assert answer.status_code == 200, answer.text
            text: str = answer.json()["choices"][0]["text"]
            return text

        return await asyncio.gather(*(ask(i) for i in range(clients)))


def test_64_clients_on_64_blocks_get_what_each_gets_alone(crowded: Server) -> None:
    free = crowded.metric("quire:kv_blocks_free")
    assert free == crowded.metric("quire:kv_blocks") == 64
    alone = [crowded.http.post("/v1/completions", json=body(i)).json()["choices"][0]["text"] for i in range(CLIENTS)]
    together = asyncio.run(ask_all(crowded.url))
    assert together == alone
    assert crowded.metric("vllm:num_preemptions_total") > 0
    wait_until(lambda: crowded.metric("quire:kv_blocks_free") == free)


def aborted(server: Server) -> float:
    try:
        return server.metric("vllm:request_success_total", finished_reason="abort")
    except AssertionError:  # a labelled metric is not there before its first event
        return 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_blocks(demo: Server, stream: bool) -> None:
    fields = {"model": "demo", "prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": stream}
    total = demo.metric("quire:kv_blocks")
    before = aborted(demo)
    with httpx.Client(base_url=demo.url) as http:
        if stream:
            with http.stream("POST", "/v1/completions", json=fields) as answer:
                lines = answer.iter_lines()  # held: dropping it would hang up
                next(lines)
                assert demo.metric("vllm:num_requests_running") == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=fields, timeout=0.5)
    wait_until(lambda: aborted(demo) == before + 1)  # it did not run to its end
    wait_until(lambda: demo.metric("quire:kv_blocks_free") == total)
    assert demo.metric("vllm:num_requests_running") == 0
