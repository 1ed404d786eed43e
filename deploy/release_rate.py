"""How quickly blocks are released, and when it is therefore worth to come back: `Retry-After`."""

import math
from collections import deque

RELEASE_WINDOW_SECONDS = 30.0
LONGEST_RETRY_AFTER_SECONDS = 120


class ReleaseRate:
    """Blocks per second at which bookings ended, over the last RELEASE_WINDOW_SECONDS."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def observe(self, ended_blocks: int, now: float) -> None:
        """`ended_blocks` counts from the start."""
        if not self._samples or self._samples[-1][1] != ended_blocks:
            self._samples.append((now, ended_blocks))
        # The sample before the window stays: it is the count at the window's begin.
        while len(self._samples) > 1 and self._samples[1][0] <= now - RELEASE_WINDOW_SECONDS:
            self._samples.popleft()

    def per_second(self, now: float) -> float:
        if not self._samples:
            return 0.0
        begin = max(self._samples[0][0], now - RELEASE_WINDOW_SECONDS)
        released = self._samples[-1][1] - self._samples[0][1]
        return released / max(1.0, now - begin)

    def retry_after(self, blocks: int, now: float, unknown: float) -> int:
        """Seconds until so many blocks are released at the pace observed; `unknown` if none was."""
        rate = self.per_second(now)
        seconds = blocks / rate if rate > 0 else unknown
        return min(LONGEST_RETRY_AFTER_SECONDS, max(1, math.ceil(seconds)))
