#!/bin/sh
# Makes sure that plugins written in Rust can be built here. An installed WebAssembly target is enough; on Debian, root
# gets Debian's own packages; otherwise this says what to install. It changes nothing that is already in order.
set -eu

packages="rustc-web cargo-web rust-web-src lld-22"

installed_target() {
    for target in wasm32-wasip2 wasm32-unknown-unknown; do
        folder=$(rustc --print target-libdir --target "$target" 2>/dev/null) || continue
        if [ -d "$folder" ]; then
            echo "$target"
            return
        fi
    done
    return 1
}

debian_complete() {
    [ -x /usr/bin/rustc ] && [ -x /usr/bin/cargo ] && [ -d /usr/lib/rustlib/src/rust/library/std ] &&
        ls /usr/bin/wasm-ld-[0-9]* >/dev/null 2>&1
}

if target=$(installed_target); then
    echo "plugins: $target is installed"
    exit 0
fi
if debian_complete; then
    echo "plugins: Debian's Rust for WebAssembly is installed"
    exit 0
fi
if [ -f /etc/debian_version ] && [ "$(id -u)" -eq 0 ]; then
    echo "plugins: installing $packages"
    # shellcheck disable=SC2086 # one word per package
    if apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $packages; then
        echo "plugins: done; keep ~/.cargo/bin before /usr/bin in PATH, so that the host is built by its own Rust"
        exit 0
    fi
fi
cat >&2 <<EOF
plugins: no Rust toolchain for WebAssembly is installed. Install one of these and run this again:
    rustup target add wasm32-wasip2
    apt-get install $packages        (Debian, as root)
EOF
exit 1
