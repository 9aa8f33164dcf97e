"""Ours and any other engines on the same prompts, in turns: output tokens/s, and ours over theirs.

    python benchmarks/compare.py MODEL [--work 32x128/64 32x512/128 1x128/64] [--rounds 5]
        [--vllm PYTHON] [--vllm-all-cores PYTHON] [--openvino PYTHON:EXPORTED] [--transformers PYTHON] [--transformers-continuous PYTHON]
        [--out benchmarks/results/compare]

PYTHON is the interpreter of an environment in which that engine is installed; EXPORTED the model in OpenVINO's form
(peers/run_openvino.py says how it is made). Each engine is loaded once, in a process of its own. A round asks each of
them for the same prompts of random ids, greedily and past any end of sequence, one after the other, beginning with
another one each time; the others are stopped meanwhile. Each work has a first round that does not count. Prefix caches are off.
A ratio is of two measurements of one round; its median and spread are over the rounds.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from quire.benchmarks import drawing, report
from quire.benchmarks.engines import Engine, Turns, quiet
from quire.benchmarks.figures import ratios, spread
from quire.benchmarks.work import random_prompts, work

PEERS = Path(__file__).resolve().parent / "peers"
OURS = "quire"

Rates = dict[str, dict[str, list[float]]]  # work -> engine -> output tokens/s of each round


def main() -> None:
    options = parse()
    with engines(options) as (loaded, turns):
        rates = rounds(loaded, turns, options)
        about = {engine.name: {"version": engine.version, "load_s": engine.load_s} for engine in loaded}
    text = table(rates, turns.stolen_s)
    print(f"\n{text}")
    if options.out:
        report.write(options.out, {"engines": about, "tokens_per_s": rates, "idle_cpu_s": turns.stolen_s}, text)
        picture(rates, options.out.with_suffix(".png"))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory with config.json, *.safetensors and tokenizer.json")
    parser.add_argument(
        "--work", type=work, nargs="+", default=[work("32x128/64"), work("32x512/128"), work("1x128/64")]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--vllm", metavar="PYTHON", help="as it comes: one core is left to its scheduler")
    parser.add_argument("--vllm-all-cores", metavar="PYTHON", help="computing on every core")
    parser.add_argument("--openvino", metavar="PYTHON:EXPORTED")
    parser.add_argument("--transformers", metavar="PYTHON", help="generate() of a padded batch")
    parser.add_argument("--transformers-continuous", metavar="PYTHON", help="generate_batch()")
    parser.add_argument("--without-ours", action="store_true", help="only the others, against the first of them")
    parser.add_argument(
        "--ours", metavar="OPTION=VALUE", nargs="+", default=[], help="options of ours, as LLM takes them"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lock", type=Path, help="a file whose lock is held alone during each round")
    parser.add_argument("--out", type=Path, help="writes OUT.json, OUT.txt and OUT.png")
    return parser.parse_args(argv)


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """The command line of each engine that is to take part, ours first."""
    found: dict[str, list[str]] = {}

    def add(name: str, python: str | None, script: str, model: str, *more: str) -> None:
        if python:
            found[name] = [python, str(PEERS / f"run_{script}.py"), model, options.dtype, *more]

    if not options.without_ours:
        add(OURS, sys.executable, "quire", options.model, *options.ours)
    python, _, exported = (options.openvino or "").partition(":")
    add("openvino-genai", python, "openvino", exported)
    add("vllm", options.vllm, "vllm", options.model)
    add("vllm-all-cores", options.vllm_all_cores, "vllm", options.model, f"0-{len(os.sched_getaffinity(0)) - 1}")
    add("transformers", options.transformers, "transformers", options.model, "static")
    add("transformers-continuous", options.transformers_continuous, "transformers", options.model, "continuous")
    return found


@contextmanager
def engines(options: argparse.Namespace) -> Iterator[tuple[list[Engine], Turns]]:
    """All of them, loaded one after the other and then stopped."""
    turns = Turns()
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        loaded: list[Engine] = []
        for name, command in commands(options).items():
            print(f"{name}: loading", file=sys.stderr, flush=True)
            engine = Engine(name, command, logs / name)
            stack.callback(engine.close)
            print(f"{name} {engine.version}: loaded in {engine.load_s:.1f} s", file=sys.stderr, flush=True)
            turns.add(name, engine.process.pid, stoppable=name != OURS)
            with turns.only(name):
                pass
            loaded.append(engine)
        stack.callback(turns.wake)
        yield loaded, turns


def rounds(loaded: list[Engine], turns: Turns, options: argparse.Namespace) -> Rates:
    rates: Rates = {str(one): {engine.name: [] for engine in loaded} for one in options.work}
    for one in options.work:
        for number in range(options.rounds + 1):
            prompts = random_prompts(one.requests, one.prompt, f"{options.seed}/{one}/{number}")
            first = number % len(loaded)
            with quiet(options.lock):
                for engine in loaded[first:] + loaded[:first]:
                    with turns.only(engine.name):
                        done = engine.measure(one, prompts)
                    if number:
                        rates[str(one)][engine.name].append(done.rate)
            if number:
                told = ", ".join(f"{name} {rate[-1]:.0f}" for name, rate in rates[str(one)].items())
                print(f"{one} round {number}/{options.rounds}: {told} tokens/s", file=sys.stderr, flush=True)
    return rates


def table(rates: Rates, stolen_s: float) -> str:
    rows: list[list[Any]] = []
    for one, engines_rates in rates.items():
        ours = next(iter(engines_rates))
        for name, found in engines_rates.items():
            ratio = "" if name == ours else spread(ratios(engines_rates[ours], found)).told(2)
            rows.append([one, name, spread(found).told(), ratio])
    head = [
        "requests x prompt/output",
        "engine",
        "output tokens/s, median (least to most)",
        f"{ours} over it, in the same round",
    ]
    return (
        report.table(head, rows) + f"\n\nCPU seconds that idle engines used while another was measured: {stolen_s:.2f}"
    )


def picture(rates: Rates, path: Path) -> None:
    with drawing.figure(path, columns=len(rates), height=3.5) as panels:
        for panel, (one, found) in zip(panels, rates.items(), strict=True):
            drawing.bars(panel, {name: spread(values) for name, values in found.items()})
            panel.set_title(one)
            panel.set_ylabel("output tokens/s")


if __name__ == "__main__":
    main()
