"""What huggingface_hub raises, as errors that say what to do."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from hivtp_ops.errors import HubError

if TYPE_CHECKING:
    from collections.abc import Iterator


def network_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the hub does not answer, in the versions with one HTTP library or another."""
    import huggingface_hub.errors

    base = next(kind for kind in huggingface_hub.errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    transport: tuple[type[Exception], ...] = (base, ConnectionError, TimeoutError)
    return transport


@contextlib.contextmanager
def explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a HubError that says what to do."""
    from huggingface_hub import constants, errors

    here = f"there is no folder {name}, and the repository {name} of the hub"
    login = "log in with hf auth login"
    try:
        yield
    except errors.GatedRepoError as error:
        reason = f"is gated: accept its conditions at {constants.ENDPOINT}/{name}, and {login}"
        raise HubError(f"{here} {reason}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"{here} does not exist, or is private; check the name, or {login}") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"the repository {name} of the hub has no revision {revision!r}; check --revision") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if not constants.HF_HUB_OFFLINE:
            reason = f"is not whole in the cache, and the hub cannot be reached: {_first_line(error)}"
            raise HubError(f"{here} {reason}") from error
        raise HubError(
            f"{here} cannot be had offline (HF_HUB_OFFLINE is set), since the cache does not hold it whole; unset "
            f"that, or bring it here with hf download {name} where there is a network"
        ) from error
    except errors.HFValidationError as error:
        raise HubError(f"there is no folder {name}, and the hub allows no such id: {_first_line(error)}") from error
    except network_errors() as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise HubError(f"{here} may not be read by you ({_first_line(error)}); {login}") from error
        raise HubError(
            f"{here} cannot be reached at {constants.ENDPOINT} ({_first_line(error)}); check the network or "
            f"HF_ENDPOINT, or bring it here with hf download {name} and give that folder"
        ) from error
    except OSError as error:
        if error.errno is None:
            raise HubError(f"{name} cannot be downloaded from the hub: {_first_line(error)}; try again") from error
        raise HubError(
            f"{name} cannot be written to the cache of the hub, {constants.HF_HUB_CACHE}: {error.strerror}; "
            "free some space, or set HF_HOME to another folder"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(
            f"{constants.ENDPOINT} does not answer as a hub does ({_first_line(error)}); check HF_ENDPOINT and the "
            "network"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{error}".strip().partition("\n")[0] or type(error).__name__
