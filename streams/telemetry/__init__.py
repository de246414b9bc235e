"""What a worker reports of itself: metrics, their Prometheus endpoint, the watchdog, and its log."""
