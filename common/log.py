"""One log format for every process: time, level, process, text, on stderr."""

import logging
import sys

FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(process_label)s  %(message)s"


def configure(label: str, level: str = "info") -> None:
    """Set up logging of this process; `label` names it in every line ("scheduler", "worker 0", ...)."""

    class Labelled(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            record.process_label = label
            return True

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
    handler.addFilter(Labelled())
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
