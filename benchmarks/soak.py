"""Mixed short requests without end: what grows, what is lost, what is altered.

    python benchmarks/soak.py [--requests 100000] [--warm-up 0.2] [--out benchmarks/results/soak] [-- FLAGS OF launch/serve.py]

CLIENTS connections that stay open, in a process of their own, ask for 1 to 4 tokens: streams and whole answers, greedy
and sampled, four in five held against the answer of an undisturbed run, the rest with prompts that were never seen. One
request in ten is longer and hung up on: before the answer, or in the middle of it. Every 2 s the private memory (USS),
descriptors and threads of each process and the blocks in use are written down. The slope of memory over requests is
Theil and Sen's, behind a warm-up, with the 95 % interval of a block bootstrap. With --kills, that many random
parts are killed afterwards under the same load, and everything is looked at again.
"""

import argparse
import asyncio
import itertools
import multiprocessing
import multiprocessing.connection
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from quire.benchmarks import report
from quire.benchmarks.drawing import Chart, charts
from quire.tests.chaos.clients import Body, Connection, Record, ask, whole, workload
from quire.tests.chaos.engine import BACK_S, FREELY, Engine, role_of
from quire.tests.e2e.server import wait_until

SAMPLE_S = 2.0
ABORTED = 0.1
UNSEEN = 0.2
KNOWN = 256
FEW_BLOCKS = ("--num-gpu-blocks-override", 2048)  # the prefix cache is full before the warm-up ends
BLOCK = 10  # samples that are drawn together: neighbours are alike
DRAWS = 400

Samples = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-up", type=float, default=0.2, help="share of the requests that the slope leaves out")
    parser.add_argument("--out", type=Path, help="writes OUT.json, OUT.txt and OUT.png")
    parser.add_argument("flags", nargs="*", help="flags of launch/serve.py, behind --")
    options = parser.parse_args()
    with Engine(*FREELY, *FEW_BLOCKS, *options.flags) as engine:
        engine.settle()
        engine.learn(known())
        began = time.monotonic()
        samples, outcome = soak(engine, options)
        outcome["requests/s"] = round(outcome["asked"] / (time.monotonic() - began), 1)
        outcome["left behind"] = report.complaint(engine.check)
        slopes = {role: slope(samples, role, options.warm_up) for role in samples[0]["processes"]}
        text = f"{described(outcome)}\n\n{growth(samples, slopes, options.warm_up)}"
        result: dict[str, Any] = {"outcome": outcome, "slopes": slopes, "samples": samples}
        if options.kills:
            result["with kills"] = under_fire(engine, options)
            result["with kills"]["left behind"] = report.complaint(engine.check)
            text += f"\n\nthen, with {options.kills} kills: {described(result['with kills'])}"
    print(f"\n{text}")
    if options.out:
        report.write(options.out, result, text)
        series = {
            role: [(sample["done"], sample["processes"][role]["uss_mb"]) for sample in samples] for role in slopes
        }
        charts(options.out.with_suffix(".png"), [Chart(series, "requests", "private memory, MB")])
    told = [outcome, *([result["with kills"]] if options.kills else [])]
    if any(part["lost"] or part["altered"] or part["left behind"] for part in told):
        raise SystemExit(1)


def known() -> list[Body]:
    return [body | {"max_tokens": 1 + i % 4} for i, body in enumerate(workload(KNOWN, first=10_000))]


# --- the clients, in a process of their own ---------------------------------------------------------------------------


