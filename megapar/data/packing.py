"""Sequences of different lengths together in rows of one length."""

from bisect import bisect_left, insort
from collections import defaultdict, deque

import numpy as np


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of sequences by number, each row at most `capacity` tokens in all: best fit, the longest first (Johnson et
    al. 1974). A function of the lengths alone.

    lengths: int [n], each 1 to capacity
    """
    rows: list[list[int]] = []
    with_room: dict[int, deque[int]] = defaultdict(deque)  # rows by the tokens that they still take
    rooms: list[int] = []  # of which there are rows, ascending
    for number in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        length = int(lengths[number])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].popleft()
            if not with_room[room]:
                del rooms[at]
        rows[row].append(number)
        if not with_room[room - length]:
            insort(rooms, room - length)
        with_room[room - length].append(row)
    return rows
