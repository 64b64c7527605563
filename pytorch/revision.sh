#!/bin/sh
# Prints the commit of the code in a folder, for logs and images. Usage: sh revision.sh FOLDER
# It ends with -dirty where what is tracked, or a source that a command would run, differs from the commit. It is
# "unknown" without git, and where the nearest repository is another one, such as that of a folder around this.
root=$(CDPATH='' cd -- "$1" && pwd -P)
# shellcheck disable=SC2046 # names of variables, such as GIT_DIR, by which a hook or a shell points git elsewhere
unset $(git rev-parse --local-env-vars 2>/dev/null)

ask() {
    git -c "safe.directory=$root" -C "$root" "$@" 2>/dev/null
}

if [ "$(ask rev-parse --show-toplevel)" = "$root" ] && commit=$(ask rev-parse --verify HEAD) &&
    changes=$(ask status --porcelain --untracked-files=no) &&
    untracked=$(ask ls-files --others --exclude-standard 'data/*.py' 'pytorch/*.py' 'pytorch/*.cpp' 'tools/*.py'); then
    echo "$commit${changes:+-dirty}$([ -n "$changes" ] || echo "${untracked:+-dirty}")"
else
    echo unknown
fi
