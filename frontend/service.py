"""What the routes stand on: the engine's client, the tokenizer once it is loaded, and whether requests may come."""

import time
from http import HTTPStatus

from msgspec import Struct

from ..common.errors import RequestError
from ..common.messages import PEER_TIMEOUT_S
from .engine_client import EngineClient
from .errors import retry_after
from .generator import Generator
from .sse import WRITE_STALL_S

RETRY_AFTER_S = 1  # of a server that starts, recovers or drains: another may answer, or this one soon


class Health(Struct, frozen=True):
    """What the probes tell. Nothing is asked for it: neither a worker nor the scheduler can hold it up."""

    status: str  # "ok", "starting", "recovering", "stalled" or "dead"
    phase: str
    progress: float  # of the phase, 0 to 1
    detail: str


class Service:
    """State of one frontend. `generator` is None until the tokenizer is loaded."""

    def __init__(self, client: EngineClient, *, write_stall_s: float = WRITE_STALL_S) -> None:
        """`write_stall_s`: a client that takes nothing of its stream for so long is treated as gone."""
        self.client = client
        self.write_stall_s = write_stall_s
        self.generator: Generator | None = None
        self.draining = False
        self.started = int(time.time())

    @property
    def has_served(self) -> bool:
        """The start is over. From now on requests are taken also while the engine recovers, and wait for it."""
        return self.client.served and self.generator is not None

    @property
    def health(self) -> Health:
        phase, progress, detail = self.client.status.phase, self.client.status.progress, self.client.status.detail
        if self.client.ready and self.generator is None:
            phase, progress = "loading the tokenizer", 0.0
        if self.client.ended:
            status, detail = "dead", str(self.client.failure or "the engine was shut down")
        elif self.client.silent:
            status, detail = "stalled", f"the scheduler has not been heard for {PEER_TIMEOUT_S:.0f} s"
        elif phase == "stalled":
            status = "stalled"
        elif not self.has_served:
            status = "starting"
        else:
            status = "ok" if self.client.ready else "recovering"
        return Health(status, phase, progress, detail)

    @property
    def unavailable(self) -> RequestError | None:
        """Why requests cannot be taken now; None when they can, if only to wait for an engine that recovers."""
        health = self.health
        if health.status == "dead":
            return _unavailable(health.detail, "engine_dead")
        if self.draining:
            return _unavailable("the server is shutting down", "draining", retry_after(RETRY_AFTER_S))
        if not self.has_served:
            message = f"the model is not ready yet: {health.phase}, {health.progress:.0%}"
            return _unavailable(message, "not_ready", retry_after(RETRY_AFTER_S))
        return None

    @property
    def unready(self) -> RequestError | None:
        """Why requests would not be served at once; None when they would."""
        health = self.health
        message = f"the engine is {health.status}: {health.detail or health.phase}"
        if health.status == "stalled":
            return _unavailable(message, "stalled", retry_after(RETRY_AFTER_S))
        if (error := self.unavailable) is not None or health.status == "ok":
            return error
        return _unavailable(message, "not_ready", retry_after(RETRY_AFTER_S))

    def require(self) -> Generator:
        """The generator; raises RequestError when requests cannot be taken."""
        if (error := self.unavailable) is not None:
            raise error
        assert self.generator is not None
        return self.generator

    @property
    def model_names(self) -> tuple[str, ...]:
        """What requests may call the model; the first is its name in answers."""
        return self.client.config.model.served_model_name or (self.client.config.model.model,)

    def check_model(self, name: str | None) -> str:
        """The name to answer under; raises RequestError for a model that is not here. No name means the one there is."""
        if not name:
            return self.model_names[0]
        if name not in self.model_names:
            known = ", ".join(self.model_names)
            raise RequestError(
                f"there is no model {name[:80]!r} here; there is {known}",
                status=HTTPStatus.NOT_FOUND,
                param="model",
                code="model_not_found",
            )
        return name


def _unavailable(message: str, code: str, headers: dict[str, str] | None = None) -> RequestError:
    return RequestError(message, status=HTTPStatus.SERVICE_UNAVAILABLE, code=code, headers=headers)
