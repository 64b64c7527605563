"""Speaks sentences with one eSpeak NG voice: a process of its own for every speaker, started by voices.py.

    python data/synthetic/speaking.py < request.json > speech

The request is what voices.py makes of its arguments. The answer is a line of JSON (sample rate, number of samples of
each line), then the 16-bit samples of all lines.

Why a process: eSpeak NG keeps state from one voice to the next, so that only a fresh one gives the same bytes whatever
was spoken before. Only the standard library is imported, for a hundred such processes to start quickly.
"""

import ctypes
import json
import sys
import tempfile

# eSpeak NG's constants: AUDIO_OUTPUT_SYNCHRONOUS, espeakRATE, espeakPITCH, POS_CHARACTER, espeakCHARS_UTF8.
SYNCHRONOUS, RATE, PITCH, BY_CHARACTER, UTF8 = 2, 1, 3, 1, 1
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


def main() -> None:
    request = json.load(sys.stdin)
    library = ctypes.CDLL(request["library"])
    chunks: list[bytes] = []

    def receive(samples: int | None, count: int, events: int | None) -> int:
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = CALLBACK(receive)  # named, because the library holds no more than a pointer to it
    rate = library.espeak_Initialize(SYNCHRONOUS, 0, request["data"].encode(), 0)
    if rate <= 0:
        sys.exit(f"no eSpeak NG data in {request['data']}")
    with tempfile.NamedTemporaryFile() as file:
        file.write(request["definition"].encode())
        file.flush()
        by_file = library.espeak_ng_SetVoiceByFile, file.name
        set_voice, name = by_file if request["definition"] else (library.espeak_SetVoiceByName, request["voice"])
        if set_voice(name.encode()) != 0:
            sys.exit("there is no such voice")
    library.espeak_SetSynthCallback(callback)
    spoken = []
    for line in request["lines"]:
        chunks.clear()
        library.espeak_SetParameter(RATE, line["rate"], 0)
        library.espeak_SetParameter(PITCH, line["pitch"], 0)
        # In lower case, or some words would be spelled out as abbreviations.
        text = line["text"].lower().encode() + b"\0"
        library.espeak_Synth(text, len(text), 0, BY_CHARACTER, 0, UTF8, None, None)
        library.espeak_Synchronize()
        spoken.append(b"".join(chunks))
    head = {"rate": rate, "samples": [len(sound) // 2 for sound in spoken]}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + b"".join(spoken))


if __name__ == "__main__":
    main()
