"""What a prompt may ask of a faulty part: it begins with `MARK` and one of the ids below."""

from quire.common.messages import StepPlan, unpack

MARK = 4090
RAISE, EXIT, NAN, RAISE_ONCE, EXIT_ONCE, LATE, SCHEDULER = range(4000, 4007)
LATE_BY = 5  # tokens that a LATE one gets before it fails


class Marked:
    """The rows that hold marked prompts, as the plans tell."""

    def __init__(self) -> None:
        self._epoch = 0
        self._rows: dict[int, tuple[int, int]] = {}  # row -> kind, length of the prompt

    def met(self, plan: StepPlan) -> dict[int, int]:
        """Row and kind of those that are to fail in this step. To be asked of every plan, in order."""
        if plan.epoch != self._epoch:  # another group begins with empty rows
            self._epoch = plan.epoch
            self._rows.clear()
        for row in plan.released:
            self._rows.pop(row, None)
        for admitted in plan.admitted:
            tokens = unpack(admitted.tokens)
            if tokens[0] == MARK:
                self._rows[admitted.row] = (tokens[1], admitted.num_prompt)
        steps = zip(unpack(plan.rows), unpack(plan.starts), unpack(plan.counts), strict=True)
        return {row: self._rows[row][0] for row, start, count in steps if self._due(row, start + count)}

    def _due(self, row: int, length: int) -> bool:
        kind, num_prompt = self._rows.get(row, (None, 0))
        return kind is not None and (kind != LATE or length >= num_prompt + LATE_BY)
