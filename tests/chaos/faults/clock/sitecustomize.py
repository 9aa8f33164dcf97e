"""A wall clock that jumps: shifted by the seconds in $CHAOS_SWITCHES/clock, for every module that Python loads."""

import os
import time

_FILE = os.environ["CHAOS_SWITCHES"] + "/clock"
_time, _time_ns = time.time, time.time_ns


def _shift_s() -> int:
    try:
        with open(_FILE) as file:  # noqa: PTH123 (pathlib is not for every interpreter that starts)
            return int(file.read())
    except FileNotFoundError:
        return 0


time.time = lambda: _time() + _shift_s()
time.time_ns = lambda: _time_ns() + _shift_s() * 1_000_000_000
