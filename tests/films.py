"""Small films for tests of the video path, and their frames as PyAV alone decodes them."""

from fractions import Fraction

import av
import numpy as np

H, W, N, FPS = 48, 64, 60, 30


def film(count=N, height=H, width=W, seed=0):
    """Drifting coloured blocks with noise: every frame differs from every other."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3))
    base = np.kron(blocks, np.ones((8, 8, 1)))[:height, :width]
    moved = (np.roll(base, (k, 2 * k), (0, 1)) + rng.normal(0, 6, base.shape) for k in range(count))
    return [np.clip(frame, 0, 255).astype(np.uint8) for frame in moved]


def sequential(path):
    """All frames of the first video stream in order, by PyAV alone: seconds from the start, and pixels."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        clock = float(Fraction(stream.time_base.numerator, stream.time_base.denominator))
        frames = [
            (f.pts, f.rotation, f.to_ndarray(format="rgb24", interpolation="POINT"))
            for f in container.decode(stream)
        ]
        times = np.array([(pts - stream.start_time) * clock for pts, _, _ in frames])
        return times, [np.rot90(pixels, turn // 90) for _, turn, pixels in frames], clock


def remux(source, target, shift=0, **options):
    """Copy packets into another container, with timestamps moved by ``shift`` ticks."""
    with av.open(str(source)) as a, av.open(str(target), "w", options=options) as b:
        copy = b.add_stream_from_template(a.streams.video[0])
        for packet in a.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                packet.stream = copy
                b.mux(packet)
    return target
