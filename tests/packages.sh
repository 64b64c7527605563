#!/bin/sh
# Installs what some tests need, where that is possible: as root, on Debian or Ubuntu.
#     sh tests/packages.sh
# Exit status: 0 all is there, 77 something is not and its tests will be skipped.
set -eu
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0

has() {
    command -v "$1" >/dev/null
}

install() { # what is not tested without them, packages
    untested=$1
    shift
    if [ "$(id -u)" -ne 0 ] || ! has apt-get; then
        echo "SKIPPED, $untested: there is no $*, and installing it needs root on Debian" >&2
        status=77
    elif ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
    } >"$log" 2>&1; then
        echo "SKIPPED, $untested: $* could not be installed: $(tail -n 1 "$log")" >&2
        status=77
    fi
}

has "${CHROMIUM:-chromium}" || has chromium-browser || has google-chrome || has google-chrome-stable ||
    install "the report was NOT tested in a browser" chromium
{ has aarch64-linux-gnu-g++ && has qemu-aarch64; } ||
    install "the CPU's kernels were NOT tested for ARM" g++-aarch64-linux-gnu qemu-user
has sox || install "tempo was NOT compared with sox" sox
exit "$status"
