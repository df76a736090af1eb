"""Work without a model, for the tests of engines."""

from focuslib.experiments.engine import Report


class Idle:
    """Does nothing."""

    def answer(self, shard):
        yield Report({"seconds": 0.0})
