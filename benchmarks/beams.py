"""Beam search in the engine against a loop of one-token requests: tokens per second, and blocks against sequences apart.

python benchmarks/beams.py [--model demo] [--width 4] [--tokens 128] [--prompt 100] [--searches 1 8]

The loop asks for one token of every beam, again and again; which beams go on it decides for nothing, so it is favoured.
Blocks are those of the real scheduler, with random continuations.
"""

import argparse
import random
import statistics
import time
from array import array
from collections.abc import Callable

from quire import LLM, SamplingParams
from quire.common.config import CacheConfig, SchedulerConfig
from quire.common.messages import StepResult, pack
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler

BLOCK, VOCABULARY = 16, 1000


def engine(llm: LLM, prompt: list[int], width: int, tokens: int, searches: int) -> None:
    params = SamplingParams(beam_width=width, n=width, max_tokens=tokens, ignore_eos=True)
    llm.generate([prompt] * searches, params, use_tqdm=False)


def loop(llm: LLM, prompt: list[int], width: int, tokens: int, searches: int) -> None:
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    beams = [[*prompt[:-1], i] for _ in range(searches) for i in range(width)]
    for _ in range(tokens):
        outputs = llm.generate(beams, one, use_tqdm=False)
        beams = [[*beam, *output.outputs[0].token_ids] for beam, output in zip(beams, outputs, strict=True)]


def speed(work: Callable[..., None], llm: LLM, prompt: list[int], width: int, tokens: int, searches: int) -> float:
    began = time.perf_counter()
    work(llm, prompt, width, tokens, searches)
    return searches * width * tokens / (time.perf_counter() - began)


def blocks(num_prompt: int, width: int, tokens: int) -> tuple[int, float, float]:
    """Most and mean blocks held, and blocks copied in a step."""
    rng = random.Random(0)
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=width), CacheConfig(block_size=BLOCK), 100_000 // BLOCK, num_prompt + tokens
    )
    prompt = array("i", [rng.randrange(VOCABULARY) for _ in range(num_prompt)])
    params = SamplingParams(beam_width=width, max_tokens=tokens, seed=0)
    scheduler.add(Request(1, prompt, num_prompt, params))
    held, copies = [], 0
    while step := scheduler.schedule():
        held.append(scheduler.kv.num_blocks - scheduler.kv.num_free)
        copies += len(step.plan.copies) // 8
        rows = len(step.sampled)
        ids = [id for _ in range(rows) for id in rng.sample(range(VOCABULARY), params.num_candidates)]
        logprobs = array("f")
        for _ in range(rows):
            logprobs.extend(sorted((-3 * rng.random() ** 2 for _ in range(params.num_candidates)), reverse=True))
        first = pack(ids[:: params.num_candidates])
        scheduler.update(StepResult(1, step.plan.step, pack([1] * rows), first, 0, pack(ids), logprobs.tobytes()))
    return max(held), statistics.mean(held), copies / len(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=100)
    parser.add_argument("--searches", type=int, nargs="+", default=[1, 8])
    given = parser.parse_args()
    most, mean, copies = blocks(given.prompt, given.width, given.tokens)
    apart = given.width * -(-(given.prompt + given.tokens - 1) // BLOCK)
    print(f"blocks: {most} at most, {mean:.1f} in the mean, {apart} apart; {copies:.2f} copied in a step")
    rng = random.Random(1)
    prompt = [rng.randrange(256) for _ in range(given.prompt)]
    with LLM(given.model) as llm:
        for searches in given.searches:
            for work in (engine, loop):
                speed(work, llm, prompt, given.width, 8, searches)
                runs = [speed(work, llm, prompt, given.width, given.tokens, searches) for _ in range(3)]
                print(f"{searches} searches, {work.__name__}: {statistics.median(runs):,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
