"""Which decoders may be told packet by packet to leave out frames that nothing is built on."""

import av
import pytest
from films import FPS, film

from poodle_lightning.data.decoding import SKIPPING
from poodle_lightning.data.encode import write_video

ENCODERS = {
    "h264": ("libx264", "a.mp4"),
    "hevc": ("libx265", "a.mp4"),
    "mpeg4": ("mpeg4", "a.avi"),
    "mpeg2video": ("mpeg2video", "a.mpg"),
    "mpeg1video": ("mpeg1video", "a.mpg"),
    "libdav1d": ("libsvtav1", "a.mp4"),
}


def decoded(path, leave_out):
    """Decoder, packets by timestamp, timestamps that come out; of a packet's number: may its frame lack."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        sent, found = {}, set()
        for number, packet in enumerate(container.demux(stream)):
            sent[packet.pts] = leave_out(number)
            stream.codec_context.skip_frame = "NONREF" if leave_out(number) else "DEFAULT"
            found |= {frame.pts for frame in packet.decode()}
        return stream.codec_context.name, sent, found


@pytest.mark.parametrize("name", ENCODERS)
def test_they_obey_for_each_packet(tmp_path, name):
    codec, file = ENCODERS[name]
    write_video(tmp_path / file, film(30, 64, 96), FPS, codec=codec, gop=10, b_frames=2)
    decoder, _, everything = decoded(tmp_path / file, lambda number: False)
    assert decoder == name
    assert len(decoded(tmp_path / file, lambda number: True)[2]) < len(everything)
    _, _, rest = decoded(tmp_path / file, lambda number: number == 0)
    _, asked, mixed = decoded(tmp_path / file, lambda number: number % 2 == 0)
    wanted = {pts for pts in everything if not asked[pts]}
    obeys = rest == everything and wanted <= mixed
    assert obeys == (name in SKIPPING)


def test_all_of_them_are_tried():
    assert set(ENCODERS) > SKIPPING