class Clients:
    """Ask until `requests` have been asked, or until `stop`. `news` is what is known of it so far."""

    def __init__(self, engine: Engine, options: argparse.Namespace, requests: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        bodies = [(body, engine.golden(body)) for body in known()]
        arguments = (engine.port, options.clients, requests, options.seed, bodies, theirs)
        self._process = context.Process(target=run_clients, args=arguments, daemon=True)
        self._process.start()
        self.news: dict[str, Any] = {"asked": 0}

    def poll(self, timeout_s: float) -> bool:
        """Wait for news. False when the clients have ended."""
        if self._pipe.poll(timeout_s):
            try:
                self.news = self._pipe.recv()
            except EOFError:
                return False
        return True

    def stop(self) -> None:
        self._pipe.send("stop")
        while self.poll(BACK_S):
            pass
        self._process.join()


def run_clients(
    port: int,
    clients: int,
    requests: int | None,
    seed: int,
    bodies: list[tuple[Body, str]],
    pipe: "multiprocessing.connection.Connection[Any, Any]",
) -> None:
    asyncio.run(_run_clients(port, clients, requests, seed, bodies, pipe))
    pipe.close()


async def _run_clients(
    port: int,
    clients: int,
    requests: int | None,
    seed: int,
    bodies: list[tuple[Body, str]],
    pipe: "multiprocessing.connection.Connection[Any, Any]",
) -> None:
    told: dict[str, Any] = {"asked": 0, "aborted": 0, "lost": 0, "altered": 0, "examples": []}
    numbers = itertools.count()
    stopping = asyncio.Event()

    async def tell() -> None:
        while True:
            pipe.send(told)
            if pipe.poll():
                pipe.recv()
                stopping.set()
            await asyncio.sleep(0.5)

    async def client() -> None:
        connection: Connection | None = None
        while not stopping.is_set() and ((number := next(numbers)) < (requests or number + 1)):
            rng = random.Random(f"{seed}/{number}")
            connection = connection or await Connection.open("127.0.0.1", port)
            told["asked"] += 1
            if rng.random() < ABORTED:
                await abort(connection, rng, number)
                told["aborted"] += 1
                connection = None
                continue
            body, golden = drawn(rng, number, bodies)
            record = Record(body)
            await ask(connection, body, record)
            if not record.well:
                told["lost"] += 1
                told["examples"] = [*told["examples"], f"{record.status} {record.code} {record.error}"[:300]][:5]
                connection.close()
                connection = None
            elif golden is not None and record.text != golden:
                told["altered"] += 1
                told["examples"] = [*told["examples"], f"{record.text!r}, golden {golden!r}"][:5]

    telling = asyncio.create_task(tell())
    await asyncio.gather(*(client() for _ in range(clients)))
    telling.cancel()
    pipe.send(told)


def drawn(rng: random.Random, number: int, bodies: list[tuple[Body, str]]) -> tuple[Body, str | None]:
    """A request and its golden text, where there is one."""
    if rng.random() < UNSEEN:
        prompt = [rng.randrange(5, 4000) for _ in range(rng.randint(1, 48))]
        return {"model": "demo", "prompt": prompt, "max_tokens": rng.randint(1, 4), "seed": number}, None
    body, golden = rng.choice(bodies)
    return (body if rng.random() < 0.5 else whole(body)), golden


async def abort(connection: Connection, rng: random.Random, number: int) -> None:
    """Ask for more, and hang up before the answer or in the middle of it."""
    body = {"model": "demo", "prompt": f"# {number}\n", "max_tokens": 60, "ignore_eos": True, "stream": True}
    try:
        async with asyncio.timeout(rng.uniform(0, 0.3)):
            await connection.send("POST", "/v1/completions", body)
            async for _ in connection.pieces():
                pass
    except (TimeoutError, OSError, EOFError):
        pass
    connection.close()


# --- what is looked at ------------------------------------------------------------------------------------------------


def soak(engine: Engine, options: argparse.Namespace) -> tuple[Samples, dict[str, Any]]:
    clients = Clients(engine, options, options.requests)
    samples: Samples = []
    due = began = time.monotonic()
    while clients.poll(0.1):
        if time.monotonic() < due:
            continue
        due += SAMPLE_S
        samples.append(sample(engine, clients.news["asked"]))
        if len(samples) % 10 == 0:
            news, rate = clients.news, clients.news["asked"] / (time.monotonic() - began)
            sizes = ", ".join(f"{role} {seen['uss_mb']:.1f} MB" for role, seen in samples[-1]["processes"].items())
            print(
                f"{news['asked']} asked, {rate:.0f}/s, {news['lost']} lost, {news['altered']} altered; {sizes}",
                flush=True,
            )
    return samples, clients.news


def sample(engine: Engine, done: int) -> dict[str, Any]:
    processes: dict[str, dict[str, float]] = {}
    for process in engine.tree():
        name = role_of(process)
        while name in processes:  # another of the same role
            name += "'"
        memory = process.memory_full_info()
        processes[name] = {
            "uss_mb": round(memory.uss / 1e6, 3),
            "rss_mb": round(memory.rss / 1e6, 3),
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
        }
    return {"done": done, "blocks": engine.blocks_in_use(), "processes": processes}


def slope(samples: Samples, role: str, warm_up: float) -> dict[str, float]:
    """Kilobytes per 1,000 requests behind the warm-up, with the interval that holds 95 % of bootstrapped ones."""
    behind = [s for s in samples if s["done"] >= warm_up * samples[-1]["done"]]
    x = np.array([s["done"] / 1000 for s in behind])
    y = np.array([s["processes"][role]["uss_mb"] * 1000 for s in behind])
    rng = np.random.default_rng(0)
    starts = np.arange(max(1, len(x) - BLOCK + 1))
    drawn_slopes = []
    for _ in range(DRAWS):
        blocks = rng.choice(starts, size=max(1, len(x) // BLOCK))
        chosen = np.concatenate([np.arange(start, min(len(x), start + BLOCK)) for start in blocks])
        drawn_slopes.append(theil_sen(x[chosen], y[chosen]))
    low, high = np.quantile(drawn_slopes, [0.025, 0.975])
    return {"kb_per_1000": round(theil_sen(x, y), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def theil_sen(x: Any, y: Any) -> float:
    """The median of the slopes between any two points."""
    i, j = np.triu_indices(len(x), 1)
    apart = x[j] != x[i]
    return float(np.median((y[j] - y[i])[apart] / (x[j] - x[i])[apart])) if apart.any() else 0.0


def under_fire(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """The same load, with random kills, until all of them are done."""
    clients = Clients(engine, options, None)
    rng = random.Random(options.seed)
    wait_until(lambda: clients.poll(0.1) and clients.news["asked"] > options.clients, BACK_S)
    for number in range(1, options.kills + 1):
        victim = engine.kill(role := rng.choice(("worker", "scheduler")))
        engine.wait_replaced(victim, role)
        wait_until(engine.is_ready, BACK_S)
        calm = time.monotonic() + rng.uniform(0, 2)
        wait_until(lambda calm=calm: clients.poll(0.05) and time.monotonic() > calm)
        news = clients.news
        print(
            f"kill {number}/{options.kills}: {news['asked']} asked, {news['lost']} lost, {news['altered']} altered",
            flush=True,
        )
    clients.stop()
    return clients.news


def described(outcome: dict[str, Any]) -> str:
    counts = "{asked} requests, {aborted} hung up on: {lost} lost, {altered} altered".format(**outcome)
    rate = f", {outcome['requests/s']} requests/s" if "requests/s" in outcome else ""
    return "\n".join([counts + rate, *outcome["examples"], outcome["left behind"]]).rstrip()


def growth(samples: Samples, slopes: dict[str, dict[str, float]], warm_up: float) -> str:
    behind = [s for s in samples if s["done"] >= warm_up * samples[-1]["done"]]
    rows = []
    for role, found in slopes.items():
        seen = [s["processes"][role] for s in behind]
        ranges = [
            f"{min(s[what] for s in seen)} to {max(s[what] for s in seen)}"
            for what in ("uss_mb", "descriptors", "threads")
        ]
        rows.append([role, f"{found['kb_per_1000']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f})", *ranges])
    head = ["process", "KB per 1,000 requests (95 %)", "private MB", "descriptors", "threads"]
    blocks = [s["blocks"] for s in behind]
    return (
        report.table(head, rows) + f"\n\nblocks in use: {min(blocks):.0f} to {max(blocks):.0f} under load, 0 at the end"
    )


if __name__ == "__main__":
    main()
