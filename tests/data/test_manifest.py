from __future__ import annotations

import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.audio import decode_audio, num_samples
from data.cli import DataError
from data.download import Options, download
from tests.data.made_up import flac, sound

HALF_A_SECOND = {"a.wav": "GO ON", "more/b.flac": "it's me"}


def encoded(frames: np.ndarray, rate: int, form: str, subtype: str) -> bytes:
    stream = BytesIO()
    if subtype == "FLOAT" and frames.dtype == np.int16:
        frames = frames / 32768
    soundfile.write(stream, frames, rate, format=form, subtype=subtype)
    return stream.getvalue()


def tagged(wav: bytes) -> bytes:
    """The same WAV with more tags before its samples than libsndfile's log holds."""
    tags = b"INFO" + b"ICMT" + (3000).to_bytes(4, "little") + b"b" * 3000
    return wav[:36] + b"LIST" + len(tags).to_bytes(4, "little") + tags + wav[36:]


def with_sizes(wav: bytes, size: int) -> bytes:
    """The same WAV with this size of its samples, and of all, in its header."""
    number = size.to_bytes(4, "little")
    return wav[:4] + number + wav[8:40] + number + wav[44:]


def tone(rate: int, channels: int = 1) -> np.ndarray:
    """Half a second of 500 Hz: int16 [frames, channels]."""
    wave = 8000 * np.sin(2 * np.pi * 500 * np.arange(rate // 2) / rate)
    return np.repeat(wave.astype(np.int16)[:, None], channels, axis=1)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    folder = tmp_path / "speech"
    (folder / "more").mkdir(parents=True)
    (folder / "a.wav").write_bytes(encoded(tone(16000), 16000, "WAV", "PCM_16"))
    (folder / "more" / "b.flac").write_bytes(flac(tone(44100, 2), 44100))
    lines = "".join(f"{path}\t{transcript}\n" for path, transcript in HALF_A_SECOND.items())
    (folder / "list.tsv").write_text(lines)
    return folder / "list.tsv"


@pytest.fixture
def asked(manifest: Path, tmp_path: Path) -> Options:
    return Options(corpus="manifest", manifest=manifest, dataset_dir=tmp_path / "dataset", jobs=1)


@pytest.mark.parametrize(
    ("form", "subtype", "rate", "channels"),
    [
        ("WAV", "PCM_16", 16000, 1),
        ("WAV", "PCM_U8", 8000, 1),
        ("WAV", "PCM_24", 48000, 2),
        ("WAV", "FLOAT", 44100, 2),
        ("WAV", "ULAW", 8000, 1),
        ("AIFF", "PCM_16", 22050, 1),
        ("AU", "PCM_16", 16000, 3),
        ("NIST", "PCM_16", 16000, 1),
        ("FLAC", "PCM_16", 16000, 1),
        ("FLAC", "PCM_24", 96000, 2),
        ("OGG", "VORBIS", 44100, 2),
        ("OGG", "OPUS", 48000, 1),
        ("MP3", "MPEG_LAYER_III", 44100, 2),
    ],
)
def test_every_format_becomes_16_bit_16_khz_mono_of_the_length_measured(
    tmp_path: Path, form: str, subtype: str, rate: int, channels: int
) -> None:
    file = tmp_path / "audio"
    file.write_bytes(encoded(tone(rate, channels), rate, form, subtype))
    waveform = decode_audio(file)[0]
    assert waveform.dtype == np.int16
    assert waveform.shape == (num_samples(file),) and abs(len(waveform) - 8000) <= 1
    middle = waveform[400:7600].astype(float)
    assert np.abs(np.fft.rfft(middle)).argmax() * 16000 / len(middle) == pytest.approx(500, abs=5)
    # The MP3 encoder takes a fifth of this tone, now and then a quarter: it does not repeat itself. Half is an error.
    assert middle.std() == pytest.approx(8000 / np.sqrt(2), rel=0.4)
    if (subtype, rate, channels) == ("PCM_16", 16000, 1):
        np.testing.assert_array_equal(waveform, tone(16000)[:, 0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.raw", bytes(100), "has no header that tells rate and encoding"),
        ("a.s16", bytes(100), "has no header that tells rate and encoding"),
        ("a.ul", bytes(100), "has no header that tells rate and encoding"),
        ("a.mp3", b"", r"a.mp3 is empty \(0 bytes\)"),
        ("a.wav", encoded(sound(0), 16000, "WAV", "PCM_16"), "holds no audio"),
        ("a.wav", encoded(sound(900), 1, "WAV", "PCM_16"), "has a rate of 1 Hz; from 1000 to 1000000 Hz"),
        ("a.wav", encoded(sound(900), 2_000_000_000, "WAV", "PCM_16"), "has a rate of 2000000000 Hz; from 1000 to"),
        ("a.wav", encoded(sound(9000), 16000, "WAV", "PCM_16")[:-5000], r"cut short: it has 13000 of 18000 bytes"),
        *[
            (
                f"a.{form}",
                encoded(sound(9000), 16000, form, "PCM_16")[:-5000],
                r"cut short: it has 130\d\d of 180\d\d b",
            )
            for form in ("AIFF", "AU", "NIST", "RF64", "SVX", "W64", "WAVEX")
        ],
        ("a.wav", tagged(encoded(sound(9000), 16000, "WAV", "PCM_16"))[:-5000], "cut short: it has 13000 of 18000"),
        (
            "a.wav",
            with_sizes(encoded(sound(9000), 16000, "WAV", "PCM_16"), 0),
            "not closed: its header says 0 bytes of",
        ),
        ("a.mp3", encoded(tone(44100), 44100, "MP3", "MPEG_LAYER_III")[:-900], r"cut short: it has \d+ of \d+ bytes"),
        ("a.mp3", b"\xff\xf1\x50\x80" + 5 * encoded(tone(8000), 8000, "MP3", "MPEG_LAYER_III"), "is AAC, not MP3"),
        (
            "a.wav",
            encoded(np.full((900, 1), 8000.0), 16000, "WAV", "FLOAT"),
            "8000 times full scale, after 0.00 s: int",
        ),
        ("a.wav", encoded(np.full((900, 1), np.nan), 16000, "WAV", "FLOAT"), "samples that are not finite"),
        ("a.wav", encoded(np.zeros((3650_000, 1)), 1000, "WAV", "PCM_16"), "3650 s long"),
        ("a.flac", flac(sound(9000))[:-5000], "a.flac"),
        ("a.txt", b"no audio at all", "a.txt"),
        ("a.mp3", encoded(tone(44100), 44100, "MP3", "MPEG_LAYER_III")[:100], "a.mp3"),
    ],
)
def test_audio_that_cannot_be_read_whole_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # sox or ffmpeg may make something of them
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        num_samples(tmp_path / name)
        decode_audio(tmp_path / name)


def uncounted_mp3(rate: int, channels: int, quality: float) -> bytes:
    """Half a second without the frame that counts the others, as encoders write into a pipe."""
    stream = BytesIO()
    coding = {"bitrate_mode": "CONSTANT", "compression_level": quality}
    soundfile.write(stream, tone(rate, channels), rate, format="MP3", subtype="MPEG_LAYER_III", **coding)
    content = stream.getvalue()
    assert b"Info" in content[:64]
    return content[content.index(content[:2], 64) :]


def test_an_mp3_whose_frames_differ_is_not_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # with ffmpeg it is read whole
    equal, file = uncounted_mp3(16000, 1, 0.5), tmp_path / "a.mp3"
    tagged_mp3 = b"ID3\4\0\0\0\0\0\4\xff\xe2\xff\xe2" + equal + b"TAG" + bytes(125)
    for seconds, whole in ((0.5, equal), (1.0, equal + equal), (0.5, tagged_mp3)):
        file.write_bytes(whole)
        assert num_samples(file) == len(decode_audio(file)[0]) == pytest.approx(16000 * seconds, rel=0.2)
    for other in (uncounted_mp3(16000, 2, 0.5), uncounted_mp3(44100, 1, 0.5), uncounted_mp3(16000, 1, 0.0)):
        file.write_bytes(equal + other)
        with pytest.raises(DataError, match=r"a.mp3 can be read neither by libsndfile .it would read a part of it"):
            num_samples(file)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF - 36, 0x80000000])
