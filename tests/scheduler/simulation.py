"""A device without tensors that replays plans from the wire and checks every KV read, and random runs through it.

KV is modelled by what it stands for: slot p of a sequence must hold the hash of tokens [0, p]. A read of anything else,
however it came about, is an AssertionError.
"""

import random
from array import array
from collections import deque
from dataclasses import dataclass, field

from quire.common.channel import Codec, encode
from quire.common.config import CacheConfig, SchedulerConfig
from quire.common.messages import Output, StepPlan, StepResult, pack, unpack
from quire.common.sampling import SamplingParams
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.step import Step
from quire.scheduler.suspects import PROOF

from .searches import VOCABULARY, best_found, likeliest, searching

STOP = 3
MAX_MODEL_LEN = 40


@dataclass
class Row:
    tokens: list[int]
    limit: int
    blocks: list[int]
    prefixes: list[int] = field(default_factory=list)  # hash of tokens [0, p] for each p
    computed: int | None = None  # KV so far; None before the first chunk, which may begin behind a cached prefix
    num_candidates: int = 0

    def prefix(self, position: int) -> int:
        while len(self.prefixes) <= position:
            parent = self.prefixes[-1] if self.prefixes else 0
            self.prefixes.append(hash((parent, self.tokens[len(self.prefixes)])))
        return self.prefixes[position]


def sample(prefix: int) -> int:
    """The token that follows a prefix: any function of it will do."""
    return hash((prefix, 7)) % VOCABULARY


