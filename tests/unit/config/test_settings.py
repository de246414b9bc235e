"""Sources of settings, and the errors of wrong ones."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from pydantic import ValidationError

from streams.config.environment import is_injected
from streams.config.settings import (
    Settings,
    ignored_variables,
    keys,
    load_settings,
    printed,
    secret_keys,
    variable,
)
from streams.encoding.queue import EncodeQueuePolicy
from streams.errors import SettingsError
from streams.wire.actions import DecodeLimits
from streams.wire.embeddings import EmbeddingCodec


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove every variable of the surroundings."""
    for key in keys():
        monkeypatch.delenv(variable(key), raising=False)
    monkeypatch.delenv("STREAMFORMER_CONFIG", raising=False)


def problems_of(config_file: Path | None = None) -> list[str]:
    """Return the problems that loading the settings reports."""
    with pytest.raises(SettingsError) as caught:
        load_settings(config_file)
    return caught.value.problems


def test_the_environment_wins_over_the_file_and_the_file_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each key is taken from the first of environment, file and default that has it, key by key within a group."""
    file = tmp_path / "s.toml"
    file.write_text('app_id = "file"\n[kafka]\npoll_records_max = 7\nfetch_max_wait_ms = 8\n')
    monkeypatch.setenv("STREAMFORMER_KAFKA_POLL_RECORDS_MAX", "9")
    settings = load_settings(file)
    assert (settings.app_id, settings.kafka.poll_records_max, settings.kafka.fetch_max_wait_ms) == ("file", 9, 8)
    assert settings.kafka.session_timeout_ms == 10_000


def test_the_file_may_be_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`STREAMFORMER_CONFIG` names the file if the command line does not."""
    file = tmp_path / "s.toml"
    file.write_text('app_id = "file"')
    monkeypatch.setenv("STREAMFORMER_CONFIG", str(file))
    assert load_settings().app_id == "file"


def other_than(line: str) -> str:
    """Return a valid value for the key of a printed line that differs from the printed one."""
    key, value = line.split(" = ", 1)
    named = {"kafka.bootstrap_servers": "b:1", "kafka.security_protocol": "SSL", "kafka.sasl_mechanism": "PLAIN"}
    named |= {
        "log_level": "DEBUG",
        "encoder.runtime": "full",
        "encoder.dtype": "bf16",
        "output.codec": "json",
        "features.refresh": "active",
    }
    if key in named:
        return named[key]
    if value in ("True", "False"):
        return "false" if value == "True" else "true"
    if value == "None":
        return __file__
    return "x" if value.startswith("'") else str(float(value) + 1).removesuffix(".0")


def test_every_key_can_be_set_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented variable of a key sets that key and no other."""
    pair = {"kafka.ssl_cert_file", "kafka.ssl_key_file"}
    lines = printed(load_settings()).splitlines()
    for key, line in zip(keys(), lines, strict=True):
        with monkeypatch.context() as patch:
            for one in pair if key in pair else {key}:
                patch.setenv(variable(one), other_than(line))
            changed = printed(load_settings()).splitlines()
        differing = {line.split(" = ")[0] for line, before in zip(changed, lines, strict=True) if line != before}
        assert differing == (pair if key in pair else {key})


def test_all_problems_are_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong values, unknown keys and unknown variables are one error, each with its key and the value."""
    file = tmp_path / "s.toml"
    file.write_text("[state]\nsequence_length = 0\nsequense = 1\n[web]\nport = 70000\n[nowhere]\nx = 1\n")
    monkeypatch.setenv("STREAMFORMER_KAFKA_SECURITY_PROTOCOL", "TLS")
    monkeypatch.setenv("STREAMFORMER_KAFKA_BOOTSTRAP_SERVERS", "localhost")
    monkeypatch.setenv("STREAMFORMER_KAFKA_POLL_RECORD_MAX", "5")
    text = "\n".join(problems_of(file))
    for expected in (
        "state.sequence_length (STREAMFORMER_STATE_SEQUENCE_LENGTH): input should be greater than 0, got '0'",
        "state.sequense: unknown key",
        "web.port (STREAMFORMER_WEB_PORT)",
        "nowhere: unknown key",
        "kafka.security_protocol (STREAMFORMER_KAFKA_SECURITY_PROTOCOL)",
        "'localhost' is not host:port",
        "STREAMFORMER_KAFKA_POLL_RECORD_MAX: unknown variable",
    ):
        assert expected in text