def test_a_placeholder_for_a_length_that_is_not_known_claims_nothing(asked: Options, manifest: Path, size: int) -> None:
    (manifest.parent / "a.wav").write_bytes(with_sizes(encoded(tone(16000), 16000, "WAV", "PCM_16"), size))
    piped = bytearray(flac(tone(16000)))
    piped[21], piped[22:42] = piped[21] & 0xF0, bytes(20)  # neither the number of samples nor their MD5
    (manifest.parent / "more" / "b.flac").write_bytes(piped)
    (train,) = download(asked).split("train")
    for index in (0, 1):
        np.testing.assert_array_equal(train.waveform(index), tone(16000)[:, 0])


def test_samples_beyond_full_scale_and_silence_are_told(
    asked: Options, manifest: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loud = np.repeat(np.array([0.5, 1.0, -1.0, 1.2, -1.3, 0.0]), 100)
    (manifest.parent / "a.wav").write_bytes(encoded(loud, 16000, "WAV", "FLOAT"))
    (manifest.parent / "more" / "b.flac").write_bytes(flac(np.concatenate([tone(16000), 200 - tone(16000)], axis=1)))
    (train,) = download(asked).split("train")
    said = capfd.readouterr().err
    assert "warning: train: 2 utterances to check:\na.wav: 200 samples were beyond full scale" in said
    assert "more/b.flac: nothing but silence; do its channels cancel each other?" in said
    assert list(train.waveform(0)[::100]) == [16384, 32767, -32768, 32767, -32768, 0]


@pytest.mark.skipif(shutil.which("sox") is None, reason="sox is not installed")
def test_what_libsndfile_does_not_know_sox_decodes(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(tone(16000), 16000, "WAV", "PCM_16"))
    name = tmp_path / "a [1]*.sox"  # which is no pattern here
    subprocess.run(["sox", str(tmp_path / "a.wav"), str(name)], check=True)
    assert num_samples(name) == 8000
    np.testing.assert_array_equal(decode_audio(name)[0], tone(16000)[:, 0])


def test_without_sox_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.sox").write_bytes(b".SoX" + bytes(100))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        DataError, match=r"a.sox can be read neither by libsndfile .* sox .not installed. .* convert it"
    ):
        num_samples(tmp_path / "a.sox")
