"""The log, on stderr."""

import logging


def configure(_form: str) -> None:
    """Write the log on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
