"""Beam searches in the scheduler: the same hypotheses at any depth, whoever else runs, and nothing left behind."""

from dataclasses import fields

from .simulation import Losses, Run, Totals, expected

SEEDS = 300
MANY = 0.6  # of the requests


def _played(seed: int, depth: int, total: Totals, **what: object) -> tuple[dict, dict]:  # type: ignore[type-arg]
    run = Run(seed, depth, beams=MANY)
    wanted = {request.id: expected(request) for request in run.todo}
    got = run.play(**what)  # type: ignore[arg-type]
    for item in fields(Totals):
        setattr(total, item.name, getattr(total, item.name) + getattr(run.totals, item.name))
    return got, wanted


def test_every_depth_gives_the_hypotheses_of_the_definition() -> None:
    total = Totals()
    for seed in range(SEEDS):
        for depth in (1, 2, 3):
            got, wanted = _played(seed, depth, total)
            assert got == wanted, (seed, depth)
    assert total.preempted > 100, total
