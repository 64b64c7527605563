#!/bin/sh
# Builds the image that run-dev.sh runs. Usage: sh build-docker.sh [options of docker build, such as --no-cache]
# Variables: BASE_IMAGE (another base, with PyTorch; the default is in the Dockerfile), IMAGE (another name), ENGINE.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
. "$root/pytorch/docker/engine.sh"

commit=$(git -C "$root" describe --always --dirty --abbrev=12 --exclude '*' 2>/dev/null || echo unknown)
if [ -n "${BASE_IMAGE:-}" ]; then
    set -- --build-arg "BASE_IMAGE=$BASE_IMAGE" "$@"
fi
"$engine" build --file "$root/pytorch/docker/Dockerfile" --tag "$image" --tag "$image-$commit" \
    --build-arg "VERSION=$version" --build-arg "REVISION=$commit" "$@" "$root"
echo "Built $image and $image-$commit: $("$engine" image inspect --format '{{.Id}}' "$image")"
