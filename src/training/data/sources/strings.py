"""A list of millions of strings whose memory loader processes go on sharing, however often they read it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator

# Any str survives, also one with halves of surrogate pairs, which some encodings let in.
_CODING, _ERRORS = "utf-8", "surrogatepass"


class Strings:
    """Strings that can be read by number, and appended.

    Every use of a str object writes its count of references. So a forked process that reads a list of them soon
    has a copy of all pages on which they lie. Here the characters of all lie in one piece, and a str is made when
    it is asked for.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])  # where each ends, behind a zero: string i begins where i - 1 ends
        self.extend(strings)

    def append(self, string: str) -> None:
        """Add one."""
        self._bytes += string.encode(_CODING, _ERRORS)
        self._ends.append(len(self._bytes))

    def extend(self, strings: Iterable[str]) -> None:
        """Add all of ``strings``."""
        if isinstance(strings, Strings):
            begin = len(self._bytes)
            self._bytes += strings._bytes
            self._ends.extend(begin + end for end in strings._ends[1:])
            return
        for string in strings:
            self.append(string)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:
        if not 0 <= number < len(self):
            raise IndexError(f"string {number} of {len(self)}")
        return self._bytes[self._ends[number] : self._ends[number + 1]].decode(_CODING, _ERRORS)

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(len(self)))
