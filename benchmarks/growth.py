"""How the time of a step grows: output tokens/s against the batch and against the context, beside the ceiling of the machine.

    python benchmarks/growth.py MODEL [--batch 1 2 4 8 16 32 64] [--context 128 512 2048 8192] [--dtype bfloat16] [--out benchmarks/results/growth]

Prompts are computed first, and stay in the prefix cache; what is measured is decoding alone, as the difference between
outputs of 2 and of 2 + STEPS tokens. Batches have the first of the contexts, contexts the batch --beside. The ceiling counts what
no engine gets around: in a step, all weights are read or multiplied, whichever takes longer, and the KV is read, at the rates
that torch reached on this machine just before: the best of its matrix products of the model's shapes, and reading memory.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quire import LLM
from quire.benchmarks import drawing, report
from quire.benchmarks.engines import quiet
from quire.benchmarks.offline import generate
from quire.benchmarks.work import random_prompts
from quire.common.model_info import model_path

STEPS = 32
READ_BYTES = 1 << 28  # more than any cache holds
ROWS = 512  # of a product at its best
ENOUGH_S = 0.1  # of one product, repeated
SLACK = 64  # tokens beyond prompt and output that the context is to have

Ceiling = Callable[[int, int], float]  # batch and context -> tokens/s
Rates = dict[int, dict[str, float]]  # batch or context -> "measured" or "ceiling" -> tokens/s


@dataclass(frozen=True, slots=True)
class Shapes:
    """What of a model decides how long a step must take."""

    products: list[tuple[int, int, int]]  # columns in, columns out, how often in a step
    kv_values: int  # of one token, all layers

    @property
    def weights(self) -> int:
        """That a step multiplies with."""
        return sum(columns_in * columns_out * times for columns_in, columns_out, times in self.products)

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shapes":
        hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        dim = config.get("head_dim") or hidden // heads
        kv = dim * (config.get("num_key_value_heads") or heads)
        wide = config["intermediate_size"]
        products = [(hidden, heads * dim + 2 * kv, layers), (heads * dim, hidden, layers), (hidden, 2 * wide, layers)]
        products += [(wide, hidden, layers), (hidden, config["vocab_size"], 1)]
        return cls(products, 2 * kv * layers)


@dataclass(frozen=True, slots=True)
class Machine:
    """What it can do."""

    read_bytes_per_s: float
    flop_per_s: float

    @classmethod
    def measured(cls, shapes: Shapes, dtype: torch.dtype) -> "Machine":
        read = READ_BYTES / best(torch.ones(READ_BYTES // 4).sum)
        return cls(read, max(product_rate(wide, deep, dtype) for wide, deep, _ in shapes.products))

    def ceiling(self, shapes: Shapes, itemsize: int, batch: int, context: int) -> float:
        """Tokens/s."""
        read_s = shapes.weights * itemsize / self.read_bytes_per_s
        products_s = 2 * batch * shapes.weights / self.flop_per_s
        kv_s = batch * context * shapes.kv_values * itemsize / self.read_bytes_per_s
        return batch / (max(read_s, products_s) + kv_s)


def product_rate(columns_in: int, columns_out: int, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product with many rows."""
    x, weight = torch.randn(ROWS, columns_in, dtype=dtype), torch.randn(columns_out, columns_in, dtype=dtype)
    return 2 * ROWS * columns_in * columns_out / best(lambda: torch.nn.functional.linear(x, weight))


def best(act: Callable[[], object]) -> float:
    """Seconds of the quickest of several."""
    act()
    times: list[float] = []
    while sum(times) < ENOUGH_S or len(times) < 3:
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    options = parse()
    dtype = getattr(torch, options.dtype)
    shapes = Shapes.of(json.loads((model_path(options.model) / "config.json").read_text()))
    with quiet(options.lock), torch.inference_mode():
        machine = Machine.measured(shapes, dtype)
    ceiling = partial(machine.ceiling, shapes, dtype.itemsize)
    length = max(options.context) + STEPS + SLACK
    given = dict(word.split("=", 1) for word in options.set)
    with LLM(options.model, dtype=options.dtype, max_model_len=length, **given) as llm:
        first = options.context[0]
        by_batch = {batch: one(llm, ceiling, batch, first, options) for batch in options.batch}
        by_context = {context: one(llm, ceiling, options.beside, context, options) for context in options.context}
    text = "\n\n".join(
        [table(f"batch, {first} tokens each", by_batch), table(f"context, {options.beside} sequences", by_context)]
    )
    rates = {"read_bytes_per_s": machine.read_bytes_per_s, "flop_per_s": machine.flop_per_s}
    text += "\n\nMemory is read at {read_bytes_per_s:.3g} bytes/s, products take {flop_per_s:.3g} operations/s.".format(
        **rates
    )
    print(f"\n{text}")
    if options.out:
        report.write(options.out, {"batch": by_batch, "context": by_context, **rates}, text)
        picture(by_batch, by_context, options)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 512, 2048, 8000])
    parser.add_argument("--beside", type=int, default=4, help="the batch of the contexts")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", metavar="OPTION=VALUE", nargs="+", default=[], help="options of LLM")
    parser.add_argument("--lock", type=Path, help="a file whose lock is held alone during each round")
    parser.add_argument("--out", type=Path, help="writes OUT.json, OUT.txt and OUT.png")
    return parser.parse_args(argv)


def one(llm: LLM, ceiling: Ceiling, batch: int, context: int, options: argparse.Namespace) -> dict[str, float]:
    prompts = random_prompts(batch, context, f"{batch}/{context}")
    with quiet(options.lock):
        generate(llm, prompts, 2)
        taken = []
        for _ in range(options.repeats):
            few, more = generate(llm, prompts, 2), generate(llm, prompts, 2 + STEPS)
            taken.append(more.seconds - few.seconds)
    rate = batch * STEPS / statistics.median(taken)
    found = {"measured": rate, "ceiling": ceiling(batch, context)}
    print(
        f"batch {batch}, context {context}: {rate:.0f} of {found['ceiling']:.0f} tokens/s", file=sys.stderr, flush=True
    )
    return found


def table(name: str, rates: Rates) -> str:
    rows = [
        [x, f"{found['measured']:,.0f}", f"{found['ceiling']:,.0f}", f"{found['measured'] / found['ceiling']:.2f}"]
        for x, found in rates.items()
    ]
    return report.table([name, "tokens/s", "ceiling", "share of it"], rows)


def picture(by_batch: Rates, by_context: Rates, options: argparse.Namespace) -> None:
    names = (f"sequences in a step, {options.context[0]} tokens each", f"context, {options.beside} sequences")
    with drawing.figure(options.out.with_suffix(".png"), columns=2, height=3.5) as panels:
        for panel, rates, name in zip(panels, (by_batch, by_context), names, strict=True):
            series = {kind: [(x, found[kind]) for x, found in rates.items()] for kind in ("measured", "ceiling")}
            drawing.lines(panel, series, name, "output tokens/s", marks="o")
            panel.set_xscale("log", base=2)
            panel.set_xticks(list(rates), [str(x) for x in rates])


if __name__ == "__main__":
    main()
