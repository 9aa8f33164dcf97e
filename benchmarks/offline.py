"""Output tokens/s of `quire.LLM`: so many requests of so many tokens, all at once.

    python benchmarks/offline.py [MODEL] [--work 32x128/64 ...] [--rounds 5] [--dtype bfloat16] [--load-format dummy] [--out FILE]

Prompts are random ids, other ones in each round; greedy, past any end of sequence. The first, short round counts for nothing.
Any option of the engine goes behind `--set`, under its name with underscores: --set threads=1 max_num_seqs=64.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from quire import LLM, SamplingParams
from quire.benchmarks import drawing, report
from quire.benchmarks.engines import Measured, quiet, timed
from quire.benchmarks.figures import spread
from quire.benchmarks.work import Work, random_prompts, work

WARM_UP = 8  # tokens of each output in the round that does not count


def main() -> None:
    options = parse()
    given = dict(word.split("=", 1) for word in options.set)
    choices = {"dtype": options.dtype, "load_format": options.load_format, "enable_prefix_caching": False}
    with LLM(options.model, **choices, **given) as llm:
        rates = {str(one): rounds(llm, one, options) for one in options.work}
    rows = [
        [name, spread(found).told(), f"{spread(found).low / spread(found).high:.2f}"] for name, found in rates.items()
    ]
    text = report.table(["requests x prompt/output", "output tokens/s, median (least to most)", "least/most"], rows)
    print(f"\n{text}")
    if options.out:
        report.write(options.out, {"tokens_per_s": rates}, text)
        with drawing.figure(options.out.with_suffix(".png")) as (panel,):
            drawing.bars(panel, {name: spread(found) for name, found in rates.items()})
            panel.set_ylabel("output tokens/s")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument(
        "--work", type=work, nargs="+", default=[work("32x128/64"), work("32x512/128"), work("1x128/64")]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto", help="dummy: random weights, only config.json is needed")
    parser.add_argument("--set", metavar="OPTION=VALUE", nargs="+", default=[])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lock", type=Path, help="a file whose lock is held alone during each round")
    parser.add_argument("--out", type=Path, help="writes OUT.json, OUT.txt and OUT.png")
    return parser.parse_args(argv)


def rounds(llm: LLM, one: Work, options: argparse.Namespace) -> list[float]:
    rates = []
    for number in range(options.rounds + 1):
        prompts = random_prompts(one.requests, one.prompt, f"{options.seed}/{one}/{number}")
        with quiet(options.lock):
            done = generate(llm, prompts, one.output if number else min(WARM_UP, one.output))
        if number:
            rates.append(done.rate)
            print(f"{one} round {number}/{options.rounds}: {done.rate:.0f} tokens/s", file=sys.stderr, flush=True)
    return rates


def generate(llm: LLM, prompts: list[list[int]], output: int) -> Measured:
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    return timed(lambda: sum(len(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)))


if __name__ == "__main__":
    main()
