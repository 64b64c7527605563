#!/bin/sh
# Installs Chromium, in which the report is tested, where that is possible: as root, on Debian or Ubuntu.
#     sh tests/chromium.sh
# Exit status: 0 it is there, 77 it is not and the tests in the browser will be skipped.
set -eu
for name in "${CHROMIUM:-chromium}" chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null; then
        exit 0
    fi
done
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "SKIPPED, the report was NOT tested in a browser: there is no Chromium, and installing it needs root on Debian" >&2
    exit 77
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium
} >"$log" 2>&1; then
    echo "SKIPPED, the report was NOT tested in a browser: chromium could not be installed: $(tail -n 1 "$log")" >&2
    exit 77
fi
