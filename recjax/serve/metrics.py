"""What a server counts, in the text format of Prometheus; one registry for each app, nothing global."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from recjax.core.folder import Manifest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The counters of one app."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("recjax_requests", "Requests answered", ("path", "status"), registry=self._registry)
        self._latency = Histogram(
            "recjax_request_seconds", "Time to answer", ("path",), buckets=_SECONDS, registry=self._registry
        )
        self._batch = Histogram(
            "recjax_batch_size",
            "Requests in one call of the model",
            ("model",),
            buckets=_SIZES,
            registry=self._registry,
        )
        self._call = Histogram(
            "recjax_call_seconds",
            "Time of one call of the model",
            ("model",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._events = Counter(
            "recjax_history_events", "Events in the histories asked about", ("model",), registry=self._registry
        )
        self._unknown = Counter(
            "recjax_unknown_events", "Those whose item the model does not know", ("model",), registry=self._registry
        )
        self._models = Gauge("recjax_model_info", "Served bundles", ("model", "step", "hash"), registry=self._registry)

        self._loads = Counter(
            "recjax_bundle_loads",
            "Versions of bundles, served or refused",
            ("model", "outcome"),
            registry=self._registry,
        )

    def served(self, model: str, now: Manifest, before: Manifest | None) -> None:
        """A bundle is served, instead of another where there was one."""
        if before is not None:
            self._models.remove(*_labels(model, before))
        self._models.labels(*_labels(model, now)).set(1)
        self._loads.labels(model, "served").inc()

    def refused(self, model: str) -> None:
        """A newer version of a bundle was found and is not served."""
        self._loads.labels(model, "refused").inc()

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()
        self._latency.labels(path).observe(seconds)

    def history(self, model: str, events: int, unknown: int) -> None:
        """A history was encoded."""
        self._events.labels(model).inc(events)
        self._unknown.labels(model).inc(unknown)

    def batch(self, model: str, size: int, seconds: float) -> None:
        """The model was called."""
        self._batch.labels(model).observe(size)
        self._call.labels(model).observe(seconds)

    def text(self) -> bytes:
        """All of it, as `/metrics` shows it."""
        return generate_latest(self._registry)


def _labels(model: str, manifest: Manifest) -> tuple[str, str, str]:
    return model, str(manifest["step"]), manifest["manifest_hash"]
