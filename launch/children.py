"""The processes of one engine: how each is started, and the table of those that run.

`Child` says how a process is started, `Exit` how one ended; `Children` holds the running ones and nothing decides here,
so that the policy (`restarts`) is a function of an `Exit`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import msgspec

from ..common.config import EngineConfig
from ..common.errors import EXIT_CONFIG, EXIT_FATAL, ConfigError
from ..common.process import END
from .checks import is_downloadable
from .options import ENV_PREFIX

Role = Literal["frontend", "scheduler", "worker", "download"]
COMPANY_S = 2.0  # a fault seldom ends one process alone; one with torch in it takes a while to end
GOODBYE_S = 1.0  # for the scheduler to end and for the workers to hear of it
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Child:
    """How to start one process. Its module takes `--lifeline FD` besides `arguments`."""

    role: Role
    name: str  # in messages: "worker 1"
    module: str
    arguments: tuple[str, ...]
    descriptors: tuple[int, ...] = ()  # that it inherits


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended."""

    child: Child
    code: int  # negative: the signal that ended it
    why: str = ""  # when it was the supervisor that ended it, or could not start it

    def __str__(self) -> str:
        if self.why:
            return f"{self.child.name} {self.why}"
        if self.code >= 0:
            return f"{self.child.name} exited with code {self.code}"
        hint = _MEMORY[self.child.role] if self.code == -signal.SIGKILL else ""
        return f"{self.child.name} was killed by signal {-self.code} ({_name_of(-self.code)}){hint}"

    @property
    def tells_why(self) -> bool:
        """Whether this is a cause. Other codes may well be the consequence of another process' end."""
        return self.code == EXIT_CONFIG or self.code < 0

    @property
    def engine_code(self) -> int:
        """The exit code of an engine that ends because this process did."""
        return EXIT_CONFIG if self.code == EXIT_CONFIG else EXIT_FATAL


_LACK = ", likely for lack of memory"
_MEMORY: dict[Role, str] = {
    "frontend": _LACK,
    "scheduler": f"{_LACK}; a lower --max-num-queued-reqs needs less",
    "worker": f"{_LACK}; a lower --gpu-memory-utilization or --kv-cache-memory needs less",
    "download": _LACK,
}


def _name_of(signum: int) -> str:
    """Real-time signals have no name of their own."""
    return signal.Signals(signum).name if signum in set(signal.Signals) else "real-time"


def cause_of(ends: Sequence[Exit]) -> Exit:
    """Of processes that ended together, the one that tells why: a wrong configuration, a signal, a fault, a farewell."""
    return min(ends, key=lambda end: (end.code != EXIT_CONFIG, end.code >= 0, end.code == 0))


# --- which processes an engine has ------------------------------------------------------------------------------------


def write_config(config: EngineConfig, run_dir: Path) -> Path:
    """The options of every process, in a file: a command line is public on its host, and API keys are options.

    JSON, which is read in no time, and may be read again in a hurry. Raises ConfigError when it cannot be written.
    """
    file = run_dir / "config.json"
    try:
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as out:
            json.dump(msgspec.to_builtins(config), out)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; set TMPDIR to another place") from None
    return file


def address_of(run_dir: Path) -> str:
    return f"ipc://{run_dir}"


def downloads(config: EngineConfig) -> list[Child]:
    """What must end well before the engine starts: nothing for a local model."""
    model = config.model
    if not is_downloadable(model.model):
        return []
    limit = [f"--max-model-len={model.max_model_len}"] if model.max_model_len else []
    return [
        Child(
            "download",
            "the download",
            "quire.launch.model_files",
            (model.model, f"--load-format={model.load_format}", *limit),
        )
    ]


def frontends(config: EngineConfig, run_dir: Path, descriptor: int) -> list[Child]:
    arguments = (f"--scheduler={address_of(run_dir)}", f"--fd={descriptor}", f"--log-level={config.server.log_level}")
    count = config.server.frontends
    names = ["the frontend"] if count == 1 else [f"frontend {i}" for i in range(count)]
    return [Child("frontend", name, "quire.launch.frontend", arguments, (descriptor,)) for name in names]


