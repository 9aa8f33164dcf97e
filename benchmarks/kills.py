"""SIGKILL of random parts under load: whether anything is lost or altered, and how long until service is back.

    python benchmarks/kills.py [--count 200] [--streams 32] [--out benchmarks/results/kills] [-- FLAGS OF launch/serve.py]

STREAMS clients stream without pause, every other request sampled with a seed of its own, and every text is held against
that of an undisturbed run. Kills come at random moments, one in ten before the engine has recovered from the one before.
For each kill that is left alone, service is back, counted from the kill on,
- at the first token that any stream gets from a step planned after it: what ends the longest silence of all streams;
- at the first token of a request that is sent right after the kill, and queues behind those that are resumed;
- at the moment from which on /ready is 200, where it was seen not to be.
"""

import argparse
import itertools
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from quire.benchmarks import report
from quire.tests.chaos.clients import Crowd, Load, Record, workload
from quire.tests.chaos.engine import BACK_S, FREELY, Engine

POLL_S = 0.005
LATEST = 256  # requests of the load, among which are those that stream
OVERLAPPING = 0.1
CALM_S = 2.0  # at most, between one recovery and the next kill
MARKS = ("any token", "new request's token", "ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--roles", nargs="+", default=["worker", "scheduler"], choices=["worker", "scheduler"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="writes OUT.json and OUT.txt")
    parser.add_argument("flags", nargs="*", help="flags of launch/serve.py, behind --")
    options = parser.parse_args()
    bodies = workload(4 * options.streams, 120)
    with Engine(*FREELY, *options.flags) as engine:
        engine.settle()
        engine.learn([*bodies, *probes()])
        print(f"{len(bodies)} answers are known, the engine is ready", flush=True)
        with Load(engine.port, bodies, options.streams) as load:
            kills, asked = bombard(engine, load, options)
            records = [*load.finish(), *asked]
        verdict = judge(engine, records) | {"left behind": report.complaint(engine.check)}
    text = f"{described(verdict)}\n\n{by_role(kills)}"
    print(f"\n{text}")
    if options.out:
        report.write(options.out, {**verdict, "kills": kills}, text)
    if verdict["client errors"] or verdict["altered"] or verdict["left behind"]:
        raise SystemExit(1)


def probes() -> list[dict[str, Any]]:
    return workload(1, 8, first=50_000)


def bombard(engine: Engine, load: Load, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Record]]:
    """The kills, each with what was measured, and what was asked besides the load."""
    rng = random.Random(options.seed)
    kills: list[dict[str, Any]] = []
    asked: list[Record] = []
    for number in range(1, options.count + 1):
        role = rng.choice(options.roles)
        engine.kill(role, rng.randrange(len(engine.parts(role)) or 1))
        kill: dict[str, Any] = {"role": role}
        if rng.random() < OVERLAPPING and number < options.count:
            time.sleep(rng.uniform(0, 1))
        else:
            kill |= until_back(engine, load, asked)
            time.sleep(rng.uniform(0, CALM_S))
        kills.append(kill)
        told = ", ".join(f"{mark} {kill[mark]:.2f} s" for mark in MARKS if kill.get(mark) is not None)
        errors = sum(bool(record.error) for record in load.ended)
        print(
            f"{number}/{options.count} {role}: {told or 'not waited for'}; {len(load.ended)} answers, {errors} errors",
            flush=True,
        )
    return kills, asked


def until_back(engine: Engine, load: Load, asked: list[Record]) -> dict[str, float | None]:
    """Asks at once, and watches /ready meanwhile."""
    killed_at = time.monotonic()
    down, ready_at = False, None
    with Crowd(engine.port, probes(), patience_s=BACK_S) as probe:
        (record,) = probe.records
        while not (record.ended_at and engine.is_ready()):
            if engine.is_ready():
                ready_at = ready_at or time.monotonic()
            else:
                down, ready_at = True, None
            assert time.monotonic() < killed_at + BACK_S, f"service is not back:\n{engine.log()[-4000:]}"
            time.sleep(POLL_S)
        ready_at = ready_at or time.monotonic()
        asked += probe.join()
    if not record.times:  # an error, which the verdict tells
        return {}
    times = (at for other in load.records[-LATEST:] for at in other.times)
    heard = sorted({killed_at, *(at for at in times if killed_at < at < record.times[0]), record.times[0]})
    _, any_token = max(itertools.pairwise(heard), key=lambda pair: pair[1] - pair[0])
    marks = (any_token, record.times[0], ready_at)
    seen = dict(zip(MARKS, (round(at - killed_at, 4) for at in marks), strict=True))
    return seen if down else {**seen, "ready": None}


def judge(engine: Engine, records: list[Record]) -> dict[str, Any]:
    """Of every answer: errors, and texts that are not the golden one."""
    errors = [record for record in records if not record.well]
    altered = [record for record in records if record.well and record.text != engine.golden(record.body)]
    return {
        "answers": len(records),
        "tokens": sum(record.tokens for record in records),
        "client errors": len(errors),
        "altered": len(altered),
        "examples": [f"{record.code} {record.error}"[:300] for record in errors[:5]]
        + [f"{record.body['prompt'][:20]!r}: {record.text[:200]!r}" for record in altered[:5]],
    }


def described(verdict: dict[str, Any]) -> str:
    counts = "{answers} answers with {tokens} tokens: {client errors} client errors, {altered} altered"
    return "\n".join([counts.format(**verdict), *verdict["examples"], verdict["left behind"]]).rstrip()


def by_role(kills: list[dict[str, Any]]) -> str:
    """Minimum, median, 90th percentile and maximum of each mark."""
    times: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for kill in kills:
        for mark in MARKS:
            if kill.get(mark) is not None:
                times[kill["role"], mark].append(kill[mark])
    rows = []
    for (role, mark), values in sorted(times.items()):
        cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
        spread = (min(values), statistics.median(values), cuts[8], max(values))
        num_kills = sum(kill["role"] == role for kill in kills)
        rows.append([f"{role}: {mark}, s", num_kills, len(values), *(f"{value:.2f}" for value in spread)])
    return report.table(["killed: what is back", "kills", "measured", "min", "median", "90 %", "max"], rows)


if __name__ == "__main__":
    main()
