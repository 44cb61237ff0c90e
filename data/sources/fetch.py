"""Images that rows refer to: a path, bytes, base64 or a web address; and what identifies them."""

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
RETRY_STATUS = (429, 500, 502, 503, 504)  # HTTP status of servers that may answer later


def resolve_image(image: Any, folder: Path) -> str | bytes | Image.Image:
    """The image of a row as `open_image` takes it, downloaded if need be; raises `InputError`."""
    if isinstance(image, dict):
        image = image.get("bytes") or image["path"]
    if not isinstance(image, str):
        return image
    if image.startswith(("http://", "https://")):
        return download(image)
    # Paths are short, or hold a dot.
    is_base64 = len(image) >= 64 and image.startswith(BASE64_STARTS) and "." not in image
    if image.startswith("data:") or is_base64:
        try:
            return base64.b64decode(image.partition(",")[2] or image)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"an image is not base64 ({error}).") from None
    return str(folder / image)


def download(address: str) -> bytes:
    """The bytes of a web address, after up to two retries; raises `InputError`."""
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
        raise InputError(f"{address}: more than {MAX_DOWNLOAD // 2**20} MiB.")
    return content


def refuse_web_address(image: Any) -> None:
    """Raise `InputError` if the image would have to be downloaded."""
    path = image.get("path") if isinstance(image, dict) else image
    if isinstance(path, str) and path.startswith(("http://", "https://")):
        says = "is a web address; download it, or allow that with --data.fetch-images."
        raise InputError(f"{path} {says}")


def image_identity(image: Any) -> str:
    """A text that is equal for the same path or the same content."""
    if isinstance(image, dict):
        image = image.get("bytes") or image["path"]
    if isinstance(image, Image.Image):
        content = f"{image.mode} {image.size} ".encode() + image.tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()
    return hash_image(image).hex() if isinstance(image, bytes) else image


TAIL = 64  # bytes hashed at the end of a compressed image: its data and checksums differ there
MAX_HASHED = 1 << 12  # images of up to so many bytes are hashed whole
UNCOMPRESSED = (b"BM", b"P5", b"P6", b"II", b"MM")  # first bytes; may end in equal pixels


class ImageHash(bytes):
    """A hash that stands for the bytes of an image."""


def hash_image(content: bytes | memoryview) -> ImageHash:
    """A hash of length and last bytes, so that scanning rows need not read whole images.

    Short and uncompressed files are hashed whole. A hash is returned as it is.
    """
    if isinstance(content, ImageHash):
        return content
    is_whole = len(content) <= MAX_HASHED or bytes(content[:2]) in UNCOMPRESSED
    hashed = content if is_whole else b"%d " % len(content) + bytes(content[-TAIL:])
    return ImageHash(hashlib.blake2b(hashed, digest_size=16).digest())
