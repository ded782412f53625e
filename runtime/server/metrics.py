"""Figures for Prometheus: counted here, or read from the engines when somebody asks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rk_export.runtime.engine.records import Counters
from rk_export.runtime.server.models import Models
from rk_export.runtime.server.opened import Decoder

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "rk_export_"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BETWEEN = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)

# Name, help, and the field of an engine's counters.
_GAUGES = (
    ("requests_running", "Requests in slots.", "running"),
    ("requests_waiting", "Requests in the queue.", "waiting"),
)
_TOTALS = (
    ("requests_taken", "Requests that an engine took.", "requests"),
    ("requests_refused", "Requests refused because the queue was full.", "refused"),
    ("prompt_tokens", "Tokens of prompts.", "prompt_tokens"),
    ("cached_prompt_tokens", "Tokens of prompts that were copied instead of computed.", "cached_tokens"),
    ("generated_tokens", "Tokens of answers.", "new_tokens"),
    ("drafted_tokens", "Tokens that were guessed ahead.", "drafted_tokens"),
    ("accepted_tokens", "Those of them that the model would have chosen itself.", "accepted_tokens"),
    ("decode_steps", "Steps in which all running answers got a token.", "steps"),
)


class Metrics:
    """All figures of one server.

    Args:
        models: Whose engines are asked.
    """

    def __init__(self, models: Models) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody draws
        self._registry = CollectorRegistry()
        self.requests = Counter(
            f"{_PREFIX}http_requests", "Answered requests.", ("route", "status"), registry=self._registry
        )
        self.seconds = self._histogram("request_seconds", "Whole time of a request.", "route", _SECONDS)
        self.first = self._histogram(
            "time_to_first_token_seconds", "From the request to the first token.", "model", _SECONDS
        )
        self.between = self._histogram(
            "inter_token_seconds", "Time of a token after the first.", "model", _BETWEEN
        )
        ProcessCollector(registry=self._registry)
        self._registry.register(_Engines(models))

    def page(self) -> bytes:
        """Return the figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, label: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{_PREFIX}{name}", text, (label,), buckets=buckets, registry=self._registry)


class _Engines(Collector):
    """Reads the counters of the engines that are open."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Yield the figures of every model."""
        open_now = {
            name: model.opened
            for name, model in self._models.served.items()
            if isinstance(model.opened, Decoder)
        }
        counters = {name: decoder.engine.counters() for name, decoder in open_now.items()}
        slots = {name: decoder.engine.slots for name, decoder in open_now.items()}
        for name, text, key in _GAUGES:
            yield _gauge(name, text, {model: getattr(one, key) for model, one in counters.items()})
        yield _gauge("slots", "Requests that can run together.", slots)
        loads = {model: (one.running + one.waiting) / slots[model] for model, one in counters.items()}
        yield _gauge("load", "Running and waiting requests over slots; scale out above 1.", loads)
        for name, text, key in _TOTALS:
            family = CounterMetricFamily(f"{_PREFIX}{name}", text, labels=("model",))
            for model, one in counters.items():
                family.add_metric((model,), getattr(one, key))
            yield family
        yield _finished(counters)
        loaded = {name: int(model.opened is not None) for name, model in self._models.served.items()}
        yield _gauge("model_loaded", "Whether a model is open.", loaded)
        sizes = {name: model.bytes for name, model in self._models.served.items()}
        yield _gauge("model_bytes", "Memory that a model takes once it is open, estimated.", sizes)


def _gauge(name: str, text: str, values: dict[str, int] | dict[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{_PREFIX}{name}", text, labels=("model",))
    for model, value in values.items():
        family.add_metric((model,), value)
    return family


def _finished(counters: dict[str, Counters]) -> CounterMetricFamily:
    family = CounterMetricFamily(
        f"{_PREFIX}answers", "Ended answers by the reason.", labels=("model", "reason")
    )
    for model, one in counters.items():
        for reason, count in one.finished.items():
            family.add_metric((model, str(reason)), count)
    return family
