"""How the server is spread over a cluster: one value, from `serve run` or from a file of `serve deploy`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self, TypeVar

from hivtp.runtime.language import LanguageOptions
from hivtp.runtime.serving.settings import ServerSettings
from hivtp.runtime.vision import VisionOptions
from hivtp_ops.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")


@dataclass(frozen=True)
class RaySettings:
    """How the server is spread over a cluster.

    Args:
        bundle: a folder that every node has, or owner/name on the Hugging Face hub.
        min_replicas, max_replicas: of the server; between them Ray follows the requests that are inside.
        target_requests: of one replica, inside at once; more replicas start above it. 0 takes the number of slots.
        num_cpus, num_gpus: that Ray sets aside for a replica; the server itself takes `threads`.
        threads: of each engine of a replica; 0 takes the physical cores of its node.
        vision_replicas: vision stages of their own, shared by all replicas; 0 gives each replica its own.
        vision_cpus, vision_gpus: of each of those.
        max_tiles_per_batch: that a shared vision stage runs at once.
        batch_seconds: for which it waits for more.
        num_gateways: of what takes requests in, and hands them to a replica.
        gateway_cpus: of each of those.
        session_header: requests that have the same value in it go to the same replica, which has the KV cache.
        upscale_seconds, downscale_seconds: for which a load lasts before replicas start or end.
        max_shutdown_seconds: that a replica gets for its answers when it is replaced.
        server: settings of `hivtp serve`, by their names in ServerSettings. `host` says who reaches Ray's proxies.
        vision: VisionOptions by their names.
        language: LanguageOptions by their names.

    Raises:
        SettingsError: a setting out of its range.
    """

    bundle: str
    min_replicas: int = 1
    max_replicas: int = 1
    target_requests: int = 0
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    threads: int = 0
    vision_replicas: int = 0
    vision_cpus: float = 1.0
    vision_gpus: float = 0.0
    max_tiles_per_batch: int = 8
    batch_seconds: float = 0.005
    num_gateways: int = 1
    gateway_cpus: float = 0.1
    session_header: str = "x-session-id"
    upscale_seconds: float = 10.0
    downscale_seconds: float = 300.0
    max_shutdown_seconds: float = 300.0
    server: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    language: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        minima = {"min_replicas": 1, "num_gateways": 1, "max_tiles_per_batch": 1}
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in ("bundle", "session_header") and not (isinstance(value, str) and value):
                raise SettingsError(f"{option.name} must be given, as text")
            if isinstance(option.default, int | float):
                minimum = minima.get(option.name, 0)
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if not is_number or not minimum <= value < float("inf"):
                    raise SettingsError(f"{option.name} must be a number, {minimum} or more, not {value!r}")
        if self.max_replicas < self.min_replicas:
            raise SettingsError(f"max_replicas is {self.max_replicas}, less than min_replicas, {self.min_replicas}")
        _ = self.server_settings, self.vision_options, self.language_options

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Self:
        """Read what Ray hands over.

        Raises:
            SettingsError: there is no such setting, or it is of another type.
        """
        known = {option.name: option for option in fields(cls)}
        if unknown := sorted(set(args) - set(known)):
            raise SettingsError(f"there are no settings {', '.join(unknown)}; there are {', '.join(known)}")
        if "bundle" not in args:
            raise SettingsError("say which bundle: bundle=DIR")
        return cls(**{name: _read(name, value, known[name].default) for name, value in args.items()})

    @property
    def server_settings(self) -> ServerSettings:
        """Of each replica."""
        lists = {name: tuple(value) for name, value in self.server.items() if isinstance(value, list)}
        return _made(ServerSettings, "server", {**self.server, **lists})

    @property
    def vision_options(self) -> VisionOptions:
        """Of the vision stage."""
        return _made(VisionOptions, "vision", {"num_threads": self.threads or None, **self.vision})

    @property
    def language_options(self) -> LanguageOptions:
        """Of the language model."""
        return _made(LanguageOptions, "language", {"num_threads": self.threads or None, **self.language})


def _read(name: str, value: Any, default: Any) -> Any:
    if not isinstance(value, str) or not isinstance(default, int | float):
        return value
    try:
        return type(default)(value)
    except ValueError as error:
        raise SettingsError(f"{name} must be a number, not {value!r}") from error


def _made(kind: type[T], name: str, values: Mapping[str, Any]) -> T:
    try:
        return kind(**values)
    except TypeError as error:
        raise SettingsError(f"{name}: {error}") from error
