"""What Prometheus can ask for: by tenant, with a bounded number of label values."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from bayou.serving.bank import Load
from bayou.serving.engine import Answer, Engine, Piece

_MOST_LABELS = 1000
"""Tenants with series of their own; those that come later are "other"."""

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts what an engine does, from when it is made."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._labels: set[str] = set()
        self.registry = CollectorRegistry()
        model, where = ("model",), self.registry
        self._answers = Counter("bayou_answers", "Answers that ended, by how", ("model", "reason"), registry=where)
        self._prompt = Counter("bayou_prompt_tokens", "Tokens of prompts that were answered", model, registry=where)
        self._tokens = Counter("bayou_generated_tokens", "Tokens that were generated", model, registry=where)
        self._first = Histogram(
            "bayou_first_token_seconds", "From asking to the first token", model, registry=where, buckets=_SECONDS
        )
        self._whole = Histogram(
            "bayou_answer_seconds", "From asking to the end", model, registry=where, buckets=_SECONDS
        )
        self._loads = Counter("bayou_loads", "Deltas brought to the device", ("model", "source"), registry=where)
        self._load_seconds = Histogram("bayou_load_seconds", "To read, verify and place a delta", registry=where)
        self._refused = Counter("bayou_refused_requests", "Requests refused, by status", ("status",), registry=where)
        self.registry.register(_Now(engine, self.label))
        engine.on_token, engine.on_end, engine.bank.on_load = self._on_token, self._on_end, self._on_load

    def label(self, name: str) -> str:
        """The tenant's value of the label "model"."""
        if name not in self._labels and len(self._labels) >= _MOST_LABELS:
            return "other"
        self._labels.add(name)
        return name

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)

    def totals(self) -> dict[str, int]:
        """Answers and generated tokens of all tenants so far."""
        found = {"answers": 0, "tokens": 0}
        for key, counter in (("answers", self._answers), ("tokens", self._tokens)):
            samples = [sample for family in counter.collect() for sample in family.samples]
            found[key] = int(sum(sample.value for sample in samples if sample.name.endswith("_total")))
        return found

    def refused(self, status: int) -> None:
        """A request was refused with this HTTP status."""
        self._refused.labels(str(status)).inc()

    def _on_token(self, answer: Answer) -> None:
        label = self.label(answer.tenant.name)
        self._tokens.labels(label).inc()
        if len(answer.tokens) == answer.prompt + 1:
            self._first.labels(label).observe(time.monotonic() - answer.arrived)

    def _on_end(self, answer: Answer, piece: Piece) -> None:
        label = self.label(answer.tenant.name)
        self._answers.labels(label, "refused" if piece.refused else piece.reason).inc()
        self._prompt.labels(label).inc(answer.prompt)
        self._whole.labels(label).observe(time.monotonic() - answer.arrived)

    def _on_load(self, load: Load) -> None:
        self._loads.labels(self.label(load.tenant), load.source).inc()
        self._load_seconds.observe(load.seconds)


class _Now(Collector):
    """What stands at the moment of asking."""

    def __init__(self, engine: Engine, label: object) -> None:
        self._engine, self._label = engine, label

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing beforehand."""
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Gauges of the engine and the bank."""
        now = self._engine.load_now
        yield GaugeMetricFamily("bayou_running_answers", "Answers in the batch", now["running"])
        yield GaugeMetricFamily("bayou_waiting_answers", "Answers in the queue", now["waiting"])
        yield GaugeMetricFamily("bayou_kv_bytes", "Bytes of keys and values", now["kv_bytes"])
        yield GaugeMetricFamily("bayou_base_bytes", "Bytes of the base's weights", self._engine.model.nbytes)
        yield GaugeMetricFamily("bayou_models", "Deltas that can be asked for", len(self._engine.bank.names()))
        yield GaugeMetricFamily("bayou_evictions", "Deltas put out of the device so far", self._engine.bank.evictions)
        resident = GaugeMetricFamily("bayou_delta_bytes", "Bytes of deltas by memory", labels=("model", "memory"))
        for name, places in self._engine.bank.places().items():
            for memory, nbytes in places.items():
                resident.add_metric((self._label(name), memory), nbytes)  # type: ignore[operator]
        yield resident
