"""A prober without processes: answers from a function, for tests of whatever uses a prober."""

from collections.abc import Callable, Generator

from autotune.probe.protocol import ProbeRequest, RungFailure, RungMeasurement, RungPlan

Answer = Callable[[ProbeRequest, RungPlan], RungMeasurement | RungFailure]


class ScriptedProber:
    """Asks `answer` for each rung of a request; a failure ends the probe, as in a real one.

    Attributes:
        requests: every request that was made, in order.
        closed: how many probes were ended, whether at their end or before it.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.requests: list[ProbeRequest] = []
        self.closed = 0

    def probe(self, request: ProbeRequest) -> Generator[RungMeasurement | RungFailure]:
        self.requests.append(request)
        try:
            for rung in request.rungs:
                answer = self._answer(request, rung)
                yield answer
                if isinstance(answer, RungFailure):
                    return
        finally:
            self.closed += 1