@pytest.mark.parametrize("content", [b"app_id = ", b"\xff\xfe"])
def test_a_broken_file_is_a_problem(tmp_path: Path, content: bytes) -> None:
    """A file that is not TOML is named, with the reason."""
    file = tmp_path / "s.toml"
    file.write_bytes(content)
    [problem] = problems_of(file)
    assert "s.toml: cannot be read as TOML" in problem


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    """A named file that is absent is an error; defaults do not replace it."""
    assert "none.toml" in problems_of(tmp_path / "none.toml")[0]


def test_secrets_come_from_files_and_are_never_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password is read from a file without its newline, and appears in no printed form."""
    file = tmp_path / "password"
    file.write_text("hunter2\n")
    monkeypatch.setenv("STREAMFORMER_KAFKA_SASL_PASSWORD_FILE", str(file))
    monkeypatch.setenv("STREAMFORMER_KAFKA_SASL_USERNAME", "ann")
    monkeypatch.setenv("STREAMFORMER_KAFKA_SECURITY_PROTOCOL", "SASL_PLAINTEXT")
    settings = load_settings()
    options = settings.kafka.client_options()
    assert (options["sasl_plain_username"], options["sasl_plain_password"]) == ("ann", "hunter2")
    assert "hunter2" not in printed(settings) + repr(settings) + str(settings.model_dump())


def test_a_secret_that_cannot_be_read_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing secret file is named together with its variable."""
    monkeypatch.setenv("STREAMFORMER_KAFKA_SASL_PASSWORD_FILE", "/nowhere/password")
    assert "STREAMFORMER_KAFKA_SASL_PASSWORD_FILE" in problems_of()[0]


