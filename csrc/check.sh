#!/bin/sh
# Builds tests/csrc/check_native.c (threads: check_threads.c) with the kernels and runs it:
#     csrc/check.sh sanitize [SEED [SECONDS]]   here, with Address- and UndefinedBehaviourSanitizer
#     csrc/check.sh threads [SEED [SECONDS]]    here, with ThreadSanitizer, in plain C: what threads share is no kernel's
#     csrc/check.sh neon [SEED [SECONDS]]       for 64-bit Arm, run by qemu-aarch64
# On Debian: apt-get install gcc qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross
set -e
mode=$1 seed=${2:-1} seconds=${3:-5}
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
common="-std=gnu11 -Wall -Wextra -Werror -ffp-contract=off -fno-math-errno -fno-trapping-math -I$root/csrc"
check=check_native
case $mode in
  threads) check=check_threads cc=${CC:-cc} run="" flags="-O2 -g -fsanitize=thread" last="" machine=plain ;;
  sanitize)
    cc=${CC:-cc} run="" flags="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all" last="" machine=$(uname -m)
    # leak checks need ptrace, which containers often forbid; every buffer is freed in check_native.c
    export ASAN_OPTIONS=detect_leaks=0
    ;;
  neon) cc=aarch64-linux-gnu-gcc run=qemu-aarch64 flags="-O2" last="-static" machine=aarch64 ;;
  *) echo "usage: $0 sanitize|threads|neon [SEED [SECONDS]]" >&2; exit 2 ;;
esac
compile() { # source, flags
  source=$1
  shift
  "$cc" $common $flags "$@" -c "$source" -o "$out/$(basename "$source").o"
}
case $machine in
  x86_64)
    define=-DTQAI_X86
    avx2="-mavx2 -mfma -mf16c"
    compile "$root/csrc/kernels_avx2.c" $avx2 &
    compile "$root/csrc/kernels_avx512.c" $avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni
    wait $!
    ;;
  aarch64 | arm64)
    define=-DTQAI_NEON
    compile "$root/csrc/kernels_neon.c"
    ;;
  *) define= ;;
esac
for name in attend dispatch history pages pool query spread kernels_scalar; do compile "$root/csrc/$name.c" $define; done
compile "$root/tests/csrc/$check.c"
"$cc" $flags $last "$out"/*.o -lm -lpthread -o "$out/check"
$run "$out/check" "$seed" "$seconds"
