#!/bin/sh
# Makes sure that the tests can start NATS servers of their own. On Debian, root gets Debian's own package; otherwise this
# says what to install, and goes on: nothing but tests and benchmarks needs it. No server is started or enabled here.
set -eu

complete() {
    command -v nats-server >/dev/null 2>&1 && command -v setpriv >/dev/null 2>&1
}

if complete; then
    echo "nats: $(nats-server --version) is installed"
    exit 0
fi
if [ -f /etc/debian_version ] && [ "$(id -u)" -eq 0 ]; then
    echo "nats: installing nats-server"
    # The package would start a server. A policy that says no keeps it from that, and stays no longer than this script.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    apt-get update -q &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends nats-server util-linux &&
        complete && exit 0
fi
cat >&2 <<EOF
nats: no nats-server is installed. The tests of that store will fail without one (and setpriv of util-linux):
    apt-get install nats-server util-linux        (Debian, as root)
EOF
