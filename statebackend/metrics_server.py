"""Figures over HTTP for Prometheus, with the client library's own server and a registry of its own per store."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from statebackend.errors import StateStoreError
from statebackend.histogram import BOUNDS_S, Histogram
from statebackend.logs import context
from statebackend.metrics import Observed, Sample, SampleKind

__all__ = ["MetricsServer"]

logger = logging.getLogger(__name__)


class MetricsServer:
    """Serves the figures of ``observed`` at ``/metrics`` until it is closed.

    ``port`` 0 takes a free one, see `port`. Nothing is shared with other servers of the process or with the client
    library's global registry. Raises ``ImportError`` that names the missing extra, and `StateStoreError` when the port
    cannot be opened.
    """

    def __init__(self, observed: Observed, port: int, host: str) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as error:
            raise ImportError(f"metrics_port={port}: needs the extra 'metrics' (prometheus-client): {error}") from error
        registry = CollectorRegistry()
        registry.register(_Collector(observed))
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise StateStoreError(f"metrics port {host}:{port} cannot be opened: {error}") from error
        self.port: int = self._server.server_port
        logger.info("metrics at http://%s:%d/metrics", host, self.port, extra=context())

    def close(self) -> None:
        """Close the port; requests under way are answered."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Collector:
    """The samples as the client library wants them."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed

    def describe(self) -> list[Any]:
        return []  # else registering would collect once, to find the names

    def collect(self) -> Iterator[Any]:
        for name, family in groupby(self._observed.samples(), key=lambda s: s.name):
            yield _family(name, list(family))


def _family(name: str, members: list[Sample]) -> Any:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    families = {
        SampleKind.COUNTER: CounterMetricFamily,
        SampleKind.GAUGE: GaugeMetricFamily,
        SampleKind.HISTOGRAM: HistogramMetricFamily,
    }
    first = members[0]
    family = families[first.kind](name, first.help, labels=list(first.labels))
    for s in members:
        values = list(s.labels.values())
        if isinstance(s.value, Histogram):
            bounds = [*(f"{b:g}" for b in BOUNDS_S), "+Inf"]
            family.add_metric(values, list(zip(bounds, s.value.cumulative, strict=True)), s.value.sum_s)
        else:
            family.add_metric(values, s.value)
    return family
