"""Rows 23 to 29: life in a cluster."""

from __future__ import annotations

from kafka.admin import ACL, ACLOperation, ACLPermissionType, ACLResourcePatternType, ResourcePattern, ResourceType

from infra.field_cases.case import Numbers, case, expect
from infra.field_cases.field import Field
from infra.field_cases.records import Record, good
from infra.field_cases.site import Site
from infra.kafka.node import BrokerOptions
from infra.kafka.topics import delete_topics

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


@case(24, "more workers than partitions", workers=2)
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


@case(25, "the same instance id on another host")
def another_host(field: Field) -> Numbers:
    """A worker that is created again under its instance id with another host name is ready within seconds."""
    site = field.site(
        {"kafka": {"session_timeout_ms": 30_000, "heartbeat_interval_ms": 1_000}}, alteration=("host", "pod-a")
    )
    site.start()
    site.send([good("ann")])
    site.wait_lengths({"ann": 1})
    site.supervisor.hold(0)
    site.alter("host", "pod-b")
    site.supervisor.start(0)
    seconds = site.wait(site.supervisor.is_ready, "the worker is ready on the other host", 25)
    site.send([good("ann", 2)])
    site.wait_lengths({"ann": 2})
    site.expect_no_exit()
    return {"seconds to ready": seconds}


@case(26, "two workers with one instance id", workers=2)
def two_owners(field: Field) -> Numbers:
    """One of the two ends with a line that names worker.instance_id; the other one works on."""
    site = field.site()
    site.start(0)
    site.supervisor.workers[0].wanted = False
    site.alter("env", f"STREAMFORMER_WORKER_INSTANCE_ID={site.settings.app_id}-0")
    site.supervisor.start_once(1)
    seconds = site.wait(lambda: site.supervisor.exits, "one of the two ends", 45)
    line = site.supervisor.exits[0].last_line
    expect("instance_id" in line, f"the line does not name worker.instance_id: {line}")
    left = 1 - site.supervisor.exits[0].number
    site.wait(lambda: site.health(left) == (200, 200), "the other one is ready", 30)
    site.watch(5)
    site.send([good("ann")])
    site.wait_lengths({"ann": 1})
    expect(len(site.supervisor.exits) == 1, "the other one has ended too")
    return {"seconds to end": seconds, "exit code": site.supervisor.exits[0].code}


@case(27, "topics on three brokers", brokers=3)
def durable_topics(field: Field) -> Numbers:
    """`topics create` takes the broker's default replication; `topics verify` names what is too weak."""
    site = field.cluster_site()
    topics = site.settings.topics
    delete_topics(site.settings)
    created = site.command("topics", "create")
    expect(created.code == 0, f"create ends with {created.code}: {created.output[-200:]}")
    with site.admin() as admin:
        (described,) = admin.describe_topics([topics.actions])
    replicas = {len(each["replica_nodes"]) for each in described["partitions"]}
    expect(replicas == {3}, f"the topic has {replicas} replicas")
    verified = site.command("topics", "verify", "--strict")
    expect(verified.code == 0, f"good topics are reported: {verified.output[-300:]}")
    site.configure(topics.actions, min_insync_replicas="1", unclean_leader_election_enable="true")
    weak = site.command("topics", "verify", "--strict")
    expect(weak.code == 1, f"weak topics: verify --strict ends with {weak.code}")
    for name in ("min.insync.replicas", "unclean.leader.election"):
        expect(name in weak.output, f"{name} is not named: {weak.output[-300:]}")
    plain = site.command("topics", "verify")
    expect(plain.code == 0 and "min.insync.replicas" in plain.output, "verify without --strict does not warn")
    return {"replicas": 3}


RIGHTS = (
    ("TOPIC", "actions", "READ"),
    ("TOPIC", "embeddings", "READ"),
    ("TOPIC", "embeddings", "WRITE"),
    ("TOPIC", "changelog", "READ"),
    ("TOPIC", "changelog", "WRITE"),
    ("TOPIC", "dead_letter", "WRITE"),
    ("GROUP", "app", "READ"),
    ("TRANSACTIONAL_ID", "app", "WRITE"),
)
"""Rights that the guide for deployment lists; none of them is the one to describe configs."""


@case(28, "no right to describe configs")
def least_rights(field: Field) -> Numbers:
    """One line names the right that is missing, and the worker runs on without it."""
    broker = field.own_broker(BrokerOptions(users={"pod": "secret"}))
    site = field.site(
        servers=broker.bootstrap_servers,
        environment={
            "KAFKA_BOOTSTRAP_SERVERS": broker.secured_servers,
            "STREAMFORMER_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
            "STREAMFORMER_KAFKA_SASL_MECHANISM": "PLAIN",
            "STREAMFORMER_KAFKA_SASL_USERNAME": "pod",
            "STREAMFORMER_KAFKA_SASL_PASSWORD": "secret",
        },
    )
    _grant(site)
    site.send([good("ann"), Record(b"bob", b"{")])
    site.start()
    seconds = site.wait_lengths({"ann": 1})
    site.wait(lambda: len(site.dead_letters()) == 1, "the dead letter")
    site.expect_no_exit()
    lines = [line for line in site.supervisor.log(0).splitlines() if "DESCRIBE_CONFIGS" in line]
    expect(lines, "no line names the right")
    expect("Traceback" not in site.supervisor.log(0), "the log has a traceback")
    return {"rights": len(RIGHTS), "seconds": seconds, "lines": len(lines)}


def _grant(site: Site) -> None:
    """Grant `RIGHTS` to the user; a transactional id stands for all that begin with it."""
    settings = site.settings
    names = {**settings.topics.model_dump(), "changelog": settings.changelog_topic, "app": settings.app_id}
    acls = []
    for kind, name, operation in RIGHTS:
        prefixed = kind == "TRANSACTIONAL_ID"
        pattern = ACLResourcePatternType.PREFIXED if prefixed else ACLResourcePatternType.LITERAL
        resource = ResourcePattern(ResourceType[kind], names[name], pattern)
        acls.append(ACL("User:pod", "*", ACLOperation[operation], ACLPermissionType.ALLOW, resource))
    with site.admin() as admin:
        admin.create_acls(acls)
        site.wait(lambda: all(admin.describe_acls(acl)[0] for acl in acls), "the rights are granted")


@case(29, "state shorter than the release looks back", quick=True)
def short_state(field: Field) -> Numbers:
    """A worker whose state keeps 8 actions refuses a release that looks back further."""
    site = field.site({"state": {"sequence_length": 8, "chunk_length": 8}})
    text = site.refusal()
    expect("sequence_length" in text, f"the refusal does not name the setting: {text}")
    return {"kept": 8}
