"""What is secret in the environment does not get into texts that are kept or shown."""

import os
import re

SECRET = re.compile(r"(?i)(^|_)(key|token|secret|passwords?|passwd|pwd|credentials?|auth)(_|$)|apikey")
SHORTEST = 6  # characters of a value that is a secret and no word, such as `true`
IN_URL = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")  # user:password
HIDDEN = "[hidden]"


def redacted(text: str) -> str:
    """The text without values of variables whose names say that they are secret, and without passwords in addresses."""
    values = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return IN_URL.sub(HIDDEN, text)
