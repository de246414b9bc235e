"""Telemetry: metrics, their Prometheus endpoint, the watchdog and the log filter."""
