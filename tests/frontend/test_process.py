"""A frontend process: answers at once, drains, ends with its engine, stays small, never loads torch."""

import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from quire.common.errors import EXIT_CONFIG, EXIT_FATAL
from quire.common.messages import Refused, Shutdown, Status
from quire.common.process import END

from .fake_scheduler import FakeScheduler, frontend_process, http, until, wait_ready

LONG = {"prompt": "hello world", "max_tokens": 100, "ignore_eos": True, "seed": 0}
MAX_RESIDENT_BYTES = 150e6


def wait_http(url: str) -> None:
    def answers() -> bool:
        try:
            return http.get(f"{url}/health", timeout=1).status_code == 200
        except httpx.TransportError:
            return False

    until(answers)


def test_http_answers_before_there_is_an_engine(tmp_path: Path) -> None:
    began = time.monotonic()
    with frontend_process(f"ipc://{tmp_path}") as (process, url):
        wait_http(url)
        assert time.monotonic() - began < 2 * 2  # the contract is 2 s; other work may share the cores of a test run
        ready = http.get(f"{url}/ready")
        assert ready.status_code == 503 and ready.json()["phase"] == "connecting" and "retry-after" in ready.headers
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            answer = http.post(url + path, json={})
            assert (
                answer.status_code == 503
                and answer.json()["error"]["code"] == "not_ready"
                and "retry-after" in answer.headers
            )
        assert http.get(f"{url}/v1/models").status_code == 503
        process.send_signal(END)
        assert process.wait(5) == 0


def test_phases_of_a_start(make_scheduler) -> None:
    with make_scheduler() as scheduler:
        scheduler.status = Status("loading", 0.25, "layer 3 of 12")
        with frontend_process(scheduler.address) as (_, url):
            wait_http(url)
            until(lambda: http.get(f"{url}/ready").json()["phase"] == "loading")
            body = http.get(f"{url}/ready").json()
            assert (body["progress"], body["detail"]) == (0.25, "layer 3 of 12") and "25%" in body["error"]["message"]
            assert http.post(f"{url}/v1/completions", json=LONG).status_code == 503
            scheduler.set_status(Status("ready", 1.0))
            wait_ready(url)
            assert http.post(f"{url}/v1/completions", json=LONG).status_code == 200


def test_sigterm_lets_running_requests_finish(make_scheduler) -> None:
    with make_scheduler() as scheduler, frontend_process(scheduler.address) as (process, url):
        wait_ready(url)
        expected = http.post(f"{url}/v1/completions", json=LONG).json()["choices"]
        scheduler.delay_s = 0.01
        answers: list[httpx.Response] = []
        clients = [
            threading.Thread(
                target=lambda stream=stream: answers.append(
                    http.post(f"{url}/v1/completions", json={**LONG, "stream": stream}, timeout=20)
                )
            )
            for stream in (False, False, True)
        ]
        for client in clients:
            client.start()
        until(lambda: scheduler.num_running == 3)
        process.send_signal(END)
        until(lambda: refused(url))
        for client in clients:
            client.join()
        assert process.wait(5) == 0
        whole = [answer.json()["choices"] for answer in answers if not answer.text.startswith("data:")]
        assert whole == [expected] * 2
        assert [answer.text.endswith("data: [DONE]\n\n") for answer in answers if answer.text.startswith("data:")] == [
            True
        ]


def refused(url: str) -> bool:
    try:
        return http.get(f"{url}/health", timeout=1).status_code == 503
    except httpx.TransportError:
        return True


