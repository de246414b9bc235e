"""Rows 23 to 29: life in a cluster."""

from __future__ import annotations

from infra.field_cases.case import Numbers, case, expect
from infra.field_cases.field import Field
from infra.field_cases.records import good

KUBERNETES = {
    "STREAMFORMER_SERVICE_HOST": "10.96.14.7",
    "STREAMFORMER_SERVICE_PORT": "9464",
    "STREAMFORMER_SERVICE_PORT_METRICS": "9464",
    "STREAMFORMER_PORT": "tcp://10.96.14.7:9464",
    "STREAMFORMER_PORT_9464_TCP": "tcp://10.96.14.7:9464",
    "STREAMFORMER_PORT_9464_TCP_PROTO": "tcp",
    "STREAMFORMER_PORT_9464_TCP_PORT": "9464",
    "STREAMFORMER_PORT_9464_TCP_ADDR": "10.96.14.7",
    "STREAMFORMER_WORKER_SERVICE_HOST": "10.96.14.8",
    "STREAMFORMER_WORKER_PORT_80_UDP_ADDR": "10.96.14.8",
}
"""Variables that Kubernetes injects for Services named `streamformer` and `streamformer-worker`."""


@case(23, "the environment of Kubernetes", quick=True)
def kubernetes_environment(field: Field) -> Numbers:
    """A worker starts with the variables that Kubernetes injects; a misspelt one is refused with a suggestion."""
    site = field.site(environment=KUBERNETES)
    site.send([good("ann")])
    site.start()
    seconds = site.wait_lengths({"ann": 1})
    site.expect_no_exit()
    misspelt = field.site(environment={"STREAMFORMER_KAFKA_BOOTSTRAP_SERVER": "127.0.0.1:9"})
    line = misspelt.refusal()
    expect("STREAMFORMER_KAFKA_BOOTSTRAP_SERVERS" in line, f"no suggestion: {line}")
    return {"variables": len(KUBERNETES), "seconds to apply": seconds}


@case(24, "more workers than partitions", quick=True, workers=2)
def spare_worker(field: Field) -> Numbers:
    """A worker without a partition is ready once it has joined."""
    site = field.site({"topics": {"partitions": 1}})
    site.start(0)
    site.supervisor.start(1)
    seconds = site.wait(lambda: site.health(1) == (200, 200), "the spare worker is live and ready", 40)
    site.send([good("ann")])
    site.wait_lengths({"ann": 1})
    site.expect_no_exit()
    return {"seconds to ready": seconds}