def engine(config: EngineConfig, run_dir: Path) -> list[Child]:
    """The scheduler and the workers."""
    arguments = (f"--config={write_config(config, run_dir)}", f"--listen={address_of(run_dir)}", f"--run-dir={run_dir}")
    common = (f"--scheduler={address_of(run_dir)}", f"--log-level={config.server.log_level}")
    return [
        Child("scheduler", "the scheduler", "quire.launch.scheduler", arguments),
        *(
            Child("worker", f"worker {rank}", "quire.launch.worker", (*common, f"--rank={rank}"))
            for rank in range(config.parallel.tensor_parallel_size)
        ),
    ]


# --- the processes that run -------------------------------------------------------------------------------------------


class Children:
    """Running processes. They end when this process does, however it ends: each holds the read end of one pipe.

    `on_output` gets each process' stderr as a readable file, to be read in a thread; without it they share ours.
    The thread that starts them must live as long as they: PDEATHSIG is tied to it.
    """

    def __init__(self, *, on_output: Callable[[Child, IO[str]], None] | None = None) -> None:
        self._on_output = on_output
        self._lifeline, self._our_end = os.pipe()  # neither is inherited unless named
        self._running: dict[Child, subprocess.Popen[str]] = {}

    def start(self, children: Iterable[Child]) -> None:
        for child in children:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", child.module, *child.arguments, f"--lifeline={self._lifeline}"],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE if self._on_output else None,
                text=True,
                errors="replace",
                pass_fds=(self._lifeline, *child.descriptors),
                env=child_environment(os.environ),
                process_group=0,  # a terminal's Ctrl-C reaches the supervisor alone
            )
            self._running[child] = process
            if self._on_output and process.stderr:
                self._on_output(child, process.stderr)

    def exited(self) -> list[Exit]:
        """Those that ended since the last call. Never waits."""
        ended = [
            Exit(child, process.returncode) for child, process in self._running.items() if process.poll() is not None
        ]
        for exit_ in ended:
            del self._running[exit_.child]
        return ended

    def running(self, *roles: Role) -> list[Child]:
        """Of these roles, or of all when none is named."""
        return [child for child in self._running if not roles or child.role in roles]

    def pids(self) -> dict[str, int]:
        return {child.name: process.pid for child, process in self._running.items()}

    def send(self, signum: int, *roles: Role) -> None:
        for child in self.running(*roles):
            self._running[child].send_signal(signum)

    def wait(self, timeout_s: float, *roles: Role, impatient: Callable[[], bool] = lambda: False) -> list[Exit]:
        """Until all of `roles` have ended, `timeout_s` has passed, or `impatient()`; how the ended ones did."""
        deadline = time.monotonic() + timeout_s
        ended = self.exited()
        while self.running(*roles) and time.monotonic() < deadline and not impatient():
            time.sleep(_POLL_S)
            ended += self.exited()
        return ended

    def cause(self, ends: Sequence[Exit]) -> Exit:
        """Why processes have begun to end, `ends` being the first: the others' ends may tell more, and come soon."""
        deadline, known = time.monotonic() + COMPANY_S, list(ends)
        while self._running and time.monotonic() < deadline and not any(end.tells_why for end in known):
            time.sleep(_POLL_S)
            known += self.exited()
        return cause_of(known)

    def stop(self, grace_s: float, *, impatient: Callable[[], bool] = lambda: False) -> None:
        """End all that run: `END`, and SIGKILL for those that still do after `grace_s`. Returns when none does.

        The scheduler goes before the workers, and tells them; it would take their end for a fault.
        """
        self.send(END, "frontend", "scheduler", "download")
        if self.running("scheduler"):
            self.wait(min(grace_s, GOODBYE_S), "scheduler", impatient=impatient)
            self.wait(min(grace_s, GOODBYE_S), "worker", impatient=impatient)
        self.send(END, "worker")
        self.wait(grace_s, impatient=impatient)
        self.kill()

    def stop_at_once(self, grace_s: float, *, impatient: Callable[[], bool] = lambda: False) -> None:
        """As `stop`, of an engine that has nothing to lose: nobody waits for another's end."""
        self.send(END)
        self.wait(grace_s, impatient=impatient)
        self.kill()

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait(10.0)

    def close(self) -> None:
        """End what still runs and give up the lifeline."""
        self.kill()
        os.close(self._lifeline)
        os.close(self._our_end)


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Without QUIRE_...: a child has its options from its command line, and its environment is no place for keys."""
    return {name: value for name, value in environ.items() if not name.startswith(ENV_PREFIX)}
