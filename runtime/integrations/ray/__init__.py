"""`hivtp serve` on a cluster of Ray: `serve run hivtp.runtime.integrations.ray:build_app bundle=DIR`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def build_app(args: Mapping[str, Any]) -> Any:
    """The application that Ray Serve deploys.

    Args:
        args: what RaySettings holds, by name; from the command line they are all text.

    Raises:
        MissingExtraError: Ray Serve is not installed.
        SettingsError: a setting that is not known, or is out of its range.
    """
    from hivtp.runtime.integrations.ray.application import create_application
    from hivtp.runtime.integrations.ray.settings import RaySettings

    return create_application(RaySettings.of(args))
