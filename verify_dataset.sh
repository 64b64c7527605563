#!/bin/sh
# Compares a prepared data set with its checksum; by default ./LibriSpeech_dataset. Options: --help
root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1
. "$root/environment.sh"
exec "$python" -m data.verify "$@"
