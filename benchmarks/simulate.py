"""The scheduler in virtual time, against a model of the GPU: what a load would get, and from how many.

    python benchmarks/simulate.py compare --load 1.3 --long-share 0.1     policies on one trace
    python benchmarks/simulate.py flood                                   tenants beside one that floods
    python benchmarks/simulate.py plan --rate 40                          how many H200s for this load
    python benchmarks/simulate.py memory --requests 1000000               what the scheduler's process weighs
    python benchmarks/simulate.py aims --out benchmarks/results/simulate  all that the scheduler is held to

The device is a roofline of Qwen3-8B on an H200 (benchmarks/simulation/gpu.py says where each figure is from), or, with
--fit, a line through measured steps: a JSON list of {"rows", "tokens", "samples", "context", "pairs", "took_us"}. The
scheduler is the real one and sees nothing but plans and results. Rates are requests a second; --load is relative to what
one replica can do at most, which is found first. The first quarter of the time is not counted. One seed, one answer.

A request is good when its first token comes within --ttft and 99 % of its tokens within --itl of the one before.
"goodput" counts good requests among all that arrive, those included that give up after --max-queue seconds in the queue.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quire.benchmarks import report
from quire.benchmarks.drawing import Chart, charts
from quire.benchmarks.simulation import picture, runs
from quire.benchmarks.simulation.gpu import Fitted, Roofline
from quire.benchmarks.simulation.measures import Objective
from quire.benchmarks.simulation.policies import KINDS, Choice, Machine, paced_config
from quire.benchmarks.simulation.router import ROUTERS
from quire.benchmarks.simulation.runs import Trial
from quire.benchmarks.simulation.work import Arrival, Lengths, Mix, arrivals, read
from quire.common.config import SchedulerConfig

Options = argparse.Namespace
SHORT = Mix(Lengths("uniform", 20, low=8, high=32), Lengths("uniform", 2.5, low=1, high=4))
AIMS = {
    "overload": "compare --load 1.3 --long-share 0.1 --policies quire quire-patient quire-unpaced vllm vllm-impatient vllm-2048",
    "flood": "flood --long-share 0.1 --policies quire-patient vllm",
    "flood-short": "flood --load 0.5 --seconds 120 --policies quire-patient vllm",
    "loose": "compare --load 1.3 --long-share 0.1 --itl 1000 --policies quire vllm vllm-impatient",
    "kv": "compare --load 1.3 --kv-tokens 100000 --seconds 200 --policies quire-patient vllm",
    "swap": "compare --load 1.3 --kv-tokens 100000 --host-tokens 200000 --seconds 200 --policies quire-patient",
    "plan": "plan --rate 20 --long-share 0.1 --ttft-per-1k 0.2 --share 0.9 --router least-loaded --seconds 60",
    "memory": "memory --requests 1000000",
}
HEAD = (
    "policy",
    "good/s",
    "good",
    "served",
    "prompts from 8k",
    "tokens/s",
    "TTFT p50 p90 p99 (s)",
    "inter-token p50 p90 p99 (ms)",
    "p99/p50",
)
KV_HEAD = (
    "policy",
    "KV use",
    "waste",
    "not filled yet",
    "use at 1st preemption",
    "highest",
    "preempted",
    "recomputed",
    "saved",
    "restored",
)


def main() -> None:
    options = parse()
    if options.command == "aims":
        for name, words in AIMS.items():
            print(f"\n{name}: {words}", file=sys.stderr)
            run(parse(words.split()), options.out and Path(f"{options.out}-{name}"))
    else:
        run(options, options.out)


def run(options: Options, out: Path | None) -> None:
    began = time.monotonic()
    result, text, drawn = COMMANDS[options.command](options)
    print(f"\n{text}\n\n{time.monotonic() - began:.0f} s")
    if out:
        told = {
            name: value if isinstance(value, int | float | str | list) else str(value)
            for name, value in vars(options).items()
        }
        report.write(out, {"options": told, **result}, text)
        if drawn:
            charts(out.with_suffix(".png"), drawn)


def compare(options: Options) -> tuple[dict[str, Any], str, list[Chart]]:
    rate = rate_of(options)
    found, reports = {}, {}
    for name in options.policies:
        with_progress = Progress(name, options.seconds)
        found[name] = trial_of(options).run(name, trace_of(options, rate), progress=with_progress)
        reports[name] = found[name].report(objective_of(options), options.replicas, options.block_size)
    text = f"{rate:.2f} requests/s for {options.seconds:.0f} s\n\n{table(reports)}\n\n{kv_table(reports)}"
    return {"rate": rate, "policies": reports}, text, picture.compared(found)


def flood(options: Options) -> tuple[dict[str, Any], str, list[Chart]]:
    rate = rate_of(options)
    mix = mix_of(options, tenants=tuple(f"tenant {i}" for i in range(options.tenants)))
    found: dict[str, Any] = {}
    rows: list[Any] = []
    verdicts: list[Any] = []
    for name in options.policies:
        progress = Progress(name, options.seconds)
        one = found[name] = runs.flood(trial_of(options), name, mix, rate, options.flooding, options.seed, progress)
        for when in ("alone", "with the flood"):
            ttfts = [_three(one[when][f"TTFT s{which}"]) for which in ("", ", prompts below 8k", ", prompts from 8k")]
            rows.append(
                (name, when, f"{one[when]['served']} of {one[when]['requests']}", *ttfts, _three(one[when]["queued s"]))
            )
        fair = one["all too many"]["fairness"]
        verdicts.append((name, one["p99 TTFT, times alone"], fair["max/min service"], fair["seconds backlogged"]))
    head = ("policy", "the others", "served", "TTFT p50 p90 p99 (s)", "prompts below 8k", "from 8k", "of it queued")
    text = (
        f"{options.tenants} tenants with {rate:.2f} requests/s together, one more with {options.flooding:g} times that\n\n"
        f"{report.table(head, rows)}\n\nService is compared while all of them send too much.\n\n"
        f"{report.table(('policy', 'p99 TTFT, times alone', 'max/min service', 'for (s)'), verdicts)}"
    )
    return {"rate": rate, "policies": found}, text, picture.beside_a_flood(found)


def plan(options: Options) -> tuple[dict[str, Any], str, list[Chart]]:
    rate = rate_of(options)
    rows: list[tuple[int, str]] = []
    objective = objective_of(options)

    def attained(replicas: int) -> float:
        trial = trial_of(options, replicas=replicas)
        measures = trial.run(
            "quire", trace_of(options, rate), progress=Progress(f"{replicas} replicas", options.seconds)
        )
        found = measures.report(objective, replicas, options.block_size)["by prompt"].values()
        return min(of["good"] / of["requests"] for of in found if of["requests"])  # long prompts are not to pay for it

    def told(replicas: int, share: float) -> None:
        rows.append((replicas, f"{share:.2%}"))

    needed = runs.replicas_for(attained, options.share, told)
    text = f"{rate:.2f} requests/s, {options.share:.1%} of them good, short prompts and long ones alike: " + (
        f"{needed} replicas" if needed else "not with any number"
    )
    return (
        {"rate": rate, "replicas": needed, "tried": rows},
        f"{text}\n\n{report.table(('replicas', 'good'), sorted(rows))}",
        [],
    )


def memory(options: Options) -> tuple[dict[str, Any], str, list[Chart]]:
    def told(requests: int, used: float) -> None:
        print(f"\r{requests:,} requests: {used / 2**20:.1f} MiB", end="", file=sys.stderr, flush=True)

    watch = runs.Footprint(max(options.requests // 100, 1), told)
    began = time.monotonic()
    fleet = runs.footprint(
        machine_of(options), choice_of(options), SHORT, options.requests, options.rate or 1500.0, options.seed, watch
    )
    seconds = time.monotonic() - began
    text = (
        f"{watch.ended_total:,} requests, {watch.tokens:,} tokens in {seconds:.0f} s ({fleet.now:.0f} s of virtual time);\n"
        f"private memory {watch.samples[0][1] / 2**20:.1f} MiB after {watch.samples[0][0]:,}, {watch.samples[-1][1] / 2**20:.1f} MiB at the end,"
        f" {watch.growth:.3f} bytes a request from the second quarter to the last"
    )
    drawn = Chart({"scheduler": [(n, b / 2**20) for n, b in watch.samples]}, "requests", "private memory (MiB)")
    return {"growth_bytes": watch.growth, "samples": watch.samples}, text, [drawn]


COMMANDS: dict[str, Callable[[Options], tuple[dict[str, Any], str, list[Chart]]]] = {
    "compare": compare,
    "flood": flood,
    "plan": plan,
    "memory": memory,
}


def parse(words: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=[*COMMANDS, "aims"])
    add("--out", type=Path, help="writes OUT.json, OUT.txt and OUT.png")
    add("--seed", type=int, default=0)
    add(
        "--policies",
        nargs="+",
        choices=KINDS,
        default=["quire", "quire-patient", "vllm", "vllm-impatient"],
        metavar="NAME",
        help="; ".join(f"{name}: {kind.what}" for name, kind in KINDS.items()),
    )
    work = parser.add_argument_group("work")
    add = work.add_argument
    add("--rate", type=float, help="requests a second, all replicas together")
    add(
        "--load",
        type=float,
        help="likewise, relative to what the replicas can do at most; 1.3 by default, 0.6 in a flood",
    )
    add("--seconds", type=float, default=300.0, help="of arrivals; then the queue is served to its end")
    add(
        "--prompt",
        type=Lengths.parse,
        default=Mix().prompt,
        help="tokens: fixed:N, uniform:LOW:HIGH or lognormal:MEAN:SIGMA[:MOST]; by default as ShareGPT's",
    )
    add("--output", type=Lengths.parse, default=Mix().output, help="likewise")
    add("--long-share", type=float, default=0.0, help="of requests, with a prompt of --long-prompt tokens")
    add("--long-prompt", type=int, default=30_000)
    add("--burstiness", type=float, default=1.0, help="1: Poisson; less: burstier (shape of a gamma distribution)")
    add(
        "--prefixes",
        type=int,
        default=0,
        help="number of prefixes of --prefix-tokens, one of which each prompt begins with",
    )
    add("--prefix-tokens", type=int, default=1024)
    add("--turns", type=int, default=1, help="of each conversation, --think seconds between them")
    add("--think", type=float, default=5.0)
    add(
        "--trace",
        type=Path,
        help="JSON lines of time (s), prompt, output, tenant, prefix and prefix_tokens; Mooncake's; Azure's CSV",
    )
    add("--speed", type=float, default=1.0, help="how much faster the trace is played")
    add("--tenants", type=int, default=4, help="of a flood, besides the one that floods")
    add("--flooding", type=float, default=4.0, help="times what all others send")
    add("--requests", type=int, default=1_000_000, help="of memory")
    add_engine(parser)
    return parser.parse_args(words)


def add_engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("engine").add_argument
    add("--replicas", type=int, default=1)
    add(
        "--router",
        choices=ROUTERS,
        default="affinity",
        help="affinity: prefixes by consistent hashing with bounded loads",
    )
    add("--fit", type=Path, help="JSON of measured steps, in place of the roofline")
    add("--block-size", type=int, default=16)
    add("--kv-tokens", type=int, help="by default what fits beside the weights in 0.9 of 141 GB")
    add("--host-tokens", type=int, default=0, help="KV that host memory takes")
    add("--max-model-len", type=int, default=40_960)
    add("--max-num-seqs", type=int, help="ours; vLLM has its own")
    add("--max-num-batched-tokens", type=int, help="ours; vLLM has its own")
    add("--target-itl", type=float, help="milliseconds; ours")
    add("--pipeline-depth", type=int, default=2)
    add = parser.add_argument_group("objective").add_argument
    add("--ttft", type=float, default=2.0, help="seconds to the first token")
    add("--ttft-per-1k", type=float, default=0.0, help="seconds more for each 1,000 tokens of the prompt")
    add("--itl", type=float, default=50.0, help="milliseconds between tokens")
    add("--max-queue", type=float, default=1.5, help="seconds after which clients give up waiting; 0: never")
    add(
        "--share",
        type=float,
        default=0.99,
        help="of good requests, for a plan: of prompts below 8k tokens, and of the others",
    )


def machine_of(options: Options) -> Machine:
    roofline = Roofline(block_size=options.block_size)
    return Machine(
        Fitted.read(options.fit) if options.fit else roofline,
        options.kv_tokens or roofline.kv_tokens(),
        options.host_tokens,
        options.block_size,
        options.max_model_len,
        options.pipeline_depth,
    )


def choice_of(options: Options) -> Choice:
    named = {"max_num_seqs": options.max_num_seqs, "max_num_batched_tokens": options.max_num_batched_tokens}
    config = SchedulerConfig(**{name: value for name, value in named.items() if value is not None})
    return Choice(paced_config(config, options.target_itl), options.max_queue)


def mix_of(options: Options, tenants: tuple[str, ...] = ("",)) -> Mix:
    return Mix(
        options.prompt,
        options.output,
        options.long_share,
        options.long_prompt,
        options.burstiness,
        options.prefixes,
        options.prefix_tokens if options.prefixes else 0,
        options.turns,
        options.think,
        tenants,
    )


def objective_of(options: Options) -> Objective:
    return Objective(options.ttft, options.itl / 1000, options.ttft_per_1k)


def trial_of(options: Options, replicas: int | None = None) -> Trial:
    return Trial(machine_of(options), choice_of(options), options.seconds, replicas or options.replicas, options.router)


def rate_of(options: Options) -> float:
    """Of first turns, requests a second."""
    if options.trace:
        return 0.0
    if options.rate:
        return float(options.rate)
    load = options.load or (0.6 if options.command == "flood" else 1.3)
    found = runs.capacity(machine_of(options), mix_of(options), options.seed, Progress("capacity", runs.SATURATION_S))
    print(f"one replica does {found:.2f} requests/s at most", file=sys.stderr)
    return float(load * found * options.replicas / options.turns)


def trace_of(options: Options, rate: float) -> Iterator[Arrival]:
    if options.trace:
        return read(options.trace, speed=options.speed)
    return arrivals(mix_of(options), rate, options.seconds, options.seed)


class Progress:
    """Says how far virtual time has come, now and then."""

    def __init__(self, name: str, seconds: float) -> None:
        self._name, self._step, self._next = name, seconds / 10, seconds / 10

    def __call__(self, now: float) -> None:
        if now >= self._next:
            self._next = now + self._step
            print(f"{self._name}: {now:,.0f} s", file=sys.stderr, flush=True)


def table(reports: dict[str, dict[str, Any]]) -> str:
    rows = [
        (
            name,
            r["goodput/s"],
            f"{r['good share']:.1%}",
            f"{r['served']} of {r['requests']}",
            "{good} and {served} of {requests}".format(**r["by prompt"]["from 8k"]),
            r["output tokens/s"],
            _three(r["TTFT s"]),
            _three(r["inter-token ms"], 1),
            r["inter-token p99/p50"],
        )
        for name, r in reports.items()
    ]
    return report.table(HEAD, rows)


def kv_table(reports: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, r in reports.items():
        before = r["KV use before the first preemption"]
        shares = [r["KV use"], r["KV waste"], r["KV not filled yet"], before, r["highest KV use without preemption"]]
        rows.append(
            (
                name,
                *("none" if s is None else f"{s:.1%}" for s in shares),
                r["preemptions"],
                r["recomputed blocks"],
                r["saved blocks"],
                r["restored blocks"],
            )
        )
    return report.table(KV_HEAD, rows)


def _three(values: dict[str, float], digits: int = 2) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values.values())


if __name__ == "__main__":
    main()
