#!/bin/sh
# Makes sure that plugins written in Rust can be built here. An installed WebAssembly target is enough; on Debian, root
# gets Debian's own packages; otherwise this says what to install. It changes nothing that is already in order.
# A compiler for C is wanted too, by tests that do without it where there is none.
set -eu

packages="rustc-web cargo-web rust-web-src lld-22"
c_packages="clang-22 lld-22 wasi-libc libclang-rt-22-dev-wasm32"

is_debian_root() {
    [ -f /etc/debian_version ] && [ "$(id -u)" -eq 0 ]
}

install() {
    echo "plugins: installing $*"
    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}

c_complete() {
    [ -x /usr/bin/clang-22 ] && [ -x /usr/bin/wasm-ld-22 ] && [ -f /usr/lib/wasm32-wasi/libc.a ] &&
        [ -f /usr/lib/llvm-22/lib/clang/22/lib/wasi/libclang_rt.builtins-wasm32.a ]
}

# shellcheck disable=SC2086 # one word per package
if ! c_complete && ! { is_debian_root && install $c_packages; }; then
    echo "plugins: no C compiler for WebAssembly: tests of the sandbox with a guest in C will be skipped" >&2
    echo "    apt-get install $c_packages        (Debian, as root)" >&2
fi

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
if is_debian_root; then
    # shellcheck disable=SC2086 # one word per package
    if install $packages; then
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
