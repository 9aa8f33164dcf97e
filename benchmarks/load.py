"""Put load on a server, open or closed, and say what came of it."""

import asyncio
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import uvloop

from quire.benchmarks.figures import percentile
from quire.benchmarks.http_client import Answer, Body, Connection
from quire.benchmarks.traffic import Job

PERCENTS = (50, 90, 99)
PATIENCE_S = 600.0  # for an answer to end
STREAM: Body = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True, slots=True)
class Target:
    host: str
    port: int
    model: str


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request must keep to be good: seconds to the first token, and between tokens on the average."""

    ttft_s: float
    per_token_s: float

    def met(self, answer: Answer) -> bool:
        if answer.error or not answer.times or answer.ttft_s > self.ttft_s:
            return False
        return answer.tokens < 2 or answer.per_token_s <= self.per_token_s


@dataclass(frozen=True, slots=True)
class Run:
    """One load on one server: all answers, and the time it took."""

    answers: list[Answer]
    seconds: float
    client_cpu_s: float

    @property
    def well(self) -> list[Answer]:
        return [answer for answer in self.answers if not answer.error]

    @property
    def errors(self) -> list[str]:
        return [answer.error for answer in self.answers if answer.error]

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.tokens for answer in self.well) / self.seconds

    def ttfts(self) -> list[float]:
        return [answer.ttft_s for answer in self.well if answer.times]

    def per_token(self) -> list[float]:
        return [answer.per_token_s for answer in self.well if answer.tokens > 1 and len(answer.times) > 1]

    def gaps(self) -> list[float]:
        return [b - a for one in self.well for a, b in zip(one.times, one.times[1:], strict=False)]

    def wholes(self) -> list[float]:
        return [answer.whole_s for answer in self.well]

    def goodput(self, objective: Objective) -> float:
        """Requests a second that were good."""
        return sum(map(objective.met, self.answers)) / self.seconds

    def summary(self, objective: Objective | None) -> dict[str, Any]:
        """Milliseconds and rates, for JSON."""
        events = sum(len(answer.times) for answer in self.well)
        found: dict[str, Any] = {
            "requests": len(self.answers),
            "errors": len(self.errors),
            "examples of errors": self.errors[:3],
            "seconds": self.seconds,
            "requests_per_s": len(self.well) / self.seconds,
            "output_tokens_per_s": self.tokens_per_s,
            "tokens_per_event": sum(answer.tokens for answer in self.well) / max(events, 1),
            "cached_share": sum(a.cached_tokens for a in self.well) / max(sum(a.prompt_tokens for a in self.well), 1),
            "client_cpu_share": self.client_cpu_s / self.seconds,
        }
        measured = {"ttft": self.ttfts(), "per_token": self.per_token(), "gap": self.gaps(), "whole": self.wholes()}
        for name, values in measured.items():
            found[f"{name}_ms"] = {f"p{percent}": 1000 * percentile(values, percent) for percent in PERCENTS}
        if objective:
            found["goodput"] = {"requests_per_s": self.goodput(objective), "objective": asdict(objective)}
        return found


def closed(target: Target, jobs: Iterator[Job], clients: int, requests: int, extra: Body) -> Run:
    """`clients` of them, each of which asks again as soon as it has its answer, `requests` jobs in all."""
    work = islice(jobs, requests)

    async def client(send: "_Sender") -> None:
        for job in work:
            await send.job(job)

    async def all_clients(send: "_Sender") -> None:
        await asyncio.gather(*(client(send) for _ in range(clients)))

    return _run(target, all_clients, extra)


def opened(target: Target, jobs: Iterator[Job], arrivals: Sequence[float], extra: Body) -> Run:
    """Each job when its time has come, whatever became of those before. What is late in being sent counts as waited."""

    async def send_all(send: "_Sender") -> None:
        begin = time.perf_counter()
        running = []
        for at, job in zip(arrivals, jobs, strict=False):
            await asyncio.sleep(begin + at - time.perf_counter())
            running.append(asyncio.create_task(send.job(job, begin + at)))
        await asyncio.gather(*running)

    return _run(target, send_all, extra)


def _run(target: Target, act: Any, extra: Body) -> Run:
    async def main() -> list[Answer]:
        sender = _Sender(target, extra)
        await act(sender)
        sender.close()
        return sender.answers

    before, start = _cpu_s(), time.perf_counter()
    answers = uvloop.run(main())
    return Run(answers, time.perf_counter() - start, _cpu_s() - before)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class _Sender:
    """Connections that are idle are used again."""

    def __init__(self, target: Target, extra: Body) -> None:
        self._target, self._extra = target, {"model": target.model, **STREAM, **extra}
        if not self._extra["stream"]:
            del self._extra["stream_options"]
        self._idle: list[Connection] = []
        self.answers: list[Answer] = []

    async def job(self, job: Job, arrived_at: float = 0.0) -> None:
        said: list[Body] = []
        for body in job:
            if "messages" in body:
                said += body["messages"]
                body = body | {"messages": list(said)}
            answer = Answer(sent_at=arrived_at)
            arrived_at = 0.0
            self.answers.append(answer)
            await self._ask(body, answer, keep=len(job) > 1)
            said.append({"role": "assistant", "content": answer.text})
            if answer.error:
                return

    async def _ask(self, body: Body, answer: Answer, *, keep: bool) -> None:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        try:
            connection = await self._connection()
        except OSError as error:
            answer.error = f"connection: {error}"
            return
        try:
            async with asyncio.timeout(PATIENCE_S):
                await connection.ask(path, self._extra | body, answer, keep=keep)
        except TimeoutError:
            answer.error = f"no end within {PATIENCE_S:g} s"
            connection.close()
            return
        if connection.open:
            self._idle.append(connection)

    async def _connection(self) -> Connection:
        while self._idle:
            if (connection := self._idle.pop()).open:
                return connection
        return await Connection.to(self._target.host, self._target.port)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
