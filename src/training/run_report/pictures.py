"""Small copies of pictures, for the page and the summary."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image

from training.data.decode import decode
from training.predictions import Place

_LOSSLESS = 64  # pixels up to which JPEG would be seen


def thumbnail(image: bytes | str | Image.Image, longest: int) -> bytes:
    """A small copy, whose longer side has at most ``longest`` pixels: a JPEG, or a PNG of a picture that is tiny.

    Empty where the picture cannot be decoded.
    """
    try:
        picture = decode(image)
        picture.thumbnail((longest, longest))
        file = io.BytesIO()
        picture.save(file, "png" if max(picture.size) <= _LOSSLESS else "jpeg", quality=80)
    except Exception:  # Pillow's decoders raise many kinds
        return b""
    return file.getvalue()


def data_url(image: bytes) -> str:
    """A small copy for the page; '' of none."""
    kind = "jpeg" if image.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}" if image else ""


@dataclass
class Thumbnails:
    """Small copies of the pictures of evaluation sets, read with ``read`` where they can be.

    For one page at most ``most`` are read, in ``seconds`` of work at most; later ones are missing. ``begin``
    begins another page, which keeps what it has in common with the one before.
    """

    read: Callable[[Place], bytes]
    most: int = 500
    seconds: float = 60.0
    longest: int = 112
    _made: dict[Place, bytes] = field(default_factory=dict)
    _before: dict[Place, bytes] = field(default_factory=dict)
    _late: set[Place] = field(default_factory=set)
    _spent: float = 0.0

    def begin(self) -> None:
        self._before, self._made, self._late, self._spent = self._made, {}, set(), 0.0

    def data_url(self, place: Place) -> str:
        """A small copy for the page; '' where there is none."""
        return data_url(self.small(place))

    def small(self, place: Place) -> bytes:
        """A small copy; empty where there is none."""
        place = tuple(place)
        if place not in self._made:
            if place in self._before:
                self._made[place] = self._before[place]
            elif len(self._made) >= self.most or self._spent >= self.seconds:
                self._late.add(place)
                return b""
            else:
                start = time.monotonic()
                try:
                    self._made[place] = thumbnail(self.read(place), self.longest)
                except OSError:
                    self._made[place] = b""
                self._spent += time.monotonic() - start
        return self._made[place]

    @property
    def remark(self) -> str:
        """Which pictures are missing, and why; '' where none is."""
        unread = sum(not image for image in self._made.values())
        said = []
        if unread:
            said.append(
                f"{unread:,} pictures could not be opened; they are looked for where they were when the runs were "
                "evaluated"
            )
        if self._late:
            end = "--seconds" if self._spent >= self.seconds else f"the limit of {self.most}"
            said.append(f"{len(self._late):,} pictures were not looked for because of {end}")
        return ". ".join(said)
