"""Runs numba kernels on torch's own threads.

torch's matrix products and these kernels take turns many times in a step. Two pools would spin against each other on
the same cores; so the kernels enter the OpenMP runtime that torch has loaded, whose threads are then the same: 1.3 µs
a time. A kernel is a number of tasks; whichever thread is free takes the next from a counter.
"""

import contextlib
import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import cfunc
from numba.core import types
from numba.extending import intrinsic

from .vectors import BFLOATS, FLOATS, INT32S, INTS

MAX_ARGS = 32
PIECES = 4  # for each thread: who is late takes fewer
ENOUGH = 8192  # elements that are worth a task: a thread computes them in the time that it takes to wake another
REGION = types.void(INTS)
LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"  # finds the OpenMP that it was linked with

# Positions in what a kernel is given, before its own arguments.
_NEXT, _TASKS, _THREAD = range(3)
OWN = 3


@intrinsic
def next_task(typing: Any, args: Any) -> Any:
    """A task that no thread has taken yet, or -1."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        one, position = ir.Constant(ir.IntType(64), 1), ir.Constant(ir.IntType(64), _TASKS)
        task = builder.atomic_rmw("add", values[0], one, "monotonic")
        left = builder.icmp_signed("<", task, builder.load(builder.gep(values[0], [position])))
        return builder.select(left, task, ir.Constant(ir.IntType(64), -1))

    return types.int64(INTS), generate


@intrinsic
def thread_number(typing: Any, args: Any) -> Any:
    """From 0 on, another for each thread that takes part. To be asked once by each."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        at = builder.gep(values[0], [ir.Constant(ir.IntType(64), _THREAD)])
        return builder.atomic_rmw("add", at, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(INTS), generate


def _pointer(kind: Any) -> Any:
    @intrinsic
    def cast(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], context.get_value_type(kind))

        return kind(types.int64), generate

    return cast


floats, bfloats, ints = _pointer(FLOATS), _pointer(BFLOATS), _pointer(INTS)
int32s = _pointer(INT32S)


@intrinsic
def alike(typing: Any, address: Any, other: Any) -> Any:
    """The address as a pointer of the type of `other`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(other))

    return other(types.int64, other), generate


@intrinsic
def as_float(typing: Any, bits: Any) -> Any:
    """What `bits_of` made of it."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(builder.trunc(values[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), generate


def bits_of(number: float) -> int:
    """A float32 as an argument of a kernel."""
    bits: int = struct.unpack("i", struct.pack("f", number))[0]
    return bits


def pieces(num_rows: int, width: int) -> tuple[int, int]:
    """Into how many tasks rows of so many elements are divided, and how many rows each has."""
    each = max(-(-num_rows // (PIECES * torch.get_num_threads())), -(-ENOUGH // width))
    return -(-num_rows // each), each


class Kernel:
    """`region(args)` is entered by every thread and takes tasks until there are none. Compiled when it is first run, once
    for each machine: what was compiled lies in a cache beside this file.
    """

    def __init__(self, region: Callable[[Any], None]) -> None:
        self._region = region
        self._args = (ctypes.c_int64 * MAX_ARGS)()
        self._at = ctypes.addressof(self._args)
        self._entry = 0
        self._alone: Any = None  # the entry, for this thread to call
        self._compiled: Any = None

    def compile(self) -> None:
        """Now, rather than at the first run; nothing if it is done."""
        if self._entry:
            return
        try:
            self._compiled = cfunc(REGION, cache=True, error_model="numpy")(self._region)
        except Exception:  # noqa: BLE001 (a folder that is absent, full or damaged; what is wrong with the code is told below)
            self._compiled = cfunc(REGION, error_model="numpy")(self._region)
        self._entry = self._compiled.address
        self._alone = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(self._entry)

    def __call__(self, tasks: int, *args: int) -> None:
        """Run all tasks; `args` are integers and addresses, in the order in which the region expects them from `OWN` on. Not
        for two threads of Python at once."""
        if not tasks:
            return
        self.compile()
        struct.pack_into(f"{OWN + len(args)}q", self._args, 0, 0, tasks, 0, *args)
        threads = min(tasks, torch.get_num_threads())
        if threads == 1:
            self._alone(self._at)
        else:
            _parallel(self._entry, self._at, threads, 0)


def _runtime() -> Any:
    """Of torch: `GOMP_parallel(function, argument, threads, flags)`; None where torch has another runtime."""
    for library in (None, str(LIBRARY)):  # one that was preloaded serves torch, too
        with contextlib.suppress(OSError, AttributeError):
            function = ctypes.PyDLL(library).GOMP_parallel
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            function.restype = None
            return function
    return None


_parallel = _runtime()


def is_available() -> bool:
    return _parallel is not None
