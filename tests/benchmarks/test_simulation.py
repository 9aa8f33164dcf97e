"""The simulator keeps its own rules, whatever it simulates."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.benchmarks.simulation.fleet import Fleet, Planned, Replica
from quire.benchmarks.simulation.gpu import Features, Fitted, Roofline, features
from quire.benchmarks.simulation.measures import Measures, Objective, Record, fairness, sample
from quire.benchmarks.simulation.policies import KINDS, Choice, Machine, setup
from quire.benchmarks.simulation.router import ROUTERS, Affinity
from quire.benchmarks.simulation.runs import FLOODER, Trial, flood, replicas_for
from quire.benchmarks.simulation.vllm import VllmLike
from quire.benchmarks.simulation.work import Arrival, Job, Lengths, Mix, arrivals, job, read, together
from quire.common.config import SchedulerConfig
from quire.common.messages import StepPlan, pack, unpack

SMALL = Machine(kv_tokens=1024, max_model_len=512)
WORK = Mix(
    Lengths("uniform", 60, low=4, high=200), Lengths("uniform", 20, low=1, high=60), prefixes=3, prefix_tokens=40
)
TALKS = Mix(WORK.prompt, WORK.output, turns=2, think_s=0.1)
SECONDS = 2.0


class Witness:
    """Looks at everything that a fleet does."""

    def __init__(self) -> None:
        self.now = 0.0
        self.arrived_jobs: list[Job] = []
        self.ends: Counter[int] = Counter()
        self.hows: Counter[str] = Counter()
        self.preempted = 0
        self._free_at: dict[int, float] = {}

    def arrived(self, job: Job, now: float) -> None:
        self._forward(now)
        self.arrived_jobs.append(job)

    def planned(self, replica: Replica, step: Planned, used: int, took_s: float, now: float) -> None:
        self._forward(now)
        self.preempted += step.num_preempted
        assert took_s > 0
        assert len(replica.policy.dispatched) <= replica.setup.depth
        seen = sample(replica.policy, replica.setup.block_size, now, frozenset(), {})
        assert 0 <= seen.unknown <= seen.unfilled
        assert 0 <= used <= replica.policy.kv.num_blocks

    def ended(self, job: Job, how: str, now: float) -> None:
        self._forward(now)
        self.ends[job.id] += 1
        self.hows[how] += 1
        times = job.times.tolist()
        assert times == sorted(times), "a token before the one before it"
        assert not times or times[0] > job.arrived_at
        if how == "stop":
            assert len(times) == job.output

    def _forward(self, now: float) -> None:
        assert now >= self.now, "time went back"
        self.now = now


def played(policy: str, seed: int, *, mix: Mix = WORK, replicas: int = 1, max_queue_s: float = 0.0) -> Witness:
    witness = Witness()
    choice = Choice(SchedulerConfig(max_num_seqs=8), max_queue_s)
    fleet = Fleet(setup(policy, SMALL, choice), ROUTERS["affinity"](), witness, replicas)
    fleet.run(arrivals(mix, 60.0, SECONDS, seed))
    for replica in fleet.replicas:
        assert replica.load == 0 and replica.policy.kv.num_free == replica.policy.kv.num_blocks, "something is left"
        assert replica.busy_s <= fleet.now, "a device did two steps at once"
    return witness


@pytest.mark.parametrize("policy", ["quire", "vllm"])
@pytest.mark.parametrize("mix", [WORK, TALKS], ids=["prefixes", "conversations"])
def test_every_request_ends_once_and_time_goes_forward(policy: str, mix: Mix) -> None:
    preempted = 0
    for seed in range(5):
        seen = played(policy, seed, mix=mix, replicas=1 + seed % 3)
        assert seen.ends == Counter(job.id for job in seen.arrived_jobs)
        assert set(seen.hows) == {"stop"}
        assert len(seen.arrived_jobs) > 100
        preempted += seen.preempted
    assert preempted or policy == "quire", "no run was short of blocks"


def test_who_gives_up_ends_once_too() -> None:
    seen = played("vllm-impatient", 0, max_queue_s=0.002)
    assert seen.ends == Counter(job.id for job in seen.arrived_jobs)
    assert seen.hows["expired"] > 0 and seen.hows["stop"] > 0


@pytest.mark.parametrize("policy", KINDS)
def test_one_seed_has_one_answer(policy: str) -> None:
    trial = Trial(SMALL, Choice(max_queue_s=0.1), SECONDS)

    def answer(seed: int) -> object:
        return trial.run(policy, arrivals(WORK, 40.0, SECONDS, seed)).report(Objective(), 1, 16)

    assert answer(1) == answer(1) != answer(2)


def test_outputs_arrive_in_the_pace_of_the_device() -> None:
    """One request alone: its tokens are apart by a step, and the wires show at depth 1 only."""
    apart = {}
    for depth in (1, 2):
        witness = Witness()
        machine = Machine(kv_tokens=1024, max_model_len=512, depth=depth)
        Fleet(setup("quire", machine, Choice()), ROUTERS["round-robin"](), witness).run(
            iter([Arrival(0.0, ((1, 16),), 20)])
        )
        times = witness.arrived_jobs[0].times
        apart[depth] = times[10] - times[9]
    decode = Roofline().seconds(Features(1, 1, 1, 26, 0))
    assert apart[2] == pytest.approx(decode, rel=1e-3)
    assert apart[1] == pytest.approx(decode + 200e-6, rel=1e-3)


# --- the device ---------------------------------------------------------------------------------------------------

counts = st.integers(0, 100_000)
steps = st.builds(Features, counts, counts, counts, counts, counts, counts, counts, counts)


@given(steps, st.integers(0, len(Features._fields) - 1), st.integers(0, 100_000))
def test_more_never_takes_less_time(step: Features, field: int, more: int) -> None:
    larger = step._replace(**{Features._fields[field]: step[field] + more})
    fitted = Fitted(1e-3, tuple(map(float, range(len(step)))))
    assert Roofline().seconds(larger) >= Roofline().seconds(step) > 0
    assert fitted.seconds(larger) >= fitted.seconds(step)


def test_a_fit_finds_the_line_that_steps_lie_on() -> None:
    rng = Random(0)
    line = Fitted(4e-3, (1e-6, 2e-5, 1e-6, 4e-8, 1e-9, 0.0, 0.0, 0.0))
    seen = [Features(*(rng.randrange(1000) for _ in range(5))) for _ in range(200)]
    found = Fitted.of(seen, [line.seconds(step) for step in seen])
    for step in seen:
        assert found.seconds(step) == pytest.approx(line.seconds(step), rel=1e-6)


def test_a_fit_has_no_negative_parts() -> None:
    rng = Random(0)
    seen = [Features(*(rng.randrange(1000) for _ in range(5))) for _ in range(100)]
    found = Fitted.of(seen, [rng.uniform(1e-3, 2e-3) for _ in seen])
    assert found.constant >= 0 and min(found.weights) >= 0


def test_features_of_a_plan() -> None:
    copies = pack([5, 11, 12, 3, 4, 9, 21, 2])
    plan = StepPlan(1, 1, [], [], [], copies, pack([0, 1, 2]), pack([9, 0, 10]), pack([1, 4, 2]), bytes([1, 0, 1]))
    # decoding at 9 reads 10 slots; 1 + 2 + 3 + 4 pairs, and 11 + 12; of 10 blocks on the device and 10 on the host
    assert features(plan, 10, 10) == Features(3, 7, 2, 10, 33, host=2, disk=1, device=1)


def test_the_roofline_agrees_with_what_is_published() -> None:
    """Streams of 128 + 1,024 tokens: vLLM 0.30 on an H100, its share of bandwidth on an H200."""
    for rows, published in ((1, 209), (4, 785), (16, 3026), (64, 9376), (256, 19104)):
        tokens = rows / Roofline().seconds(Features(rows, rows, rows, rows * 640, 0))
        assert tokens == pytest.approx(published, rel=0.1)


# --- routers ------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(1, 12), st.floats(1.0, 2.0), st.integers(0, 1000))
def test_no_replica_has_more_than_its_bound(replicas: int, slack: float, seed: int) -> None:
    rng, router, loads = Random(seed), Affinity(slack), [0] * replicas
    for _ in range(200):
        if rng.random() < 0.3 and any(loads):
            loads[rng.choice([i for i, load in enumerate(loads) if load])] -= 1
        bound = router.bound(loads)
        chosen = router.choose(rng.randbytes(1), loads)  # few keys, so that they crowd
        loads[chosen] += 1
        assert loads[chosen] <= bound


def test_equal_prefixes_meet_and_few_of_them_move() -> None:
    router, keys = Affinity(), [bytes([i, j]) for i in range(16) for j in range(16)]
    before = [router.choose(key, [0] * 8) for key in keys]
    assert before == [router.choose(key, [0] * 8) for key in keys]
    assert len(set(before)) == 8
    moved = sum(a != b for a, b in zip(before, [router.choose(key, [0] * 9) for key in keys], strict=True))
    assert 0 < moved < len(keys) / 4


def test_a_router_without_slack_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Affinity(0.9)


# --- the other policy ---------------------------------------------------------------------------------------------


def test_the_vllm_like_policy_keeps_its_books_and_its_order() -> None:
    rng = Random(3)
    policy = VllmLike(32, 16, 512, max_num_seqs=8, max_num_batched_tokens=96)
    jobs = [
        job(i, Arrival(0.0, ((1, 40), (i + 10, rng.randrange(1, 120))), rng.randrange(1, 60)), 512) for i in range(60)
    ]
    began: list[int] = []
    preempted = 0
    for one in jobs:
        policy.add(one)
    replica = Replica(0, setup("vllm", SMALL, Choice()), Witness())
    replica.policy = policy
    while policy.waiting or policy.running:
        for _ in replica.fill(1.0):
            step = policy.dispatched[-1]
            assert sum(unpack(step.plan.counts)) <= 96 and len(step.requests) <= 8
            policy.kv.check(request.blocks for request in policy.running)
            assert [request.id for request in policy.waiting] == sorted(request.id for request in policy.waiting)
            preempted += step.num_preempted
            began += [request.id for request in step.requests if request.id not in began]
        replica.land(1.0)
    assert began == sorted(began)
    assert policy.kv.num_free == 32 and preempted


# --- work and figures ---------------------------------------------------------------------------------------------


def test_a_flood_does_not_change_what_others_send() -> None:
    alone = list(arrivals(WORK, 20.0, SECONDS, 1))
    both = together(arrivals(WORK, 20.0, SECONDS, 1), arrivals(Mix(tenants=(FLOODER,)), 80.0, SECONDS, 2))
    merged = list(both)
    assert [arrival for arrival in merged if arrival.tenant != FLOODER] == alone
    assert [arrival.at for arrival in merged] == sorted(arrival.at for arrival in merged)
    assert len(merged) > 3 * len(alone)


def test_rates_and_lengths_are_those_that_were_asked_for() -> None:
    mix = Mix(Lengths.parse("lognormal:200:1.0"), Lengths.parse("fixed:7"), long_share=0.1, long_prompt=9000)
    drawn = list(arrivals(mix, 50.0, 200.0, 0))
    prompts = [arrival.pieces[-1][1] for arrival in drawn]
    assert len(drawn) == pytest.approx(10_000, rel=0.05)
    assert prompts.count(9000) == pytest.approx(1000, rel=0.1)
    assert sum(p for p in prompts if p != 9000) / 9000 == pytest.approx(200, rel=0.1)
    assert {arrival.output for arrival in drawn} == {7}


@pytest.mark.parametrize("text", ["", "fixed", "normal:3", "uniform:3", "lognormal:1:2:3:4"])
def test_lengths_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="lengths are"):
        Lengths.parse(text)


def test_traces_of_three_kinds(tmp_path: Path) -> None:
    ours = tmp_path / "ours.jsonl"
    ours.write_text('{"time": 2, "prompt": 90, "output": 5, "tenant": "a", "prefix": "p", "prefix_tokens": 64}\n')
    mooncake = tmp_path / "mooncake.jsonl"
    mooncake.write_text('{"timestamp": 2000, "input_length": 1100, "output_length": 5, "hash_ids": [46, 47, 48]}\n')
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,90,5\n2023-11-16 18:15:48.6805900,9,7\n"
    )
    [one] = read(ours, speed=2)
    assert (one.at, sum(n for _, n in one.pieces), one.output, one.tenant) == (1.0, 90, 5, "a")
    [two] = read(mooncake)
    assert two.at == 2.0 and [n for _, n in two.pieces] == [512, 512, 76] and two.pieces[0][0] == 46
    first, second = read(azure)
    assert (first.at, second.at) == (0.0, 2.0) and second.pieces[0][1] == 9


def test_goodput_counts_what_held_the_objective() -> None:
    def record(ttft_s: float | None, gap_p99_s: float, how: str = "stop") -> Record:
        return Record(0.0, "", how, 1000, 10, 0.0, ttft_s, gap_p99_s)

    objective = Objective(1.0, 0.05, 0.5)
    assert objective.holds(record(1.4, 0.05))
    assert not objective.holds(record(1.6, 0.05))
    assert not objective.holds(record(1.4, 0.06))
    assert not objective.holds(record(None, 0.0, "expired"))


def test_figures_of_a_request_that_is_known() -> None:
    measures = Measures(0.0, 100.0)
    one = job(1, Arrival(1.0, ((1, 16),), 101), 512)
    one.times.extend([3.0 + 0.01 * i for i in range(100)] + [4.5])
    measures.ended(one, "stop", 4.5)
    [record] = measures.records
    assert record.ttft_s == 2.0 and record.output == 101
    assert record.gap_p99_s == pytest.approx(0.01), "one gap of a hundred may be longer"
    assert len(measures.gaps) == 100 and max(measures.gaps) == pytest.approx(0.51)


def test_work_done_twice_is_counted() -> None:
    calm, short = (
        Trial(Machine(kv_tokens=n, max_model_len=512), Choice(), SECONDS, warm_up=0.0) for n in (100_000, 1024)
    )
    found = [trial.run("vllm", arrivals(WORK, 60.0, SECONDS, 0)) for trial in (calm, short)]
    assert found[0].recomputed == 0 == found[0].preempted
    assert found[1].recomputed > 0 < found[1].preempted
    assert found[1].first_preemption is not None and found[1].first_preemption > 0.8


def test_fairness_is_of_those_who_have_to_wait() -> None:
    trial = Trial(Machine(kv_tokens=2048, max_model_len=512), Choice(), SECONDS)
    measures = trial.run(
        "vllm", arrivals(Mix(WORK.prompt, WORK.output, tenants=("a", "b")), 2000.0, SECONDS, 0), tenants=("a", "b")
    )
    found = fairness(measures.samples, ("a", "b"))
    assert found["seconds backlogged"] > 0 and 1.0 <= found["max/min service"] < 2.0
    assert fairness(measures.samples, ("a", "c"))["seconds backlogged"] == 0


def test_a_flood_in_arrival_order_is_everybodys() -> None:
    trial = Trial(SMALL, Choice(), SECONDS)
    mix = Mix(WORK.prompt, WORK.output, tenants=("a", "b"))
    found = flood(trial, "vllm", mix, 20.0, 10.0, 0, lambda _: None)
    assert found["p99 TTFT, times alone"] > 1.5
    assert found["alone"]["requests"] == found["with the flood"]["requests"]


@given(st.integers(1, 300))
def test_the_number_of_replicas_is_the_least_that_does(needed: int) -> None:
    tried: list[int] = []
    found = replicas_for(lambda n: float(n >= needed), 1.0, lambda n, _: tried.append(n))
    assert found == needed
    assert len(tried) <= 20


def test_a_load_that_no_number_serves() -> None:
    assert replicas_for(lambda n: 0.5, 0.9, lambda n, share: None, most=8) is None
