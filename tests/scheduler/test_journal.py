"""A journal holds what a scheduler needs to decide the same again, from whatever is left of it."""

import itertools
import random
import struct
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire.common.config import CacheConfig, EngineConfig, SchedulerConfig, SightConfig
from quire.common.errors import EXIT_FATAL, ConfigError
from quire.common.messages import Admitted, StepPlan, StepResult, pack, unpack
from quire.common.sampling import SamplingParams
from quire.launch.replay import Replay
from quire.scheduler import journal, snapshot
from quire.scheduler.journal import Began, Journal, Journaled, Planned, digest
from quire.scheduler.journal_file import MAGIC, Copy, Reader
from quire.scheduler.kv_cache import KvCache
from quire.scheduler.redaction import Redactor
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler
from quire.scheduler.sight import MOST_FILES, Sight

from .journaled import journaled, played, replayed
from .peers import INFO, config, running, turn
from .simulation import VOCABULARY, Losses, Run

SEEDS = 40
ROOMY, TIGHT = 1 << 26, 100_000


def events(seed: int) -> dict[str, Any]:
    return {
        "aborts": seed % 2 == 0,
        "restarts": seed % 3 == 0,
        "faults": seed % 5 < 2,
        "losses": Losses(rate=0.03 if seed % 4 == 0 else 0.0, poison=frozenset({2} if seed % 8 == 0 else ())),
    }


def noted(journal: Journal, kind: type) -> int:
    return sum(isinstance(entry, kind) for entries, _ in journal.records() for entry in entries)


