"""Takes the decoder of an existing bundle over into another bundle of the same language model."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any, get_args

from hivtp.engines.bundle import Bundle
from hivtp.export.decoder.build import Rounding
from hivtp.export.decoder.layout import LANGUAGE_FOLDER, decoder_manifest
from hivtp_ops.errors import BundleError

if TYPE_CHECKING:
    from pathlib import Path

    from hivtp.export.checkpoint.folder import Checkpoint
    from hivtp.export.decoder.build import DecoderKind


def open_source(source: Path, checkpoint: Checkpoint, kind: DecoderKind) -> Bundle:
    """Open the bundle whose decoder is to be taken over, if it can be.

    Args:
        source: the bundle; its hashes are checked.
        checkpoint: what is being exported.
        kind: which decoder is asked for.

    Raises:
        BundleError: not a bundle with a decoder, or of another language model or kind.
    """
    bundle = Bundle.open(source, check_hashes=True)
    manifest = bundle.manifest
    if manifest.language is None:
        raise BundleError(f"{source} holds no decoder: it is an encoder bundle; name one that answers")
    decoder = manifest.language.decoder
    if decoder is None:
        raise BundleError(
            f"{source} holds no decoder: it was exported with --language-precision none; name one that "
            "holds one, or export the decoder"
        )
    if manifest.source.language_fingerprint != checkpoint.language_fingerprint:
        raise BundleError(
            f"{source} was exported from {manifest.source.name!r}, whose language model is another than that of "
            f"{checkpoint.folder}; name a bundle of this one, or export the decoder again"
        )
    if decoder.precision != kind.precision:
        raise BundleError(
            f"the decoder of {source} is {decoder.precision}, and {kind.precision} is asked for; "
            f"say --language-precision {decoder.precision}, or export the decoder again"
        )
    if decoder.block_size != kind.block_size:
        raise BundleError(
            f"the decoder of {source} is rounded in blocks of {decoder.block_size}, and {kind.block_size} is asked "
            f"for; say --block-size {decoder.block_size}, or export the decoder again"
        )
    if decoder.prefill_precision != kind.prefill_precision:
        held = decoder.prefill_precision
        advice = "leave --prefill-precision out" if held is None else f"say --prefill-precision {held}"
        raise BundleError(
            f"for prompts {source} holds a decoder of precision {held or 'none'}, and "
            f"{kind.prefill_precision or 'none'} is asked for; {advice}, or export the decoder again"
        )
    _check_rounding(bundle, kind)
    if decoder != decoder_manifest(kind):
        raise BundleError(
            f"{source} keeps its decoder where no export puts it, or says that it takes {decoder.dtype}; export the "
            "decoder again"
        )
    return bundle


def _check_rounding(bundle: Bundle, kind: DecoderKind) -> None:
    try:
        held = bundle.manifest.verification["language"]["rounding"]["asked"]
    except (KeyError, TypeError):
        # What is missing is said when the reports are taken over.
        return
    if held == kind.rounding:
        return
    choices = [name for name in get_args(Rounding) if name == held]
    advice = f"say --language-rounding {choices[0]}, or export the decoder again" if choices else "export it again"
    raise BundleError(f"the decoder of {bundle.folder} is not rounded as asked ({kind.rounding or 'plain'}): {advice}")


def take_decoder(source: Bundle, folder: Path) -> dict[str, Any]:
    """Take decoder and token embeddings over, unchanged; on one file system they are linked and cost no space.

    Args:
        source: from `open_source`.
        folder: the bundle that is being written, which holds no decoder yet.

    Returns:
        What was found when it was compared with PyTorch, as `export_decoder` gives it.

    Raises:
        OSError: a file cannot be written, or stands there already.
    """
    # Names of an opened bundle are relative paths without "..", so nothing is written outside `folder`.
    for name in source.manifest.files:
        if name.startswith(f"{LANGUAGE_FOLDER}/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source.folder / name, folder / name)
    return {part: found for part, found in source.manifest.verification.items() if part != "vision"}


def _link_or_copy(source: Path, destination: Path) -> None:
    # The file itself: in the cache of the Hugging Face hub a bundle's files are links, which lead nowhere from here.
    source = source.resolve()
    try:
        os.link(source, destination)
    except FileExistsError:
        raise
    except OSError:
        # Another file system, and some by themselves, refuse links.
        with source.open("rb") as original, destination.open("xb") as copy:
            shutil.copyfileobj(original, copy)
