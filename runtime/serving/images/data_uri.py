"""Images that stand in the request itself, as `data:` URIs."""

from __future__ import annotations

import binascii
from urllib.parse import unquote_to_bytes

from hivtp.runtime.serving.protocol.errors import ApiError, invalid

# The alphabet for URLs as the usual one.
_ALPHABET = bytes.maketrans(b"-_", b"+/")
_BLANKS = b" \t\r\n\f\v"
EXAMPLE = "data:image/jpeg;base64,..."


def decode_data_uri(uri: str, param: str, max_bytes: int) -> bytes:
    """The bytes of an image.

    The media type does not count, since many clients name a wrong one: the bytes say what they are. Blanks, either
    alphabet of base64, percent signs and missing padding are taken.

    Args:
        uri: begins with "data:".
        param: where it stands in the request.
        max_bytes: that the image may have.

    Raises:
        ApiError: it is not base64, or empty, or too large.
    """
    header, comma, data = uri.partition(",")
    if not comma or not header.rstrip().lower().endswith(";base64"):
        raise invalid(f"{param} is a data: URI without base64; send {EXAMPLE}", param, "invalid_image")
    if len(data) > 2 * max_bytes + 1024:
        raise too_large(param, max_bytes)
    try:
        content = unquote_to_bytes(data) if "%" in data else data.encode("ascii")
        content = content.translate(_ALPHABET, _BLANKS).rstrip(b"=")
        image = binascii.a2b_base64(content + b"=" * (-len(content) % 4), strict_mode=True)
    except (ValueError, binascii.Error) as error:
        raise invalid(f"{param} holds damaged base64; encode the image again", param, "invalid_image") from error
    if not image:
        raise invalid(f"{param} holds no image; send {EXAMPLE}", param, "invalid_image")
    if len(image) > max_bytes:
        raise too_large(param, max_bytes)
    return image


def too_large(param: str, max_bytes: int) -> ApiError:
    """The error of an image with too many bytes."""
    message = f"{param}: the image has more than {max_bytes} bytes; send a smaller one"
    return ApiError(413, message, "image_too_large", param)
