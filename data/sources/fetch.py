"""Images that rows name: a path, bytes, base64 or a web address."""

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
LARGEST_DOWNLOAD = 64 * 2**20  # bytes
BUSY = (429, 500, 502, 503, 504)  # answers of servers that may have time later


def resolve_image(picture: Any, folder: Path) -> str | bytes | Image.Image:
    """What `open_image` opens: a path from the source's folder, bytes, or the image itself."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture["path"]
    if not isinstance(picture, str):
        return picture
    if picture.startswith(("http://", "https://")):
        return _download(picture)
    if picture.startswith("data:") or _is_base64(picture):
        try:
            return base64.b64decode(picture.partition(",")[2] or picture)
        except (binascii.Error, ValueError) as error:
            raise InputError(f"a picture is not base64 ({error}).") from None
    return str(folder / picture)


def _is_base64(picture: str) -> bool:
    """Whether a text is a picture, not a path: those are short, or hold a dot."""
    return len(picture) >= 64 and picture.startswith(BASE64_STARTS) and "." not in picture


def _download(address: str) -> bytes:
    from urllib.request import urlopen

    for wait in (1, 4, 0):  # seconds before another try; none after the last
        try:
            with urlopen(address, timeout=20) as answer:
                content = answer.read(LARGEST_DOWNLOAD + 1)
            break
        except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
            timed_out = isinstance(getattr(error, "reason", error), TimeoutError)
            if not wait or not (timed_out or getattr(error, "code", 0) in BUSY):
                raise InputError(f"{address}: cannot be fetched ({error}).") from None
            time.sleep(wait)
    if len(content) > LARGEST_DOWNLOAD:
        raise InputError(f"{address}: more than {LARGEST_DOWNLOAD // 2**20} MiB.")
    return content


def _refuse_address(picture: Any) -> None:
    path = picture.get("path") if isinstance(picture, dict) else picture
    if isinstance(path, str) and path.startswith(("http://", "https://")):
        raise InputError(
            f"{path} is a web address; download it, or allow that with --data.fetch-images."
        )


def _identity(picture: Any) -> str:
    """The same for the same path or content."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture["path"]
    if isinstance(picture, Image.Image):
        content = f"{picture.mode} {picture.size} ".encode() + picture.tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()
    return mark_of(picture).hex() if isinstance(picture, bytes) else picture


TAIL = 64  # bytes at the end of a picture that tell it from others: compressed data and checksums
WHOLE = 1 << 12  # pictures of up to so many bytes are told apart by all of them
PLAIN = (b"BM", b"P5", b"P6", b"II", b"MM")  # how files begin that may end in many equal pixels


class Mark(bytes):
    """What tells a picture's bytes from others."""


def mark_of(content: bytes | memoryview) -> Mark:
    """A hash of its length and its end, which alone are read; of all where that may not do."""
    if isinstance(content, Mark):
        return content
    is_whole = len(content) <= WHOLE or bytes(content[:2]) in PLAIN
    seen = content if is_whole else b"%d " % len(content) + bytes(content[-TAIL:])
    return Mark(hashlib.blake2b(seen, digest_size=16).digest())
