"""The seconds that compiling takes."""

import time
from typing import Any

import jax


class CompileClock:
    """Adds up the seconds that XLA compiles while the block runs, from JAX's own event stream."""

    _running: list["CompileClock"] = []
    _listening = False

    def __init__(self) -> None:
        self.seconds = 0.0
        self._spans: list[tuple[float, float]] = []

    def __enter__(self) -> "CompileClock":
        if not CompileClock._listening:
            jax.monitoring.register_event_duration_secs_listener(CompileClock._hear)
            CompileClock._listening = True
        CompileClock._running.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        CompileClock._running.remove(self)

    @staticmethod
    def _hear(event: str, seconds: float, **_: Any) -> None:
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration", "jaxpr_trace_duration")):
            now = time.perf_counter()
            for clock in CompileClock._running:
                clock._add(now - seconds, now)

    def _add(self, start: float, end: float) -> None:
        """Counts a span once: tracing may hold the compilation of something else."""
        while self._spans and self._spans[-1][0] >= start:
            self._spans.pop()
        if self._spans:
            start = max(start, self._spans[-1][1])
        self._spans.append((start, max(start, end)))
        self.seconds = sum(b - a for a, b in self._spans)
