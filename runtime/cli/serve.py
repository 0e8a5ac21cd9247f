"""hivtp serve: an OpenAI-compatible server."""

from __future__ import annotations

import os
import warnings
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hivtp.runtime.cli.options import add_model_options, load_pipeline, make_bundle_parser
from hivtp.runtime.serving.settings import ServerSettings
from hivtp_ops.errors import SettingsError

if TYPE_CHECKING:
    import argparse

DESCRIPTION = """\
Serve a bundle over OpenAI's chat completions API, images included, to many clients at once. The page at / shows which
patches are kept. Needs hivtp[serve].
"""
EXAMPLES = """\
examples:
  hivtp serve bundle                                       # http://127.0.0.1:8000, for this machine alone
  hivtp serve bundle --host 0.0.0.0 --api-key-file keys    # for others, who send a key
  hivtp serve bundle --allow-image-domain images.example.org
  curl http://127.0.0.1:8000/v1/models
"""
KEY_VARIABLE = "HIVTP_API_KEY"
# Each option: its group, the setting that it is, how its value is called, and what it does.
OPTIONS = (
    (
        "address",
        "--host",
        "host",
        "HOST",
        "address to listen on; one that other machines reach needs a key, or --insecure",
    ),
    ("address", "--port", "port", "PORT", "port to listen on; 0 takes a free one"),
    (
        "access",
        "--api-key",
        "api_keys",
        "KEY",
        f"key that clients must send; repeatable (or in {KEY_VARIABLE}, one per line)",
    ),
    ("access", "--insecure", "is_insecure", None, "let other machines in without a key"),
    ("access", "--allow-host", "allowed_hosts", "NAME", "also accept this name in the Host header; repeatable"),
    (
        "access",
        "--allow-origin",
        "allowed_origins",
        "ORIGIN",
        "web pages of this origin may use the server; * is all; repeatable",
    ),
    (
        "access",
        "--allow-image-domain",
        "image_domains",
        "HOST",
        "download images from this host; *.HOST is every host below it; repeatable",
    ),
    (
        "model",
        "--model-name",
        "model_names",
        "NAME",
        "name of the model for clients; repeatable (default: the checkpoint's name, and hivtp)",
    ),
    (
        "model",
        "--max-context",
        "max_context",
        "N",
        "tokens of a prompt and its answer at most (default: the model's context)",
    ),
    ("model", "--max-tokens", "max_tokens", "N", "tokens of an answer at most (default: what the context leaves)"),
    ("load", "--slots", "num_slots", "N", "requests that are answered at once"),
    ("load", "--max-queued", "max_queued", "N", "further requests that wait; one more gets 429"),
    (
        "load",
        "--max-kv-bytes",
        "max_kv_bytes",
        "N",
        "KV cache of all requests together (default: half of the free memory)",
    ),
    (
        "load",
        "--chunk-size",
        "chunk_size",
        "N",
        "tokens of a prompt that are computed between the steps of other answers; 0 is all",
    ),
    ("load", "--steps-per-chunk", "steps_per_chunk", "N", "decode steps between two chunks"),
    ("load", "--no-prefix-reuse", "reuses_prefix", None, "compute each turn of a chat from its start"),
    ("load", "--idle-seconds", "idle_seconds", "S", "without a request, then the KV cache gives its memory back"),
    ("load", "--image-threads", "num_image_threads", "N", "images that are decoded and resized at once"),
    ("limits", "--max-images", "max_images", "N", "images of a conversation at most"),
    ("limits", "--max-image-bytes", "max_image_bytes", "N", "bytes of one encoded image at most"),
    ("limits", "--max-image-pixels", "max_image_pixels", "N", "pixels of one image at most"),
    ("limits", "--max-body-bytes", "max_body_bytes", "N", "bytes of a request at most"),
    ("limits", "--queue-seconds", "queue_seconds", "S", "time until a waiting request gets 429"),
    ("limits", "--request-seconds", "request_seconds", "S", "time for a whole answer"),
    ("limits", "--body-seconds", "body_seconds", "S", "time in which a client must have sent its request"),
    ("limits", "--fetch-seconds", "fetch_seconds", "S", "time for the download of an image"),
    (
        "limits",
        "--keep-alive-seconds",
        "keep_alive_seconds",
        "S",
        "time without a token after which a stream gets a comment, for proxies",
    ),
    ("limits", "--drain-seconds", "drain_seconds", "S", "time that answers may still take after SIGTERM"),
    ("log", "--log-format", "log_format", "FORMAT", "format of the log: json or text"),
    ("log", "--strict", "refuses_unknown", None, "refuse fields that the server does not know"),
)


def make_parser(program: str) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_bundle_parser(program, DESCRIPTION, EXAMPLES)
    defaults = {field.name: field.default for field in fields(ServerSettings)}
    groups: dict[str, Any] = {}
    for name, flag, setting, metavar, purpose in OPTIONS:
        group = groups.setdefault(name, None) or parser.add_argument_group(name)
        groups[name] = group
        default = defaults[setting]
        if metavar is None:
            group.add_argument(
                flag, action="store_const", const=not default, default=default, dest=setting, help=purpose
            )
        elif isinstance(default, tuple):
            group.add_argument(flag, action="append", default=[], metavar=metavar, dest=setting, help=purpose)
        else:
            kind = int if default is None else type(default)
            shown = purpose if default is None else f"{purpose} (default: %(default)s)"
            group.add_argument(flag, type=kind, default=default, metavar=metavar, dest=setting, help=shown)
    groups["access"].add_argument(
        "--api-key-file", metavar="FILE", help="file of keys that clients may send, one per line"
    )
    add_model_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Load the bundle and serve it."""
    from PIL import Image

    from hivtp.runtime.serving.server import serve

    # Images are refused by their size in words; Pillow's warning would add two lines of its own.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    settings = settings_from(options)
    with load_pipeline(options) as pipeline:
        serve(pipeline.model, settings)


def settings_from(options: argparse.Namespace) -> ServerSettings:
    """What the command line asked for.

    Raises:
        SettingsError: a setting out of its range, or the file of keys cannot be read.
    """
    given = {setting: getattr(options, setting) for _, _, setting, _, _ in OPTIONS}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    given["api_keys"] += _keys(options.api_key_file)
    # On the command line 0 stands for no chunks.
    given["chunk_size"] = given["chunk_size"] or None
    return ServerSettings(**given)


def _keys(file: str | None) -> tuple[str, ...]:
    lines = os.environ.get(KEY_VARIABLE, "").splitlines()
    if file is not None:
        try:
            lines += Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise SettingsError(f"the file of API keys {file} cannot be read: {error}") from error
        if not any(line.strip() for line in lines):
            raise SettingsError(f"the file of API keys {file} holds none; write one key per line")
    return tuple(line.strip() for line in lines if line.strip())
