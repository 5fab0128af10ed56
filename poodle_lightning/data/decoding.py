"""One run of a decoder: what was sent, what has to come out, and whether it is sound."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from poodle_lightning.data.info import DecodeError

if TYPE_CHECKING:  # at run time it would bring torch into processes that only decode
    from poodle_lightning.ops.geometry import Size

# No frame of any codec here is shown before one that was sent more than 16 packets earlier (H.264, H.265).
_REORDER = 16
# Decoders that take "leave out what nothing is built on" for each packet anew. libdav1d (AV1) reads it once,
# when it opens, and drops such frames for good; of other decoders none was seen to leave anything out.
SKIPPING = frozenset({"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4"})


class Decoding:
    """From packets to frames in order of time. It begins at a key frame and is given up after any error.

    Args:
        context: the decoder.
        packets: from a key frame on.
        size: height and width that every frame must have.
        seconds: from a timestamp to seconds, for messages.
        guessed: timestamps are partly guessed by FFmpeg: only the order in which frames come out shows a
            wrong one, and frames left out change the guesses.

    Attributes:
        ready: frames that came out and were not yet looked at.
        latest: timestamp of the last frame that was looked at.
        emptied: the decoder has given all it held and takes no more packets.
    """

    def __init__(
        self,
        context: Any,
        packets: Iterator[Any],
        size: Size,
        seconds: Callable[[int], float],
        guessed: bool = False,
    ) -> None:
        self.ready: deque[Any] = deque()
        self.latest: int | None = None
        self.emptied = False
        self._context, self._packets, self._size = context, packets, size
        self._seconds, self._guessed = seconds, guessed
        self._ahead: deque[Any] = deque()  # read from the file, not yet sent
        self._recent: deque[int] = deque(maxlen=4 * _REORDER)  # timestamps sent
        self._due: dict[int, int] = {}  # timestamp → when it was sent
        self._sent = 0
        self._ended = False  # the last packet, which empties the decoder too, was sent
        self._damaged = False
        self._goals: deque[int] = deque()
        self._keep = True
        self._skips = context.name in SKIPPING

    @property
    def place(self) -> float | None:
        """Seconds at which the run stands, if any frame came out."""
        return None if self.latest is None else self._seconds(self.latest)

    def expect(self, ticks: Sequence[int], keep: bool) -> None:
        """Say what is wanted: the first frame from each tick on; with ``keep`` all after the last too."""
        self._goals, self._keep = deque(ticks), keep
        self._strike()

    def send(self) -> bool:
        """Send one packet; False at the end of the file.

        Raises:
            DecodeError: the packet is incomplete.
        """
        packet = self._ahead.popleft() if self._ahead else next(self._packets, None)
        if packet is None:
            return False
        if packet.is_corrupt:
            raise DecodeError("truncated", "a packet is incomplete", self.place)
        pts = packet.pts
        wanted = pts is None or bool(self._goals and pts >= self._goals[0])
        # Frames that nothing is built on need not be decoded before the one that is asked for.
        self._context.skip_frame = "NONREF" if self._skips and not wanted else "DEFAULT"
        if pts is not None and not packet.is_discard:
            self._recent.append(pts)
            if wanted:
                self._due[pts] = self._sent
        self._sent += 1
        self._ended = not packet.size
        self.ready.extend(packet.decode())
        self._strike()
        return True

    def empty(self) -> None:
        """Take out all frames that the decoder holds: cheaper than packets until it gives them by itself."""
        self.emptied = True
        if not self._ended:
            self.ready.extend(self._context.decode(None))

    def holds(self, tick: int) -> int | None:
        """Timestamp of the first frame from ``tick`` on, if it was sent and none to come is shown before."""
        first = min((pts for pts in self._recent if pts >= tick), default=None)
        if first is None or self._guessed:
            return None
        for number in range(_REORDER):
            if number == len(self._ahead):
                packet = next(self._packets, None)
                if packet is None:
                    break
                self._ahead.append(packet)
            packet = self._ahead[number]
            if packet.dts is not None and packet.dts >= first:
                break  # packets come in this order, and none is shown before its decoding time
            if packet.size and (packet.pts is None or tick <= packet.pts < first):
                return None
        return first

    def accept(self, frame: Any, tick: int) -> bool:
        """Whether this frame, the next in order of time, is the answer.

        Raises:
            DecodeError: it, or one that should have come before it, is damaged, or it has another size.
        """
        if frame.pts is None or (self.latest is not None and frame.pts <= self.latest):
            raise DecodeError("bad_timestamps", "frames without increasing timestamps", self.place)
        if frame.key_frame:
            self._damaged = False
        self._damaged = self._damaged or frame.is_corrupt
        self._due.pop(frame.pts, None)
        self.latest = frame.pts
        if frame.pts < tick:
            return False
        lost = [pts for pts in self._due if tick <= pts < frame.pts]
        if lost and not frame.interlaced_frame:  # a field may have a packet and a time of its own
            raise DecodeError("corrupt", "a frame could not be decoded", self._seconds(min(lost)))
        if self._damaged:
            raise DecodeError(
                "corrupt", "the frame, or one it is built on, is damaged", self._seconds(frame.pts)
            )
        if (frame.height, frame.width) != self._size:
            detail = f"{frame.width}×{frame.height} instead of {self._size[1]}×{self._size[0]} pixels"
            raise DecodeError("size_changed", detail, self._seconds(frame.pts))
        return True

    def built_on(self, frame: Any) -> set[int]:
        """Timestamps of later frames that were decoded before this one: it may refer to them."""
        sent = self._due.get(frame.pts, -1)
        return {pts for pts, when in self._due.items() if pts > frame.pts and when < sent}

    def check_later(self, frame: Any, later: set[int]) -> None:
        """Read on until those frames are out: only then it is known whether they are damaged.

        Raises:
            DecodeError: one of them is damaged, or does not come out.
        """
        while not self.emptied and later - {f.pts for f in self.ready} and self.send():
            pass
        found = [f for f in self.ready if f.pts in later]
        if len(found) < len(later) or any(f.is_corrupt for f in found):
            raise DecodeError("corrupt", "a frame it is built on is damaged", self._seconds(frame.pts))

    def _strike(self) -> None:
        """Cross off the ticks whose frames were sent: what follows need not be decoded for its own sake."""
        last = 1 if self._keep else 0
        while len(self._goals) > last and self.holds(self._goals[0]) is not None:
            self._goals.popleft()
