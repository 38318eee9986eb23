#!/bin/sh
# What the C checks of tests/backends/native need, from Debian's packages, where that can be had: quietly, in
# bounded time, and never a reason to fail. What is missing afterwards, the tests skip with its name.
tools="gcc libc6-dev qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross"
have() { command -v cc >/dev/null && command -v qemu-aarch64 >/dev/null && command -v aarch64-linux-gnu-gcc >/dev/null; }
have && exit 0
command -v apt-get >/dev/null && command -v timeout >/dev/null || exit 0
root=""
if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || exit 0
    root="sudo -n"
fi
export DEBIAN_FRONTEND=noninteractive
options="-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60"
{
    $root timeout 90 apt-get $options update
    $root timeout 240 apt-get $options install -y --no-install-recommends $tools
} >/dev/null 2>&1 </dev/null
have || echo "some C tools could not be installed; the tests that need them skip" >&2
exit 0
