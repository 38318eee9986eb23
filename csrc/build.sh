#!/bin/sh
# Builds csrc/ in place, into build/native of the source tree, where the "native" backend looks for it.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
cmake -S "$root" -B "$root/build/native" -DCMAKE_BUILD_TYPE=Release "$@" >/dev/null
cmake --build "$root/build/native" --parallel
