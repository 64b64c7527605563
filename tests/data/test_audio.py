"""Recordings of all kinds: the same samples from each, read to its end or refused by name."""

import sys
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.audio import decode_audio, num_samples, read_blocks
from data.cli import UserError
from tests.data.made_up import encoded, flac, sound, tone, with_sizes

FORMATS = [
    ("WAV", "PCM_16", 16000, 1),
    ("WAV", "PCM_U8", 8000, 1),
    ("WAV", "PCM_24", 48000, 2),
    ("WAV", "FLOAT", 44100, 2),
    ("WAV", "ULAW", 8000, 1),
    ("RF64", "PCM_16", 16000, 1),
    ("FLAC", "PCM_16", 16000, 1),
    ("FLAC", "PCM_24", 96000, 2),
    ("AIFF", "PCM_16", 22050, 1),
    ("AIFF", "PCM_24", 16000, 2),
    ("AU", "PCM_16", 16000, 3),
    ("NIST", "PCM_16", 16000, 1),
    ("W64", "FLOAT", 16000, 1),
    ("OGG", "VORBIS", 44100, 2),
    ("OGG", "OPUS", 48000, 1),
    ("MP3", "MPEG_LAYER_III", 44100, 2),
    ("mp4", "aac", 16000, 1),
    ("matroska", "flac", 16000, 2),
    ("webm", "libopus", 48000, 1),
    ("mpegts", "aac", 16000, 1),
    ("avi", "pcm_u8", 16000, 1),
]


@pytest.fixture
def av() -> Any:
    return pytest.importorskip("av", reason="PyAV is not installed: pip install -e '.[recordings]'")


