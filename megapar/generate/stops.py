"""Texts that end where they spell one of some strings."""

from collections.abc import Callable, Sequence


class Stops:
    """Passes pieces of text on up to where the first of `strings` begins, which is left out.

    What may be the beginning of one is held back until the next piece shows. length: characters passed on
    """

    def __init__(self, strings: Sequence[str], write: Callable[[str], object]) -> None:
        self.strings, self._write, self._held = [string for string in strings if string], write, ""
        self.length, self.stopped = 0, False

    def put(self, piece: str) -> None:
        if self.stopped:
            return
        text = self._held + piece
        found = [place for string in self.strings if (place := text.find(string)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            self._pass(text[: min(found)])
            return
        held = max((self._begins(text, string) for string in self.strings), default=0)
        self._held = text[len(text) - held :]
        self._pass(text[: len(text) - held])

    def finish(self) -> None:
        """No more comes: what was held back is text."""
        self._pass(self._held)
        self._held = ""

    def _pass(self, text: str) -> None:
        self.length += len(text)
        if text:
            self._write(text)

    @staticmethod
    def _begins(text: str, string: str) -> int:
        """The most characters at the end of `text` with which `string` begins."""
        longest = min(len(string) - 1, len(text))
        return next((count for count in range(longest, 0, -1) if text.endswith(string[:count])), 0)