def test_a_wrong_secret_is_not_echoed(tmp_path: Path) -> None:
    """An error about a secret does not show its value."""
    file = tmp_path / "s.toml"
    file.write_text("[kafka]\nsasl_password = 1234567\n")
    assert "1234567" not in "".join(problems_of(file))


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}, "needs sasl_username and sasl_password"),
        ({"KAFKA_SSL_CERT_FILE": __file__}, "must be set together"),
        ({"KAFKA_HEARTBEAT_INTERVAL_MS": "9000"}, "a third of session_timeout_ms"),
        ({"KAFKA_SSL_CA_FILE": "/nowhere"}, "kafka.ssl_ca_file"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_problems(
    variables: dict[str, str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Combinations of settings are checked too."""
    for name, value in variables.items():
        monkeypatch.setenv(f"STREAMFORMER_{name}", value)
    assert text in "\n".join(problems_of())


def test_a_certificate_that_is_none_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CA file without a certificate is reported with the name of its settings."""
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")
    monkeypatch.setenv("STREAMFORMER_KAFKA_SECURITY_PROTOCOL", "SSL")
    monkeypatch.setenv("STREAMFORMER_KAFKA_SSL_CA_FILE", str(file))
    with pytest.raises(SettingsError, match="certificate or key cannot be read"):
        load_settings().kafka.client_options()


def test_settings_are_frozen() -> None:
    """No setting changes after start."""
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.app_id = "x"
    with pytest.raises(ValidationError):
        settings.kafka.poll_records_max = 1


def test_defaults_are_those_of_the_parts() -> None:
    """A group that configures a part has the part's own fields and defaults, so it can be passed on whole."""
    settings = Settings()
    assert DecodeLimits(**settings.decode.model_dump()) == DecodeLimits()
    assert EncodeQueuePolicy(**settings.queue.model_dump()) == EncodeQueuePolicy()
    assert {field.name for field in fields(DecodeLimits)} == {*type(settings.decode).model_fields, "with_values"}
    assert EmbeddingCodec(settings.output.codec) is EmbeddingCodec.FLOAT32


def test_secrets_are_known_by_their_type() -> None:
    """The keys that also have a `_FILE` variable are the two passwords."""
    assert secret_keys() == ["kafka.sasl_password", "kafka.ssl_key_password"]


def test_settings_that_contradict_each_other_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch with more users than may be hot would never fit; a checkpoint rarer than the watchdog looks stalled."""
    monkeypatch.setenv("STREAMFORMER_STATE_HOT_USERS_MAX", "100")
    assert [problem.split(":")[0] for problem in problems_of()] == [
        "kafka.poll_records_max must be at most state.hot_users_max"
    ]
    monkeypatch.setenv("STREAMFORMER_KAFKA_POLL_RECORDS_MAX", "100")
    assert load_settings().state.hot_users_max == 100
    monkeypatch.setenv("STREAMFORMER_STATE_HOT_USERS_WORKER_MAX", "3")
    assert [problem.split(":")[0] for problem in problems_of()] == [
        "state.hot_users_worker_max must be at least topics.partitions"
    ]
    monkeypatch.delenv("STREAMFORMER_STATE_HOT_USERS_WORKER_MAX")
    monkeypatch.setenv("STREAMFORMER_CHECKPOINT_INTERVAL_MS", "30000")
    assert [problem.split(" ")[0] for problem in problems_of()] == ["checkpoint.interval_ms"]


KUBERNETES = {
    "STREAMFORMER_SERVICE_HOST": "10.96.0.7",
    "STREAMFORMER_SERVICE_PORT": "9464",
    "STREAMFORMER_SERVICE_PORT_HTTP_METRICS": "9464",
    "STREAMFORMER_PORT": "tcp://10.96.0.7:9464",
    "STREAMFORMER_PORT_9464_TCP": "tcp://10.96.0.7:9464",
    "STREAMFORMER_PORT_9464_TCP_PROTO": "tcp",
    "STREAMFORMER_PORT_9464_TCP_PORT": "9464",
    "STREAMFORMER_PORT_9464_TCP_ADDR": "10.96.0.7",
    "STREAMFORMER_PORT_53_UDP_ADDR": "10.96.0.7",
    "STREAMFORMER_WEB_SERVICE_HOST": "10.96.0.8",
    "STREAMFORMER_WEB_PORT": "tcp://10.96.0.8:80",
    "STREAMFORMER_KAFKA_SERVICE_HOST": "10.96.0.9",
    "STREAMFORMER_KAFKA_PORT_9092_TCP_ADDR": "10.96.0.9",
}
"""What a container finds whose namespace has Services `streamformer`, `streamformer-web` and `streamformer-kafka`."""


def test_variables_that_kubernetes_injects_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Services named after the product change no setting and are no problem, even where a name is that of a setting."""
    before = printed(load_settings())
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    assert printed(load_settings()) == before
    assert ignored_variables() == sorted(KUBERNETES)


def test_no_setting_is_taken_for_an_injected_variable() -> None:
    """The variable of no setting has a name that Kubernetes injects; only a URL as `..._PORT` is taken for one."""
    assert not [key for key in keys() if is_injected(variable(key), "9464")]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("STREAMFORMER_KAFKA_BOOTSTRAP_SERVER", "STREAMFORMER_KAFKA_BOOTSTRAP_SERVERS"),
        ("STREAMFORMER_RELEASE_DIR", "STREAMFORMER_ENCODER_RELEASE_DIR"),
        ("STREAMFORMER_SERVICE_HOSTS", None),
    ],
)
def test_an_unknown_variable_is_an_error_that_names_the_nearest(
    name: str, meant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A misspelt variable is an error with the variable that was probably meant, if there is a similar one."""
    monkeypatch.setenv(name, "x")
    (problem,) = problems_of()
    assert problem == f"{name}: unknown variable" + (f"; did you mean {meant}?" if meant else "")


def test_an_unknown_key_of_the_file_names_the_nearest(tmp_path: Path) -> None:
    """A misspelt key of the file is reported with the key that was probably meant."""
    file = tmp_path / "s.toml"
    file.write_text("[web]\nprot = 1\n")
    assert problems_of(file) == ["web.prot: unknown key; did you mean web.port?"]
