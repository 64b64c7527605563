#!/bin/sh
# Builds the image that run-dev.sh runs. Usage: sh build-docker.sh [options of docker build, such as --no-cache]
# Variables: BASE_IMAGE (another base, with PyTorch; the default is in the Dockerfile), IMAGE (another name), ENGINE.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")/../.." && pwd)
. "$root/pytorch/docker/engine.sh"

commit=$(sh "$root/pytorch/revision.sh" "$root")
case "$commit" in
*-dirty) commit=$(printf %.12s "$commit")-dirty ;;
*) commit=$(printf %.12s "$commit") ;;
esac
if [ -n "${BASE_IMAGE:-}" ]; then
    set -- --build-arg "BASE_IMAGE=$BASE_IMAGE" "$@"
fi
for variable in $proxies; do # predefined arguments: they leave no trace in the image
    set -- --build-arg "$variable" "$@"
done
"$engine" build --file "$root/pytorch/docker/Dockerfile" --tag "$image" --tag "$image-$commit" \
    --build-arg "VERSION=$version" --build-arg "REVISION=$commit" "$@" "$root"
if ! id=$("$engine" image inspect --format '{{.Id}}' "$image-$commit"); then
    echo "error: built, but into another place than the engine's images: try --load, or BUILDX_BUILDER=default" >&2
    exit 1
fi
echo "Built $image and $image-$commit: $id"
