"""The only binding to Prometheus: an HTTP server for the catalogue of metrics and the health of the worker.

`/metrics` returns the exposition format; `/livez` and `/readyz` return 200 or 503 with a line of text. The server has
its own threads, so it responds while the event loop is blocked, which is when liveness matters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Thread
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import CollectorRegistry

from streams.errors import CannotStart
from streams.telemetry.metrics import Counter, Gauge, Histogram, Metrics

logger = logging.getLogger(__name__)

Check = Callable[[], str | None]
"""Returns None while all is well, else one line that describes the problem; called from the server's threads."""

REQUEST_TIMEOUT_S = 10.0


class HealthServer:
    """Serves `/metrics`, `/livez` and `/readyz` from construction until `close`."""

    def __init__(self, metrics: Metrics, *, host: str, port: int, livez: Check, readyz: Check) -> None:
        """Listen at `host` and `port` (0 picks a free one). Raises `CannotStart` when the address is not available."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Catalogue(metrics))
        handler = type("Handler", (_Handler,), {"registry": registry, "checks": {"/livez": livez, "/readyz": readyz}})
        try:
            self._server = _Server((host, port), handler)
        except (OSError, OverflowError) as error:
            raise CannotStart(
                "cannot serve metrics", f"{host}:{port}: {error}", "choose another web.host or web.port"
            ) from None
        self.port: int = self._server.server_address[1]
        self._thread = Thread(target=self._server.serve_forever, args=(0.1,), name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and wait for the server's thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without http.server's lookup of this host's name, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a request to the health server failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_TIMEOUT_S
    registry: CollectorRegistry
    checks: dict[str, Check]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._answer(200, encode(self.registry), content_type)
        elif path in self.checks:
            wrong = self.checks[path]()
            self._answer(503 if wrong else 200, f"{wrong or 'ok'}\n".encode(), "text/plain; charset=utf-8")
        else:
            self._answer(404, b"try /metrics, /livez or /readyz\n", "text/plain; charset=utf-8")

    def _answer(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


class _Catalogue:
    """A prometheus-client collector that reads the numbers of the catalogue."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return map(_family, self._metrics)


def _family(instrument: Counter | Gauge | Histogram) -> Metric:
    name, help_, labels = instrument.name, instrument.help, instrument.labels
    if isinstance(instrument, Histogram):
        histogram = HistogramMetricFamily(name, help_, labels=labels)
        for values, held in instrument.samples().items():
            cumulative = held.counts.cumsum().tolist()
            limits = [*(repr(float(bound)) for bound in instrument.bounds), "+Inf"]
            histogram.add_metric(values, list(zip(limits, cumulative, strict=True)), held.total)
        return histogram
    family = (CounterMetricFamily if isinstance(instrument, Counter) else GaugeMetricFamily)(name, help_, labels=labels)
    for values, number in instrument.samples().items():
        family.add_metric(values, number)
    return family
