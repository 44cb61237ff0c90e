"""Resolve the images of rows (path, bytes, base64 or URL), and hash them to compare rows."""

from __future__ import annotations

import base64
import binascii
import hashlib
import time
from pathlib import Path
from typing import Any

from PIL import Image

from config_tools import InputError

BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0A", "Qk")  # PNG, JPEG, ...
MAX_DOWNLOAD = 64 * 2**20  # bytes
RETRY_STATUS = (429, 500, 502, 503, 504)  # HTTP status after which a retry may help


def resolve_image(image: Any, folder: Path) -> str | bytes | Image.Image:
    """The image of a row as `open_image` accepts it; downloads URLs; raises `InputError`."""
    if isinstance(image, dict):
        image = image.get("bytes") or image["path"]
    if not isinstance(image, str):
        return image
    if image.startswith(("http://", "https://")):
        return download(image)
    # Unlike base64, paths are short or contain a dot.
    is_base64 = len(image) >= 64 and image.startswith(BASE64_STARTS) and "." not in image
    if image.startswith("data:") or is_base64:
        try:
            return base64.b64decode(image.partition(",")[2] or image)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"an image is not base64 ({error}).") from None
    return str(folder / image)


def download(address: str) -> bytes:
    """Download a URL, with up to two retries; raises `InputError`."""
    from urllib.request import urlopen

    content, waits = None, [1, 4]  # seconds before the next try
    while content is None:
        try:
            with urlopen(address, timeout=20) as answer:
                content = answer.read(MAX_DOWNLOAD + 1)
        except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
            timed_out = isinstance(getattr(error, "reason", error), TimeoutError)
            if not waits or not (timed_out or getattr(error, "code", 0) in RETRY_STATUS):
                raise InputError(f"{address}: cannot be fetched ({error}).") from None
            time.sleep(waits.pop(0))
    if len(content) > MAX_DOWNLOAD:
        limit = f"more than {MAX_DOWNLOAD // 2**20} MiB"
        raise InputError(f"{address}: {limit}; use a smaller image.")
    return content


def refuse_web_address(image: Any) -> None:
    """Raise `InputError` if the image would have to be downloaded."""
    path = image.get("path") if isinstance(image, dict) else image
    if isinstance(path, str) and path.startswith(("http://", "https://")):
        fix = "download the image, or pass --data.fetch-images."
        raise InputError(f"{path}: is a URL; {fix}")


def image_identity(image: Any) -> str:
    """A string that is equal for equal paths or equal content."""
    if isinstance(image, dict):
        image = image.get("bytes") or image["path"]
    if isinstance(image, Image.Image):
        content = f"{image.mode} {image.size} ".encode() + image.tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()
    return hash_image(image).hex() if isinstance(image, bytes) else image


TAIL = 64  # hashed bytes at the end of a compressed image, where data and checksums differ
MAX_HASHED = 1 << 12  # images up to this size in bytes are hashed whole
UNCOMPRESSED = (b"BM", b"P5", b"P6", b"II", b"MM")  # first bytes; the last pixels may be equal


class ImageHash(bytes):
    """A hash in place of the bytes of an image."""


def hash_image(content: bytes | memoryview) -> ImageHash:
    """A hash of length and last bytes, so that scanning rows does not read whole images.

    Short and uncompressed files are hashed whole. An ImageHash is returned unchanged.
    """
    if isinstance(content, ImageHash):
        return content
    is_whole = len(content) <= MAX_HASHED or bytes(content[:2]) in UNCOMPRESSED
    hashed = content if is_whole else b"%d " % len(content) + bytes(content[-TAIL:])
    return ImageHash(hashlib.blake2b(hashed, digest_size=16).digest())
