"""Settings: one frozen object, read from environment variables, then a TOML file, then defaults.

The key `kafka.poll_records_max` is written `[kafka] poll_records_max = 500` in the file, and its environment variable
is `STREAMFORMER_KAFKA_POLL_RECORDS_MAX`. A secret may also be read from a file of its own, which a variable such as
`STREAMFORMER_KAFKA_SASL_PASSWORD_FILE` names. All problems are reported at once, and secrets are never printed.
docs/reference/settings.md lists every key.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from streams.config.environment import PREFIX, did_you_mean, injected_variables, is_injected
from streams.config.groups import (
    CheckpointSettings,
    DecodeSettings,
    EncoderSettings,
    FeaturesSettings,
    Group,
    KafkaSettings,
    Name,
    OutputSettings,
    QueueSettings,
    StateSettings,
    TopicsSettings,
    TriggersSettings,
    WebSettings,
    WorkerSettings,
)
from streams.errors import SettingsError

CONFIG_VARIABLE = "STREAMFORMER_CONFIG"


class Settings(BaseSettings):
    """All settings of workers, subscribers and commands. Keyword arguments are the content of the TOML file."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="_",
        env_nested_max_split=1,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    app_id: Name = "streamformer"
    """Name of the consumer group, the changelog topic and the transactions; one per independent application."""
    data_dir: Path = Path("streamformer-data")
    """Folder of the local databases. They are a cache of the changelog: keep the folder for quick restarts."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Level of the log on standard error."""
    kafka: KafkaSettings = KafkaSettings()
    topics: TopicsSettings = TopicsSettings()
    worker: WorkerSettings = WorkerSettings()
    state: StateSettings = StateSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    decode: DecodeSettings = DecodeSettings()
    triggers: TriggersSettings = TriggersSettings()
    encoder: EncoderSettings = EncoderSettings()
    features: FeaturesSettings = FeaturesSettings()
    queue: QueueSettings = QueueSettings()
    output: OutputSettings = OutputSettings()
    web: WebSettings = WebSettings()

    @model_validator(mode="after")
    def _check_combinations(self) -> Settings:
        if self.kafka.poll_records_max > self.state.hot_users_max:
            raise ValueError("kafka.poll_records_max must be at most state.hot_users_max: a batch's users are all hot")
        if self.state.hot_users_worker_max < self.topics.partitions:
            raise ValueError(
                "state.hot_users_worker_max must be at least topics.partitions: every partition has a share"
            )
        if self.checkpoint.interval_ms >= self.worker.watchdog_timeout_ms:
            raise ValueError("checkpoint.interval_ms must be below worker.watchdog_timeout_ms, which watches it")
        return self

    @property
    def output_topics(self) -> list[str]:
        """Names of the topics of what is computed of users."""
        topics, has_features = self.topics, self.features.definitions_file is not None
        has_encoder = self.encoder.release_dir is not None or not has_features
        return [topics.embeddings] * has_encoder + [topics.features] * has_features

    @property
    def changelog_topic(self) -> str:
        """Name of the changelog topic."""
        return f"{self.app_id}-user-sequences-changelog"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the environment, then the TOML file."""
        return _Environment(settings_cls), init_settings


def load_settings(config_file: Path | None = None) -> Settings:
    """Read the environment and `config_file`, or else the file that `STREAMFORMER_CONFIG` names.

    Raises `SettingsError`, which lists every problem with its key.
    """
    problems = _unknown_variables(os.environ)
    content = _toml(config_file, problems)
    try:
        settings = Settings(**content)
    except ValidationError as error:
        problems += [_problem(one) for one in error.errors()]
    except (SourceError, _SecretUnreadable) as error:
        problems.append(str(error))
    if problems:
        raise SettingsError(problems)
    return settings


def printed(settings: Settings) -> str:
    """Return one line `key = value` per setting, secrets as asterisks."""
    values = settings.model_dump(mode="json")
    lines = []
    for key in keys():
        group, _, name = key.rpartition(".")
        lines.append(f"{key} = {(values[group] if group else values)[name]!r}")
    return "\n".join(lines)


def keys() -> Iterator[str]:
    """Yield every key, `group.name` or `name`, in the order of this file."""
    for name, field in Settings.model_fields.items():
        group = field.annotation
        if isinstance(group, type) and issubclass(group, Group):
            yield from (f"{name}.{inner}" for inner in group.model_fields)
        else:
            yield name


def variable(key: str) -> str:
    """Return the environment variable of a key."""
    return PREFIX + key.replace(".", "_").upper()


def secret_keys() -> list[str]:
    """Return the keys that hold secrets; each has a second variable that ends in `_FILE`."""
    return [key for key in keys() if _is_secret(key)]


def _is_secret(key: str) -> bool:
    group, _, name = key.rpartition(".")
    model: Any = Settings.model_fields[group].annotation if group else Settings
    annotation = model.model_fields[name].annotation
    return annotation is SecretStr or SecretStr in get_args(annotation)


class _SecretUnreadable(Exception):
    pass


class _Environment(EnvSettingsSource):
    """The environment, with secrets read from the files that `*_FILE` variables name, less the final newline."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        """Return the variables of settings; others are reported or ignored by `load_settings`."""
        found, known = super()._load_env_vars(), _known_variables()
        return {
            name: value for name, value in found.items() if name.upper() in known and not is_injected(name, value or "")
        }

    def __call__(self) -> dict[str, Any]:
        content = super().__call__()
        for key in secret_keys():
            group, _, name = key.rpartition(".")
            if path := content.get(group, {}).pop(f"{name}_file", None):
                content[group].setdefault(name, self._read(key, path))
        return content

    @staticmethod
    def _read(key: str, path: str) -> str:
        try:
            return Path(path).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise _SecretUnreadable(f"{key} ({variable(key)}_FILE): cannot read {path}: {error}") from None


def ignored_variables() -> list[str]:
    """Return the variables that begin with our prefix and are ignored, because Kubernetes has injected them."""
    return injected_variables(os.environ)


def _known_variables() -> set[str]:
    return {variable(key) for key in keys()} | {f"{variable(key)}_FILE" for key in secret_keys()} | {CONFIG_VARIABLE}


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    known = _known_variables()
    ours = [name for name, value in environ.items() if name.upper().startswith(PREFIX) and not is_injected(name, value)]
    unknown = sorted(name for name in ours if name.upper() not in known)
    return [f"{name}: unknown variable{did_you_mean(name.upper(), sorted(known), PREFIX)}" for name in unknown]


def _toml(config_file: Path | None, problems: list[str]) -> dict[str, Any]:
    path = config_file or (Path(named) if (named := os.environ.get(CONFIG_VARIABLE)) else None)
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        problems.append(f"{path}: cannot be read as TOML: {error}")
        return {}


def _problem(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    text = error["msg"].removeprefix("Value error, ")
    if not key:
        return str(text)
    if key not in set(keys()):
        unknown = f"unknown key{did_you_mean(key, list(keys()))}"
        return f"{key}: {unknown if error['type'] == 'extra_forbidden' else text}"
    got = "" if _is_secret(key) else f", got {str(error['input'])[:60]!r}"
    return f"{key} ({variable(key)}): {text[:1].lower()}{text[1:]}{got}"