class Device:
    """A worker that holds the contract of `StepPlan` against whoever wrote the plan."""

    def __init__(
        self, num_blocks: int, block_size: int, num_rows: int, budget: int, num_host: int = 0, num_disk: int = 0
    ) -> None:
        self.num_blocks, self.block_size, self.num_rows, self.budget = num_blocks, block_size, num_rows, budget
        self.kv: dict[int, list[int | None]] = {}
        self.rows: dict[int, Row] = {}
        self.step = 0
        self.epoch = 1
        self.num_cached_reads = 0
        self.window = 0  # tokens that it sees; 0: all
        self.timed = False  # whether it says how long a step took
        self.num_in_memory = num_blocks + num_host
        self.num_copyable = self.num_in_memory + num_disk
        self.num_copies = 0
        self._codec: Codec[StepPlan] = Codec(StepPlan)

    def forget(self, epoch: int) -> None:
        """What another group begins with: nothing but what is on disk."""
        self.kv = {block: kv for block, kv in self.kv.items() if block > self.num_in_memory}
        self.rows.clear()
        self.step, self.epoch = 0, epoch

    def run(self, plan: StepPlan) -> StepResult:
        decoded = self._codec.decode(encode(plan))
        assert decoded == plan, "the plan changed on the wire"
        assert plan.epoch == self.epoch, "a plan of another group"
        self.step += 1
        assert plan.step == self.step, "a plan is missing"
        for row in plan.released:
            del self.rows[row]
        for admitted in plan.admitted:
            assert 0 <= admitted.row < self.num_rows and admitted.row not in self.rows, "row is taken"
            tokens = unpack(admitted.tokens)
            limit = min(admitted.num_prompt + (admitted.sampling.max_tokens or 0), MAX_MODEL_LEN)
            asked = admitted.sampling.num_candidates
            self.rows[admitted.row] = Row(tokens, limit, list(admitted.blocks), num_candidates=asked)
        for row, blocks in plan.new_blocks:
            self.rows[row].blocks += blocks
        copies = unpack(plan.copies)
        for source, target in zip(copies[::2], copies[1::2], strict=True):
            assert 1 <= source <= self.num_copyable and 1 <= target <= self.num_copyable and source != target
            assert source in self.kv, "a copy of what was never written"
            self.kv[target] = list(self.kv[source])
            self.num_copies += 1
        for row in self.rows.values():
            assert all(1 <= block <= self.num_blocks for block in row.blocks), "no such block, or the null block"
            seen = row.blocks[max(0, (row.computed or 0) + 1 - self.window) // self.block_size if self.window else 0 :]
            assert row.computed is None or len(set(seen)) == len(seen), "a block twice in one table"
        return self._forward(plan)

    def _forward(self, plan: StepPlan) -> StepResult:
        rows, starts, counts = unpack(plan.rows), unpack(plan.starts), unpack(plan.counts)
        assert len(rows) == len(starts) == len(counts) == len(plan.samples) == len(set(rows)) > 0
        assert min(counts) >= 1 and sum(counts) <= self.budget
        # Reads of earlier KV come before any write of this step: a kernel gives no order between rows.
        for index, start in zip(rows, starts, strict=True):
            self._read(self.rows[index], start, start)
        tokens: list[int] = []
        best: list[tuple[int, float]] = []
        for index, start, count, samples in zip(rows, starts, counts, plan.samples, strict=True):
            row, end = self.rows[index], start + count
            assert end <= len(row.tokens), "a token is computed before it is known"
            for position in range(start, end):
                block = self.kv.setdefault(row.blocks[position // self.block_size], [None] * self.block_size)
                block[position % self.block_size] = row.prefix(position)
            row.computed = end
            if samples:
                assert end == len(row.tokens) < row.limit, "a sample too early or too many"
                if row.num_candidates:
                    best += likeliest(row.prefix(end - 1), sample(row.prefix(end - 1)), row.num_candidates)
                row.tokens.append(sample(row.prefix(end - 1)))
                tokens.append(row.tokens[-1])
        for index, start, count in zip(rows, starts, counts, strict=True):
            self._read(self.rows[index], start + count, start)
        took_us = self._took_us(starts, counts)
        ids, logprobs = pack(id for id, _ in best), array("f", [logprob for _, logprob in best]).tobytes()
        return StepResult(plan.epoch, plan.step, pack([1] * len(tokens)), pack(tokens), took_us, ids, logprobs)

    def _took_us(self, starts: list[int], counts: list[int]) -> int:
        """Like a device's time: a price each for the step, rows, tokens, and what these read; some steps are late."""
        if not self.timed:
            return 0
        reads = sum(count * (start + count) for start, count in zip(starts, counts, strict=True))
        late = 100 if self.step % 31 == 1 else 1
        return late * (900 + 20 * len(counts) + 300 * sum(counts) + 5 * reads)

    def _read(self, row: Row, end: int, start: int) -> None:
        """What queries from `start` on see of the tokens before `end`."""
        if row.computed is None:
            row.computed = end
            self.num_cached_reads += end
        assert row.computed == end, "a gap in the KV, or work done twice"
        for position in range(max(0, start + 1 - self.window) if self.window else 0, end):
            block = self.kv.get(row.blocks[position // self.block_size])
            assert block is not None, "KV that was never written"
            assert block[position % self.block_size] == row.prefix(position), "KV of another prefix"


@dataclass
class Outcome:
    """What a client saw. The ids come from its own copies of `Output`, as a frontend would collect them."""

    tokens: list[int]
    finish: str | None = None


@dataclass(frozen=True)
class Losses:
    """How the workers are lost: `rate` of the moments at which they may be by chance, and `poison`, the requests that
    do it whenever they are computed, or, of those in `slow`, whenever they are decoded.

    Chance spares whom it has struck until it has had the tokens that prove it innocent.
    """

    rate: float = 0.0
    poison: frozenset[int] = frozenset()
    slow: frozenset[int] = frozenset()

    def caused_by(self, step: Step) -> bool:
        starts, counts = unpack(step.plan.starts), unpack(step.plan.counts)
        return any(
            request.id in self.poison and (request.id not in self.slow or (start > 0 and count == 1))
            for request, start, count in zip(step.requests, starts, counts, strict=True)
        )


NO_LOSSES = Losses()


@dataclass
class Totals:
    """That the runs together went everywhere."""

    steps: int = 0
    preempted: int = 0
    cached: int = 0
    aborted: int = 0
    expired: int = 0
    resubmitted: int = 0
    faulted: int = 0
    lost: int = 0
    killed: int = 0  # lost by poison
    alone: int = 0  # steps


class Run:
    """Random requests through one scheduler and device. `depth` must not show in any token."""

    def __init__(self, seed: int, depth: int, *, make: type[Scheduler] = Scheduler, beams: float = 0.0) -> None:
        self.rng = rng = random.Random(seed)
        self.depth = depth
        self.block_size = rng.choice((1, 2, 4, 4, 5))
        num_blocks = -(-MAX_MODEL_LEN // self.block_size) + rng.choice((0, 0, 1, 4, 20))
        config = SchedulerConfig(
            max_num_seqs=rng.randint(1, 6),
            max_num_batched_tokens=rng.randint(1, 24),
            target_itl=rng.choice((0.0, 0.001, 4.0, 50.0)),
        )
        cache = CacheConfig(block_size=self.block_size, enable_prefix_caching=rng.random() < 0.85)
        num_host, num_disk = rng.choice((0, 0, 1, 5, 40)), rng.choice((0, 0, 1, 3, 40))
        if not cache.enable_prefix_caching:  # what is on disk is there to be shared
            num_disk = 0
        window = rng.choice((0, 0, 1, 3, 10))
        self.scheduler = make(
            config,
            cache,
            num_blocks,
            MAX_MODEL_LEN,
            num_host_blocks=num_host,
            num_disk_blocks=num_disk,
            window=window,
        )
        self.scheduler.kv.worth_waiting = rng.choice((1, 3, 100))
        if rng.random() < 0.5:  # now copying is cheaper, now computing
            self.scheduler.kv.restoring_takes(rng.choice((1.0, 9.0)), rng.choice((5.0, 20.0)))
            self.scheduler.kv.prefill_s = lambda start, count: count * 1.0
        self.device = Device(
            num_blocks, self.block_size, config.max_num_seqs, config.max_num_batched_tokens, num_host, num_disk
        )
        self.device.window = window
        self.device.timed = rng.random() < 0.7
        chance = random.Random(seed)
        self.todo = deque(
            searching(request, chance, self.scheduler.rejection) if chance.random() < beams else request
            for request in self._requests()
        )
        self.live: dict[int, Request] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.sent: deque[StepPlan] = deque()
        self.struck: dict[int, int] = {}  # by chance -> tokens then
        self.totals = Totals()

    def _requests(self) -> list[Request]:
        rng = self.rng
        shared = [rng.randrange(VOCABULARY) for _ in range(20)]
        priorities = rng.choice(((0,), (0, 0, 5), (-1, 0, 1)))
        weights = rng.choice(({"": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 3.0, "c": 0.5}))
        requests: list[Request] = []
        for id in range(rng.randint(1, 14)):
            prompt = shared[: rng.randint(0, 20)] if rng.random() < 0.6 else []
            prompt = prompt + [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))]
            if requests and rng.random() < 0.2:  # as several choices of one request
                prompt = requests[-1].tokens.tolist()
            sampling = SamplingParams(
                max_tokens=rng.randint(1, 20),
                min_tokens=rng.choice((0, 0, 1)),
                stop_token_ids=rng.choice(([], [STOP])),
                seed=0,
            )
            tenant = rng.choice(list(weights))
            requests.append(
                Request(
                    id,
                    array("i", prompt),
                    len(prompt),
                    sampling,
                    rng.choice(priorities),
                    tenant=tenant,
                    weight=weights[tenant],
                )
            )
        return requests

    def play(
        self,
        *,
        aborts: bool = False,
        expiries: bool = False,
        restarts: bool = False,
        faults: bool = False,
        losses: Losses = NO_LOSSES,
    ) -> dict[int, Outcome]:
        """Until every request has ended; what happened when is random, and does not depend on `depth` alone."""
        rng, scheduler = self.rng, self.scheduler
        while self.todo or not scheduler.idle:
            while self.todo and rng.random() < 0.4:
                self._add(self.todo.popleft())
            if aborts and self.live and rng.random() < 0.06:
                self._abort(rng.choice(list(self.live)))
            if expiries and self.live and rng.random() < 0.06:
                self._expire(rng.choice(list(self.live)))
            if restarts and self.live and rng.random() < 0.04:
                self._resubmit(rng.choice(list(self.live)))
            while len(self.sent) < self.depth and (step := scheduler.schedule()):
                self.sent.append(step.plan)
                self.totals.preempted += step.num_preempted
                self.totals.cached += sum(request.num_cached or 0 for request in step.admitted)
                self.totals.alone += step.alone
            if losses.rate and rng.random() < losses.rate and self._may_be_lost():
                self._lose()
            if self.sent and losses.caused_by(scheduler.dispatched[0]):
                self.totals.killed += 1
                self._lose()
            elif self.sent:
                result = self.device.run(self.sent.popleft())
                if faults and rng.random() < 0.04:
                    result = self._break(result)
                for request, output in scheduler.update(result):
                    if request.sampling.best_of and output.tokens:
                        assert output.logprobs == [_following(request.tokens.tolist()[:-1], 1)[0][1]]
                    self._collect(output.id, output.first_index, told(output), output.finish)
            scheduler.check()
            self.totals.steps += 1
            assert self.totals.steps < 5000, "no progress"
        assert not self.live and scheduler.kv.pool.num_free == scheduler.kv.pool.num_blocks, (
            "a request or a block is left"
        )
        return self.outcomes

    def _add(self, request: Request) -> None:
        assert self.scheduler.rejection(request) is None
        self.live[request.id] = request
        self.outcomes.setdefault(request.id, Outcome([]))
        if output := self.scheduler.add(request):
            self._collect(output.id, output.first_index, told(output), output.finish)

    def _abort(self, id: int) -> None:
        self.scheduler.abort(self.live.pop(id))
        self.outcomes[id].finish = "abort"
        self.totals.aborted += 1

    def _expire(self, id: int) -> None:
        request = self.live[id]
        output = self.scheduler.expire(request, "too late")
        assert (output.finish, output.error) == ("timeout", "too late")
        self._collect(id, output.first_index, output.tokens, output.finish)
        self.totals.expired += 1

    def _resubmit(self, id: int) -> None:
        """What a frontend does when its scheduler was restarted: the same request with the output it holds."""
        old = self.live.pop(id)
        self.scheduler.abort(old)
        tokens = old.tokens[: old.num_prompt] + array("i", self.outcomes[id].tokens)
        self._add(Request(id, tokens, old.num_prompt, old.sampling, old.priority, tenant=old.tenant, weight=old.weight))
        self.totals.resubmitted += 1

    def _may_be_lost(self) -> bool:
        """Notes whom chance strikes."""
        ids = [r.id for step in self.scheduler.dispatched for r in step.requests if r.finish is None]
        tokens = {id: len(self.outcomes[id].tokens) for id in ids}
        if any(id in self.struck and count < self.struck[id] + PROOF for id, count in tokens.items()):
            return False
        self.struck |= tokens
        return True

    def _lose(self) -> None:
        """The workers are gone, with all they held and whatever was under way."""
        self.totals.lost += 1
        self.scheduler.blame()
        for plan in self.sent:  # what they write to disk may be there, or not, or by half
            for target in unpack(plan.copies)[1::2]:
                self.device.kv[target] = [None] * self.block_size
        self.sent.clear()
        epoch = self.scheduler.epoch + 1
        for _, output in self.scheduler.regroup(epoch):
            self._collect(output.id, output.first_index, told(output), output.finish)
        self.device.forget(epoch)
        assert self.scheduler.kv.pool.num_free == self.scheduler.kv.pool.num_blocks and not self.scheduler.running
        self.scheduler.check()

    def _break(self, result: StepResult) -> StepResult:
        """A worker gives up a row of the step, or forgets the token of one, or returns nonsense."""
        self.totals.faulted += 1
        step = self.scheduler.dispatched[0]
        row = self.rng.choice(unpack(step.plan.rows))
        counts, tokens = unpack(result.counts), unpack(result.tokens)
        kind = self.rng.choice(("fault", "no token", "nonsense"))
        if kind == "fault" and (news := self.scheduler.fault(result.step, row, "NaN")):
            self._collect(news[1].id, news[1].first_index, news[1].tokens, news[1].finish)
        if kind == "no token" and counts:
            forgotten = self.rng.randrange(len(counts))
            counts[forgotten] = 0
            del tokens[forgotten]
        columns = b"abc" if kind == "nonsense" else pack(counts)
        return StepResult(result.epoch, result.step, columns, pack(tokens))

    def _collect(self, id: int, first_index: int, tokens: list[int], finish: str | None) -> None:
        assert id in self.live, "news of a request that has ended"
        outcome = self.outcomes[id]
        assert first_index == len(outcome.tokens), "a gap or a repetition in the output"
        outcome.tokens += tokens
        if finish is not None:
            outcome.finish = finish
            del self.live[id]


def _following(tokens: list[int], count: int) -> list[tuple[int, float]]:
    prefix = Row(tokens, 0, []).prefix(len(tokens) - 1)
    return likeliest(prefix, sample(prefix), count)


def told(output: Output) -> list[int]:
    """The tokens of an output; of a search those of all hypotheses, each with its end behind it."""
    return [*output.tokens, *(token for found in output.hypotheses for token in (*found.tokens, -1))]


def expected(request: Request) -> Outcome:
    """What a request's output must be, whoever else runs: the definition, one token after the other."""
    if request.sampling.beam_width:
        limit = min(request.num_prompt + (request.sampling.max_tokens or 0), MAX_MODEL_LEN)
        return Outcome(*best_found(request, limit, _following))
    row = Row(list(request.tokens), 0, [])
    limit = min(request.num_prompt + (request.sampling.max_tokens or 0), MAX_MODEL_LEN)
    while True:
        token = sample(row.prefix(len(row.tokens) - 1))
        row.tokens.append(token)
        output = row.tokens[request.num_prompt :]
        if token in request.sampling.stop_token_ids and len(output) > request.sampling.min_tokens:
            return Outcome(output, "stop")
        if len(row.tokens) >= limit:
            return Outcome(output, "length")
