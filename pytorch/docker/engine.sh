# shellcheck shell=sh disable=SC2034,SC2154
# Sourced by the scripts beside it, which set `root` (this repository) first. Sets `engine`, docker or podman (ENGINE
# chooses), `facts` about it, `proxies`, variables to pass on, and `image`, this version's name (IMAGE names another).
engine="${ENGINE:-}"
for candidate in docker podman; do
    if [ -z "$engine" ] && command -v "$candidate" >/dev/null; then
        engine="$candidate"
    fi
done
if ! command -v "${engine:-docker}" >/dev/null; then
    echo "error: ${engine:-docker or podman} must be installed; on Debian and Ubuntu: apt-get install docker.io" >&2
    exit 1
fi
if ! facts=$("$engine" info 2>&1); then
    echo "error: '$engine info' fails: $(printf "%s\n" "$facts" | grep -v '^$' | tail -n 1)" >&2
    echo "Is its daemon running, and may you use it (group docker)?" >&2
    exit 1
fi
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$root/pyproject.toml")
# An engine's daemon does not have the caller's environment. A proxy on this machine itself needs --network host, too.
proxies='http_proxy https_proxy no_proxy all_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY ALL_PROXY'
image="${IMAGE:-deepspeech2-benchmark:$version}"
