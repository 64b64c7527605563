from pathlib import Path

import espeakng_loader
import pytest

from data.cli import UserError
from data.synthetic.embedded import VOICES
from data.synthetic.voices import Line, speak

LINE = Line("1-1-0000", "THE KING SAID TO THE PEOPLE", rate=150, pitch=50, noise=0, seed=1)


def test_a_voice_that_does_not_exist_is_an_error_that_names_it() -> None:
    for definition in "", "language nowhere\n":
        with pytest.raises(UserError, match=r"the voice en-nowhere\+m1"):
            speak("en-nowhere+m1", [LINE], definition)


def test_every_voice_is_one_of_espeak_ng_without_breath() -> None:
    # eSpeak NG takes an unknown variant for the plain voice, and noise of breath is not the same from run to run.
    folder = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    for voice in " ".join(VOICES.values()).split():
        definition = (folder / voice).read_text(encoding="utf-8", errors="replace").splitlines()
        assert not [line for line in definition if line.strip().startswith("breath ")], voice
