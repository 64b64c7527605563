#!/bin/sh
# Downloads a corpus and prepares it; by default all of LibriSpeech into ./LibriSpeech_dataset. Options: --help
root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
. "$root/environment.sh"
exec "$python" -m data.download "$@"
