"""The workers' rows: which are free, and what of the running requests the workers have not been told."""

from .request import Request
from .step import Draft, admission


class Rows:
    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.free = list(range(num_rows))[::-1]  # the lowest is next
        self._released: list[int] = []
        self._untold: list[Request] = []  # have a row that the workers do not know as theirs

    def give(self, request: Request) -> None:
        """A free row. The workers are told by `step.admission`."""
        request.row = self.free.pop()

    def take_back(self, request: Request) -> None:
        assert request.row is not None
        self.free.append(request.row)
        if request in self._untold:
            self._untold.remove(request)
        else:
            self._released.append(request.row)
        request.row = None

    def rewrite(self, request: Request) -> None:
        """Its row, or a free one if it has none, begins anew in the next plan, with what the request holds then."""
        if request.row is None:
            self.give(request)
        else:
            self._released.append(request.row)
        self._untold.append(request)

    def tell(self, draft: Draft) -> list[int]:
        """Put into the plan what the workers have not been told. Returns the rows that are released before."""
        if self._untold:
            rows = {request.row for request in self._untold}
            draft.new_blocks = [grown for grown in draft.new_blocks if grown[0] not in rows]
            draft.admitted += map(admission, self._untold)
            self._untold.clear()
        released, self._released = self._released, []
        return released

    def reset(self) -> None:
        """Other workers: they know of nothing."""
        self.free = list(range(self.num_rows))[::-1]
        self._released.clear()
        self._untold.clear()

    def check(self, running: list[Request]) -> None:
        """Raises AssertionError unless each row is free or held, once, by requests in the order of rank."""
        assert running == sorted(running, key=lambda request: request.rank), "running is out of order"
        rows = [*self.free, *(request.row for request in running)]
        assert sorted(rows, key=lambda row: -1 if row is None else row) == list(range(self.num_rows)), rows
