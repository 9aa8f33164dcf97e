"""A tiny scheduler for tests. Plans name no sampled token, so a whole run can be written before anything computes."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.common.messages import Admitted, StepPlan, pack
from quire.common.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, seed=0, max_tokens=1 << 20)

Work = tuple[int, int, int, bool]  # row, start, count, samples


def make_plan(
    step: int,
    work: Sequence[Work],
    *,
    released: Sequence[int] = (),
    admitted: Sequence[Admitted] = (),
    new_blocks: Sequence[tuple[int, list[int]]] = (),
    copies: Sequence[tuple[int, int]] = (),
    epoch: int = 1,
) -> StepPlan:
    rows, starts, counts, samples = zip(*work, strict=True) if work else ((), (), (), ())
    return StepPlan(
        epoch=epoch,
        step=step,
        released=list(released),
        admitted=list(admitted),
        new_blocks=list(new_blocks),
        copies=pack(block for pair in copies for block in pair),
        rows=pack(rows),
        starts=pack(starts),
        counts=pack(counts),
        samples=bytes(samples),
    )


def admit(
    row: int,
    tokens: Sequence[int],
    blocks: Sequence[int],
    *,
    sampling: SamplingParams = GREEDY,
    num_prompt: int | None = None,
) -> Admitted:
    return Admitted(
        row=row,
        tokens=pack(tokens),
        num_prompt=len(tokens) if num_prompt is None else num_prompt,
        sampling=sampling,
        blocks=list(blocks),
    )


@dataclass
class Running:
    tokens: list[int]  # prompt, and output so far when it is taken up again
    num_prompt: int
    sampling: SamplingParams = GREEDY
    row: int = -1
    length: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass
class Script:
    """Plans, and for each the sequences that sample in it, in the order of the results."""

    plans: list[StepPlan] = field(default_factory=list)
    samplers: list[list[int]] = field(default_factory=list)


def random_script(
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    seed: int,
    num_rows: int,
    block_size: int,
    num_blocks: int,
    budget: int = 40,
    sampling: Sequence[SamplingParams] = (),
    outputs: Sequence[Sequence[int]] = (),
) -> Script:
    """Continue every prompt by `new_tokens`, of which it has its `outputs` already: rows come and go, prompts are cut at
    random, blocks are dealt at random and reused as soon as they are free, and a prompt whose beginning another one
    computed shares its blocks."""
    rng = random.Random(seed)
    sequences = [
        Running([*p, *(outputs[i] if outputs else ())], len(p), sampling[i] if sampling else GREEDY)
        for i, p in enumerate(prompts)
    ]
    free_blocks = rng.sample(range(1, num_blocks + 1), num_blocks)
    owners = dict.fromkeys(free_blocks, 0)
    free_rows = rng.sample(range(num_rows), num_rows)
    waiting, running, released = list(range(len(prompts))), [], []
    script = Script()

    def take(count: int) -> list[int]:
        taken = [free_blocks.pop() for _ in range(count)]
        owners.update(dict.fromkeys(taken, 1))
        return taken

    def shared(sequence: Running) -> list[int]:
        """Full blocks of a running sequence with the same beginning, KV in place."""
        best: list[int] = []
        for other in (sequences[i] for i in running):
            same = 0
            for mine, theirs in zip(sequence.tokens, other.tokens, strict=False):
                if mine != theirs:
                    break
                same += 1
            count = min(same, other.computed, len(sequence.tokens) - 1) // block_size
            best = max(best, other.blocks[:count], key=len)
        return best

    while waiting or running:
        admissions, growth, work, samplers = [], [], [], []
        while waiting and free_rows and rng.random() < 0.7:
            sequence = sequences[waiting[0]]
            prefix = shared(sequence)
            needed = math.ceil((sequence.num_prompt + new_tokens) / block_size) - len(prefix)
            held = sum(
                math.ceil((sequences[i].num_prompt + new_tokens) / block_size) - len(sequences[i].blocks)
                for i in running
            )
            if needed + held > len(free_blocks):
                break
            for block in prefix:
                owners[block] += 1
            sequence.row, sequence.length = free_rows.pop(), len(sequence.tokens)
            sequence.computed = len(prefix) * block_size
            sequence.blocks = [*prefix, *take(rng.randint(0, needed))]
            admissions.append(
                admit(
                    sequence.row,
                    sequence.tokens,
                    sequence.blocks,
                    sampling=sequence.sampling,
                    num_prompt=sequence.num_prompt,
                )
            )
            running.append(waiting.pop(0))
        left = budget
        for i in rng.sample(running, rng.randint(0, len(running))):
            sequence = sequences[i]
            count = min(left, rng.choice([1, 3, 1000]), sequence.length - sequence.computed)
            if not count:
                continue
            left -= count
            end = sequence.computed + count
            if (missing := math.ceil(end / block_size) - len(sequence.blocks)) > 0:
                more = take(missing)
                sequence.blocks += more
                growth.append((sequence.row, more))
            work.append((sequence.row, sequence.computed, count, end == sequence.length))
            sequence.computed = end
            if end == sequence.length:
                sequence.length += 1
                samplers.append(i)
        script.plans.append(
            make_plan(len(script.plans), work, released=released, admitted=admissions, new_blocks=growth)
        )
        script.samplers.append(samplers)
        released = []
        for i in [i for i in running if sequences[i].length == sequences[i].num_prompt + new_tokens]:
            running.remove(i)
            released.append(sequences[i].row)
            free_rows.append(sequences[i].row)
            for block in sequences[i].blocks:
                owners[block] -= 1
                if not owners[block]:
                    free_blocks.insert(0, block)
    return script
