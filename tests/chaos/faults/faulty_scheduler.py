"""A scheduler with a bug: it raises whenever it has planned a step with a prompt that asks for it (kinds.py)."""

import sys

from kinds import SCHEDULER, Marked

from quire.launch import scheduler
from quire.scheduler.scheduler import Scheduler, Step

real_schedule = Scheduler.schedule
marked = Marked()


def schedule(self: Scheduler) -> Step | None:
    step = real_schedule(self)
    if step is not None and SCHEDULER in marked.met(step.plan).values():
        raise RuntimeError("a planted fault")
    return step


if __name__ == "__main__":
    Scheduler.schedule = schedule  # type: ignore[method-assign]
    sys.exit(scheduler.main())