def contained(
    form: str, codec: str, tracks: list[np.ndarray], rate: int = 16000, starts: tuple[float, ...] = ()
) -> bytes:
    """A container of audio tracks [frames, channels], with the seconds in which each block of 0.1 s starts."""
    import av

    stream = BytesIO()
    with av.open(stream, "w", format=form) as container:
        layouts = ["mono" if frames.shape[1] == 1 else "stereo" for frames in tracks]
        outputs: list[Any] = [container.add_stream(codec, rate=rate, layout=layout) for layout in layouts]
        for output, layout, frames in zip(outputs, layouts, tracks, strict=True):
            for number, start in enumerate(range(0, len(frames), rate // 10)):
                part = frames[start : start + rate // 10].reshape(1, -1)
                block: Any = av.AudioFrame.from_ndarray(part, "s16", layout)
                block.sample_rate = rate
                block.pts = start + round(rate * starts[number]) if starts else start
                container.mux(output.encode(block))
            container.mux(output.encode(None))
    return stream.getvalue()


def made(form: str, subtype: str, rate: int, frames: np.ndarray) -> bytes:
    return encoded(frames, rate, form, subtype) if form.isupper() else contained(form, subtype, [frames], rate)


def written(folder: Path, content: bytes | bytearray, name: str = "recording") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def refused(file: Path, *facts: str) -> None:
    """Both commands refuse the file by name, with these facts."""
    for read in (lambda: (num_samples(file), decode_audio(file)), lambda: list(read_blocks(file))):
        with pytest.raises(UserError) as raised:
            read()
        message = str(raised.value)
        assert str(file) in message and "\n" not in message
        assert all(fact in message for fact in facts), message


@pytest.mark.parametrize(("form", "subtype", "rate", "channels"), FORMATS)
def test_every_format_becomes_16_bit_16_khz_mono_of_the_length_measured(
    tmp_path: Path, form: str, subtype: str, rate: int, channels: int, av: Any
) -> None:
    file = written(tmp_path, made(form, subtype, rate, tone(rate, channels)))
    waveform, clipped = decode_audio(file)
    assert waveform.dtype == np.int16 and clipped == 0
    assert np.array_equal(np.concatenate(list(read_blocks(file))), waveform)
    assert waveform.shape == (num_samples(file),)
    assert -50 <= len(waveform) - 8000 <= (0 if form.isupper() else 1300)  # AAC has blocks of 1,024
    middle = waveform[400:7600].astype(float)
    assert np.abs(np.fft.rfft(middle)).argmax() * 16000 / len(middle) == pytest.approx(500, abs=5)
    # The MP3 encoder takes a fifth of this tone, now and then a quarter: it does not repeat itself. Half is an error.
    assert middle.std() == pytest.approx(8000 / np.sqrt(2), rel=0.4)
    if (subtype, rate, channels) == ("PCM_16", 16000, 1):
        np.testing.assert_array_equal(waveform, tone(16000)[:, 0])


@pytest.mark.parametrize(("form", "subtype", "rate", "channels"), FORMATS)
def test_a_file_that_is_cut_short_or_damaged_in_the_middle_is_refused_by_name(
    tmp_path: Path, form: str, subtype: str, rate: int, channels: int, av: Any
) -> None:
    content = bytearray(made(form, subtype, rate, np.concatenate([tone(rate, channels)] * 6)))
    if form != "OGG":  # which does not tell, see data/README.md
        refused(written(tmp_path, content[: len(content) * 6 // 10]))
    # Samples without a code or a sum cannot tell, and lost packets of MPEG-TS are silence.
    if form == "FLAC" or not (subtype.startswith(("PCM", "pcm", "FLOAT", "ULAW")) or form == "mpegts"):
        middle, lost = len(content) // 2, 7000 if form == "MP3" else 300  # MP3 shows no loss of less than 0.1 s
        content[middle : middle + lost] = bytes(lost) if form == "MP3" else np.random.default_rng(1).bytes(lost)
        refused(written(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "0 bytes"),
        (b"no audio at all", ""),
        (sound(50_000).tobytes(), ""),
        (b"ID3\4\0\0\0\0\0\4abcdTAG" + bytes(125), ""),
        (b"#EXTM3U\n#EXTINF:5,\nwhole.wav\n", ""),
        (b"ffconcat version 1.0\nfile whole.wav\n", ""),
        (encoded(sound(0), 16000, "WAV", "PCM_16"), "holds no audio"),
        (encoded(sound(900), 1, "WAV", "PCM_16"), "rate of 1 Hz"),
        (encoded(sound(900), 2_000_000_000, "WAV", "PCM_16"), "rate of 2000000000 Hz"),
        (encoded(np.full((900, 1), 8000.0), 16000, "WAV", "FLOAT"), "8000 times full scale"),
        (encoded(np.full((900, 1), 8000.0), 16000, "W64", "FLOAT"), "8000 times full scale"),
        (encoded(np.full((900, 1), np.nan), 16000, "WAV", "FLOAT"), "samples nan"),
        (with_sizes(encoded(sound(9000), 16000, "WAV", "PCM_16"), 0), "18000 bytes behind"),
        (with_sizes(encoded(sound(9000), 16000, "WAV", "PCM_16"), 36), "17964 bytes behind"),
        (2 * encoded(sound(9000), 16000, "WAV", "PCM_16"), "18044 bytes behind"),
        (2 * encoded(sound(9000), 16000, "AIFF", "PCM_16"), "bytes behind"),
        (2 * encoded(sound(9000), 16000, "AU", "PCM_16"), "joined"),
        (2 * encoded(sound(9000), 16000, "W64", "PCM_16"), "joined"),
    ],
)
def test_what_is_no_recording_or_more_than_one_is_refused_by_name(
    tmp_path: Path, content: bytes, fact: str, av: Any
) -> None:
    written(tmp_path, encoded(tone(16000), 16000, "WAV", "PCM_16"), "whole.wav")
    refused(written(tmp_path, content, "recording.s16"), fact)


def test_an_utterance_of_more_than_an_hour_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, encoded(np.zeros((3650_000, 1)), 1000, "WAV", "PCM_16"))
    with pytest.raises(UserError, match="3650 s long"):
        num_samples(file)


def test_a_wav_of_more_than_4_gib_whose_size_has_no_room_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, with_sizes(encoded(sound(4000), 16000, "WAV", "PCM_16"), 8000))
    with file.open("r+b") as stream:
        stream.truncate((1 << 32) + 8044)  # sparse
    refused(file, "4294967296 bytes behind")


@pytest.mark.parametrize("name", ["x.raw", "x.gsm", "x.mp3", "x.txt", "[1]*.wav", "-", "x\ny.wav"])
def test_only_content_decides_the_format(tmp_path: Path, name: str) -> None:
    file = written(tmp_path, encoded(tone(16000), 16000, "WAV", "PCM_16"), name)
    np.testing.assert_array_equal(decode_audio(file)[0], tone(16000)[:, 0])


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF - 36, 0x80000000])
def test_a_placeholder_for_a_length_that_is_not_known_claims_nothing(tmp_path: Path, size: int) -> None:
    content = with_sizes(encoded(tone(16000), 16000, "WAV", "PCM_16"), size)
    np.testing.assert_array_equal(decode_audio(written(tmp_path, content))[0], tone(16000)[:, 0])


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(("form", "subtype"), [("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_streams_that_follow_each_other_are_all_read_or_refused(
    tmp_path: Path, form: str, subtype: str, repeats: int, av: Any
) -> None:
    file = written(tmp_path, repeats * encoded(tone(16000), 16000, form, subtype))
    try:
        assert num_samples(file) == pytest.approx(repeats * 8000, abs=3000)
    except UserError:
        assert repeats == 2


def test_an_mp3_whose_header_counts_its_tag_and_an_ogg_without_an_end_are_read(tmp_path: Path, av: Any) -> None:
    mp3 = bytearray(encoded(tone(16000), 16000, "MP3", "MPEG_LAYER_III"))
    at = mp3.index(b"Xing")
    mp3[at + 8 + 4 : at + 8 + 8] = (len(mp3) + 77).to_bytes(4, "big")
    assert num_samples(written(tmp_path, bytes(mp3))) == pytest.approx(8000, abs=10)
    ogg = encoded(np.concatenate([tone(16000)] * 6), 16000, "OGG", "OPUS")
    assert num_samples(written(tmp_path, ogg[: ogg.rindex(b"OggS")])) > 30_000


def test_a_title_that_is_not_utf_8_does_not_matter(tmp_path: Path, av: Any) -> None:
    aiff = encoded(tone(16000), 16000, "AIFF", "PCM_16")
    aiff = b"FORM" + (len(aiff) + 4).to_bytes(4, "big") + b"AIFFNAME\0\0\0\4caf\xe9" + aiff[12:]
    assert num_samples(written(tmp_path, aiff)) == 8000


@pytest.mark.parametrize("form", ["matroska", "mp4"])
@pytest.mark.parametrize(("before", "inside"), [(2.0, 0.0), (0.0, 3.0), (0.5, 1.0)])
def test_gaps_of_the_time_stamps_are_silence(tmp_path: Path, form: str, before: float, inside: float, av: Any) -> None:
    starts = tuple(before + (inside if number >= 10 else 0) for number in range(20))
    samples = np.full((32000, 1), 1000, dtype=np.int16)
    codec = "pcm_s16le" if form == "matroska" else "alac"
    content = contained(form, codec, [samples], starts=starts)
    waveform = decode_audio(written(tmp_path, content))[0]
    loud = np.abs(waveform.astype(int)) > 0
    assert len(waveform) == pytest.approx(32000 + 16000 * (before + inside), abs=1700)
    assert loud.sum() == pytest.approx(32000, rel=0.05)
    edges = np.flatnonzero(loud)
    assert edges[0] == pytest.approx(16000 * before, abs=1700)
    longest = max((after - one for one, after in pairwise(edges)), default=0)
    assert longest == pytest.approx(16000 * inside, abs=1700)


def test_of_several_streams_one_is_read_and_said(tmp_path: Path, av: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, contained("matroska", "flac", [np.zeros((8000, 1), np.int16), tone(16000)]))
    assert num_samples(file) == 8000
    said = capsys.readouterr().err
    assert str(file) in said and "2 audio streams" in said and said.count("\n") == 1
    assert decode_audio(file)[0].any() == ("stream 1" in said)


def test_without_pyav_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    refused(written(tmp_path, encoded(tone(16000), 16000, "MP3", "MPEG_LAYER_III")), ".[recordings]")


def test_what_comes_before_damage_is_read(tmp_path: Path) -> None:
    samples = sound(200_000)
    hole = bytearray(flac(samples))
    at = len(hole) * 3 // 4
    hole[at : at + 20] = np.random.default_rng(1).bytes(20)
    for content, share in ((bytes(hole), 0.65), (encoded(samples, 16000, "WAV", "PCM_16")[:300_000], 0.74)):
        blocks = []
        with pytest.raises(UserError, match="recording"):
            for block in read_blocks(written(tmp_path, content)):
                blocks.append(block)
        read = np.concatenate(blocks)
        assert len(read) > share * len(samples)
        np.testing.assert_array_equal(read, samples[: len(read), 0])


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_S8"])
@pytest.mark.parametrize("md5", ["right", "absent", "wrong"])
def test_a_flac_file_whose_samples_do_not_have_the_md5_of_its_header_is_an_error(
    tmp_path: Path, md5: str, subtype: str
) -> None:
    samples = sound(1000) // 256 * 256  # which 8 bits hold
    content = bytearray(flac(samples, subtype=subtype))
    content[26:42] = {"right": content[26:42], "absent": bytes(16), "wrong": bytes(15) + b"\1"}[md5]
    file = written(tmp_path, bytes(content))
    if md5 == "wrong":
        refused(file, "MD5")
    else:
        np.testing.assert_array_equal(decode_audio(file)[0], samples[:, 0])