@pytest.mark.parametrize("redacted", [False, True], ids=["as it is", "redacted"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_replay_makes_every_plan_again(depth: int, redacted: bool, tmp_path: Path) -> None:
    kinds: Counter[str] = Counter()
    for seed in range(SEEDS):
        journal = played(seed, depth, size=ROOMY, **events(seed))
        replay = replayed(journal, tmp_path / "journal", redacted=redacted)
        assert replay.difference is None and not replay.raised and not replay.skipped, (seed, replay.difference)
        assert replay.plan == noted(journal, Planned), seed
        kinds.update(type(entry).__name__ for entries, _ in journal.records() for entry in entries)
    rare = ("Aborted", "Faulted", "Blamed", "Regrouped", "NotPlanned")
    assert kinds["Planned"] > 20 * SEEDS and all(kinds[kind] > 3 for kind in rare), kinds


@pytest.mark.parametrize("redacted", [False, True], ids=["as it is", "redacted"])
def test_what_a_full_journal_still_holds_is_replayed(redacted: bool, tmp_path: Path) -> None:
    dropped = plans = 0
    for seed in range(SEEDS):
        journal = played(seed, 2, size=TIGHT, **events(seed))
        replay = replayed(journal, tmp_path / "journal", redacted=redacted)
        assert replay.difference is None and not replay.raised, (seed, replay.difference)
        dropped += journal.num_dropped
        plans += replay.plan
    assert dropped > 2 and plans > 10 * SEEDS, (dropped, plans)


def endless(size: int, steps: int, *, prompt: int = 12) -> Journaled:
    """A scheduler that is never idle: a request comes whenever there is a row for it."""
    made = journaled(size)(
        SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16), CacheConfig(block_size=4), 64, 60
    )
    assert isinstance(made, Journaled)
    rng = random.Random(size)
    ids = itertools.count()
    for _ in range(steps):
        while len(made.running) + len(made.waiting) < 6:
            tokens = array("i", [rng.randrange(VOCABULARY) for _ in range(prompt)])
            sampling = SamplingParams(max_tokens=rng.randint(1, 20), seed=0)
            made.add(Request(next(ids), tokens, prompt, sampling, salt="tenant's own", tenant="somebody"))
        while len(made.dispatched) < 2 and made.schedule():
            pass
        step = made.dispatched[0]
        tokens = array("i", [rng.randrange(VOCABULARY) for _ in step.sampled])
        made.update(StepResult(1, step.plan.step, pack([1] * len(tokens)), tokens.tobytes()))
        assert not made.idle
    return made


def test_under_a_load_that_never_ends_memory_is_bounded_and_the_rest_is_replayed(tmp_path: Path) -> None:
    size = 200_000
    made = endless(size, 3200)
    assert made.journal.num_dropped > 3 and not made.journal.num_stateless
    assert size // 3 < made.journal.num_bytes <= size, "a segment that has just begun is not all there is"
    for redacted in (False, True):
        replay = replayed(made.journal, tmp_path / "journal", redacted=redacted)
        assert replay.difference is None and not replay.skipped and replay.plan > 50, replay.difference


def test_a_state_that_is_too_large_is_left_out_and_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = endless(8_000, 300)
    assert made.journal.num_bytes <= 2 * 8_000 and made.journal.num_stateless > 1
    assert "can be replayed only behind the part before it: the state takes" in caplog.text
    assert len(caplog.records) <= made.journal.num_stateless.bit_length()
    replay = replayed(made.journal, tmp_path / "journal")
    assert replay.scheduler is None and replay.skipped > 0 and not replay.plan


# --- differences ------------------------------------------------------------------------------------------------------


def _different(tmp_path: Path, seeds: int = 20) -> int:
    """Runs whose replay differs. Each is told of at a plan; none raises out of the replay."""
    found = 0
    for seed in range(seeds):
        journal_ = played_before[seed]
        replay = replayed(journal_, tmp_path / "journal")
        if replay.difference is not None:
            assert 0 <= replay.difference.plan <= noted(journal_, Planned) and replay.difference.why
            found += 1
    return found


played_before: dict[int, Journal] = {}


@pytest.fixture
def plays() -> None:
    """Journals of the scheduler as it is."""
    for seed in range(20):
        if seed not in played_before:
            played_before[seed] = played(seed, 2, size=ROOMY, **events(seed))


def test_another_order_is_a_difference(plays: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Request, "rank", property(lambda self: (-self.priority, self.arrival)))
    assert _different(tmp_path) > 0


def test_another_reserve_is_a_difference(plays: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = KvCache.find
    monkeypatch.setattr(KvCache, "find", lambda self, request, reserve: find(self, request, reserve + 3))
    assert _different(tmp_path) > 0


def test_another_budget_is_a_difference(plays: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink = Scheduler.shrink

    def once(self: Scheduler) -> Any:
        self.budget = max(1, self.budget // 2)
        return _schedule(self)

    _schedule = Scheduler.schedule
    monkeypatch.setattr(Scheduler, "schedule", once)
    assert shrink is Scheduler.shrink and _different(tmp_path) > 10


def test_no_difference_without_a_change(plays: None, tmp_path: Path) -> None:
    assert _different(tmp_path) == 0


def test_a_call_that_raised_raises_again_or_is_a_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("update", "schedule"):
        run = Run(3, 2, make=journaled(ROOMY))
        real = getattr(Scheduler, name)

        def buggy(self: Scheduler, *args: Any, _real: Any = real) -> Any:
            if self._step == 4:
                raise KeyError("a bug")
            return _real(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, name, buggy)
            with pytest.raises(KeyError, match="a bug"):
                run.play()
            assert isinstance(run.scheduler, Journaled)
            again = replayed(run.scheduler.journal, tmp_path / "journal")
            assert again.raised == "KeyError: 'a bug'" and again.difference is None, name
        mended = replayed(run.scheduler.journal, tmp_path / "journal")
        assert mended.difference is not None and "and does not now" in mended.difference.why, name


PLAN = StepPlan(
    1,
    2,
    [3],
    [Admitted(4, pack([5, 6]), 2, SamplingParams(), [7])],
    [(8, [9])],
    pack([1, 2]),
    pack([4]),
    pack([0]),
    pack([2]),
    b"\1",
)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 3},
        {"epoch": 3},
        {"released": []},
        {"admitted": []},
        {"admitted": [Admitted(4, pack([5, 6]), 2, SamplingParams(), [8])]},
        {"admitted": [Admitted(4, pack([5, 6, 7]), 2, SamplingParams(), [7])]},
        {"new_blocks": [(8, [10])]},
        {"copies": b""},
        {"rows": pack([5])},
        {"starts": pack([1])},
        {"counts": pack([1])},
        {"samples": b"\0"},
    ],
    ids=str,
)
def test_the_digest_tells_decisions_apart(change: dict[str, Any]) -> None:
    assert digest(msgspec.structs.replace(PLAN, **change)) != digest(PLAN)


def test_the_digest_does_not_depend_on_what_was_written() -> None:
    other = [Admitted(4, pack([1, 2]), 2, SamplingParams(seed=9), [7])]
    assert digest(msgspec.structs.replace(PLAN, admitted=other)) == digest(PLAN)


# --- redaction --------------------------------------------------------------------------------------------------------


def test_nothing_of_what_was_written_is_in_a_redacted_journal(tmp_path: Path) -> None:
    made = endless(1 << 22, 200)
    texts = [request.tokens.tobytes() for _, requests in made.journal.records() for request in requests]
    secrets = [
        b"somebody",
        b"tenant's own",
        *(text[i : i + 24] for text in texts for i in range(0, len(text) - 24, 24)),
    ]
    names = [name for _, requests in made.journal.records() for request in requests for name in request.digests]
    for redacted in (False, True):
        Copy(made.journal, "test", VOCABULARY, "a test", redacted=redacted).write(tmp_path / "journal")
        data = (tmp_path / "journal").read_bytes()
        found = [secret for secret in (*secrets, *names) if secret in data]
        assert bool(found) is not redacted, found[:3]


def test_the_mapping_is_a_bijection_of_the_vocabulary_and_another_in_each_file() -> None:
    redactor = Redactor(100)
    ids = redactor.ids(range(100))
    assert sorted(ids) == list(range(100)) and ids != list(range(100))
    assert redactor.ids([-1, 100]) == [-1, 100]
    assert unpack(redactor.column(pack([1, 2, 1]))) == redactor.ids([1, 2, 1])
    assert redactor.column(b"abc") == bytes(3)
    assert Redactor(100).ids(range(100)) != ids
    name = b"\xff" * 32
    assert redactor.bytes(name) == redactor.bytes(name) != name and len(redactor.bytes(name)) == 32
    assert redactor.text("") == "" and redactor.text("stop") == "stop"
    assert redactor.text("acme") == redactor.text("acme") != "acme"


# --- state ------------------------------------------------------------------------------------------------------------


def again(thing: Any) -> Any:
    return snapshot.load(snapshot.decode(snapshot.encode(snapshot.save(thing))))[0]


def test_a_state_comes_back_as_it_was() -> None:
    shared = [1, 2]
    request = Request(1, array("i", [1, 2]), 2, SamplingParams(max_tokens=2), salt="x")
    plain: list[Any] = [
        *(None, True, 1, -5, 2.5, "text", b"bytes", (), (1, (2, [3])), {1, 2}, frozenset({"a"})),
        {1: (b"x", 2), 2: (b"y", 3)},
        OrderedDict([(2, None), (1, None)]),
        Counter("aab"),
        deque([1, 2], maxlen=3),
        array("d", [0.5]),
        SamplingParams(stop_token_ids=[3]),
    ]
    for thing in plain:
        back = again([thing])[0]
        assert back == thing and type(back) is type(thing), thing
    assert again([deque([1], maxlen=3)])[0].maxlen == 3
    groups: defaultdict[int, list[int]] = defaultdict(list)
    assert again([groups])[0][7] == []
    heap = (request.rank, request)
    circle: list[Any] = [shared, shared, {request: heap}, [heap], heap]
    circle.append(circle)
    back = again(circle)
    assert back[0] is back[1] and back[5] is back
    [(key, entry)] = back[2].items()
    assert entry is back[3][0] is back[4] and entry[1] is key and key.tokens == request.tokens and key.salt == "x"


def test_every_attribute_of_a_scheduler_is_found_without_asking_for_its_dict() -> None:
    seen: set[type] = set()
    for seed in range(20):
        run = Run(seed, 2)
        run.play(losses=Losses(rate=0.03))
        saver = snapshot._Saver()
        saver.value(run.scheduler)
        list(saver.nodes())
        for thing in saver._objects:
            held = getattr(thing, "__dict__", None)
            if held is not None and not isinstance(thing, type(test_a_state_comes_back_as_it_was)):
                kind: Any = type(thing)
                seen.add(kind)
                assert set(held) <= set(snapshot.attributes(kind)), kind
    assert Scheduler in seen and len(seen) > 3


class Stranger:
    """No part of a scheduler."""


def test_only_what_belongs_to_a_scheduler_is_saved_or_made() -> None:
    with pytest.raises(snapshot.Unsavable, match="does not belong"):
        snapshot.save([Stranger()])
    for name in (
        "os:system",
        "subprocess:Popen",
        "scheduler.process:Process.run",
        "launch.cli:main",
        "scheduler.nothing:X",
    ):
        for kind in ("object", "struct", "function", "enum"):
            with pytest.raises(snapshot.Damaged):
                snapshot.load([snapshot.Node(kind, name, [])])
    imported = snapshot.Node("object", "scheduler.process:Path", [])
    with pytest.raises(snapshot.Damaged, match="none of the scheduler's"):
        snapshot.load([imported])


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("journal") / "journal.quire"
    Copy(played(1, 2), "test", VOCABULARY, "a test", redacted=False).write(path)
    return path


def read(path: Path) -> int:
    replay = Replay()
    replay.run(Reader(path).entries())
    assert replay.difference is None
    return replay.plan


def test_only_its_owner_may_read_a_journal_and_nothing_else_is_left(file: Path) -> None:
    assert file.stat().st_mode & 0o777 == 0o600 and list(file.parent.iterdir()) == [file]


def test_a_file_that_is_cut_off_is_told_of(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    for length in (0, len(MAGIC), len(data) - 1, *random.Random(0).sample(range(len(data)), 60)):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ConfigError, match=r"does not begin as one|in the middle"):
            read(tmp_path / "cut")


def test_a_file_that_is_damaged_is_told_of(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    for where in random.Random(0).sample(range(len(data)), 200):
        (tmp_path / "bad").write_bytes(data[:where] + bytes([data[where] ^ 0x10]) + data[where + 1 :])
        with pytest.raises(ConfigError):
            read(tmp_path / "bad")


def test_records_that_are_missing_are_told_of(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    first = len(MAGIC) + 8 + struct.unpack_from("<I", data, len(MAGIC))[0]
    second = first + 8 + struct.unpack_from("<I", data, first)[0]
    (tmp_path / "less").write_bytes(data[:first] + data[second:])
    with pytest.raises(ConfigError, match=r"1 of \d+ records are missing"):
        read(tmp_path / "less")


def test_what_another_version_wrote_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(file) > 0
    monkeypatch.setattr("quire.scheduler.journal_file.VERSION", 999)
    with pytest.raises(ConfigError, match=r"format 1, .*only the version that wrote a journal decides as it did"):
        read(file)


@pytest.mark.parametrize("content", [b"", b"x" * 1000, b"quire journal"], ids=["empty", "text", "short"])
def test_what_is_no_journal_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ConfigError, match="this is no journal"):
        read(tmp_path / "other")
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "nothing")


# --- the process ------------------------------------------------------------------------------------------------------


def test_without_a_size_there_is_no_journal(tmp_path: Path) -> None:
    engine = EngineConfig(sight=SightConfig(journal_size=0))
    assert (
        type(Sight(engine, INFO, tmp_path, lambda wire, peer: "").scheduler(SchedulerConfig(), CacheConfig(), 8, 16))
        is Scheduler
    )


def test_a_bug_leaves_its_journal_and_old_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = Scheduler.update

    def buggy(self: Scheduler, result: StepResult) -> Any:
        if result.step == 3:
            raise RuntimeError("a bug")
        return real(self, result)

    folder = tmp_path / "journals"
    folder.mkdir()
    for number in range(MOST_FILES + 3):
        (folder / f"journal-{1700000000000 + number}.quire").touch()
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    monkeypatch.setattr(Scheduler, "update", buggy)
    with running(run_dir, msgspec.structs.replace(config(), sight=SightConfig(journal_dir=str(folder)))) as engine:
        worker, frontend = engine.ready()
        frontend.submit(1, [5, 6, 7], max_tokens=8)
        turn(worker, frontend, lambda: engine.code is not None)
        assert engine.join() == EXIT_FATAL
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_size)
    assert len(files) == MOST_FILES and f"{files[-1]}; `quire replay` runs it again" in caplog.text
    replay = Replay()
    reader = Reader(files[-1])
    replay.run(reader.entries())
    assert reader.header.redacted and "a bug" in reader.header.why
    assert replay.raised == "RuntimeError: a bug" and replay.plan >= 3


def test_a_journal_begins_anew_after_another_group_which_may_be_told_other_things() -> None:
    made = journaled(ROOMY)(SchedulerConfig(), CacheConfig(block_size=4), 16, 16)
    made.add(Request(1, array("i", [1, 2, 3]), 3, SamplingParams(max_tokens=2)))
    assert made.schedule() is not None
    made.regroup(2)
    made.add(Request(2, array("i", [1, 2, 3]), 3, SamplingParams(max_tokens=2)))
    made.kv.restoring_takes(1.0, 2.0)
    assert made.schedule() is not None
    entries = [entry for entries, _ in made.journal.records() for entry in entries]
    assert [type(entry) for entry in entries].count(Began) == 2 and isinstance(entries[-2], Began)
    assert journal.Entry  # what may be in a file
