"""A worker that fails when a step holds a prompt that asks for it, or a switch is set; else it is the real one.

A prompt that begins with `MARK` and one of the kinds in kinds.py provokes that fault in every step it is in. Switches are
files in $CHAOS_SWITCHES: `die` ends the process in every step, `oom` holds the number of tokens above which a step runs
out of memory, `once` arms the faults that happen once.
"""

import os
import sys
from pathlib import Path

import torch
from kinds import EXIT, EXIT_ONCE, LATE, NAN, RAISE, RAISE_ONCE, Marked

from quire.common.messages import StepPlan, unpack
from quire.launch import worker
from quire.worker.runner import Pending, Runner

SWITCHES = Path(os.environ["CHAOS_SWITCHES"])
real_launch = Runner.launch
marked = Marked()


def launch(self: Runner, plan: StepPlan) -> Pending:
    met = marked.met(plan)
    if plan.rows:
        _fail_by_switch(sum(unpack(plan.counts)))
    for kind in met.values():
        _fail(kind)
    pending = real_launch(self, plan)
    for i, row in enumerate(pending.rows.tolist()):
        if met.get(row) == NAN:
            pending.faulty[i] = True
    return pending


def _fail_by_switch(num_tokens: int) -> None:
    if (SWITCHES / "die").exists():
        os._exit(9)
    oom = SWITCHES / "oom"
    if oom.exists() and num_tokens > int(oom.read_text()):
        raise torch.OutOfMemoryError(f"a planted lack of memory for {num_tokens} tokens")


def _fail(kind: int) -> None:
    if kind in (RAISE, LATE) or (kind == RAISE_ONCE and _armed()):
        raise RuntimeError("a planted fault")
    if kind == EXIT or (kind == EXIT_ONCE and _armed()):
        os._exit(9)


def _armed() -> bool:
    try:
        (SWITCHES / "once").unlink()
    except FileNotFoundError:
        return False
    return True


if __name__ == "__main__":
    Runner.launch = launch  # type: ignore[method-assign]
    sys.exit(worker.main())