@pytest.mark.parametrize("second_signal", [True, False])
def test_a_drain_ends(make_scheduler, second_signal: bool) -> None:
    """After drain_timeout, or at once at a second signal; what still ran is aborted."""
    from quire.common.config import ServerConfig

    with (
        make_scheduler(ServerConfig(drain_timeout=60.0 if second_signal else 0.3)) as scheduler,
        frontend_process(scheduler.address) as (process, url),
    ):
        wait_ready(url)
        scheduler.hold.clear()
        client = threading.Thread(target=lambda: ignore(http.post, f"{url}/v1/completions", json=LONG, timeout=20))
        client.start()
        until(lambda: len(scheduler.submits) > 0)
        process.send_signal(END)
        if second_signal:
            time.sleep(0.3)
            process.send_signal(END)
        assert process.wait(5) == 0
        client.join()
        until(lambda: len(scheduler.aborts) == 1)


def ignore(call, *args, **kwargs) -> None:
    with contextlib.suppress(httpx.TransportError):
        call(*args, **kwargs)


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        (Status("failed", detail="worker 0 was killed"), EXIT_FATAL, "worker 0 was killed"),
        (Shutdown(), 0, "shut down"),
        (Refused("other protocol"), EXIT_CONFIG, "other protocol"),
    ],
)
def test_the_process_ends_with_its_engine(make_scheduler, message: object, code: int, text: str) -> None:
    with make_scheduler() as scheduler, frontend_process(scheduler.address) as (process, url):
        wait_ready(url)
        scheduler.hold.clear()
        answers: list[httpx.Response] = []
        client = threading.Thread(
            target=lambda: answers.append(http.post(f"{url}/v1/completions", json=LONG, timeout=20))
        )
        client.start()
        until(lambda: len(scheduler.submits) > 0)
        began = time.monotonic()
        scheduler.tell(message)
        client.join()
        assert time.monotonic() - began < 2
        assert answers[0].status_code in (400, 500) or answers[0].json()["error"]
        assert text in answers[0].json()["error"]["message"]
        assert process.wait(5) == code


def test_a_model_without_tokenizer_ends_the_process(make_scheduler, tmp_path: Path) -> None:
    with make_scheduler() as scheduler:
        model = msgspec.structs.replace(scheduler.config.model, tokenizer=str(tmp_path))
        scheduler.config = msgspec.structs.replace(scheduler.config, model=model)
        with frontend_process(scheduler.address) as (process, _):
            assert process.wait(20) == EXIT_CONFIG


def test_memory_after_serving(shared: tuple[FakeScheduler, str], engine: FakeScheduler, url: str) -> None:
    for _ in range(20):
        http.post(f"{url}/v1/completions", json=LONG).raise_for_status()
    port = int(url.rpartition(":")[2])
    process = next(
        p
        for p in psutil.Process().children()
        if any(c.laddr.port == port for c in p.net_connections("tcp") if c.status == "LISTEN")
    )
    assert process.memory_info().rss < MAX_RESIDENT_BYTES


def test_torch_is_never_imported(model_dir: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import quire.frontend.process; from quire.frontend.tokenizer import Tokenizer;"
        f"assert 'transformers' not in sys.modules; Tokenizer.load(Path({str(model_dir)!r}));"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'triton')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_long_prompt_holds_up_nobody_else(make_scheduler) -> None:
    with make_scheduler() as scheduler:
        scheduler.info = msgspec.structs.replace(scheduler.info, max_model_len=1 << 19)
        with frontend_process(scheduler.address) as (_, url):
            wait_ready(url)
            answers: list[httpx.Response] = []
            prompt = {"prompt": "hello world, " * ((4 << 20) // 13)}
            client = threading.Thread(target=lambda: answers.append(http.post(f"{url}/v1/completions", json=prompt)))
            began = time.monotonic()
            client.start()
            longest = 0.0
            while not answers:
                asked = time.monotonic()
                http.get(f"{url}/health").raise_for_status()
                longest = max(longest, time.monotonic() - asked)
            assert answers[0].json()["error"]["code"] == "context_length_exceeded"
            assert "tokens, and the prompt has" in answers[0].json()["error"]["message"]  # they were counted
            assert longest < (time.monotonic() - began) / 2
            client.join()
