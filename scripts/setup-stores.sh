#!/bin/sh
# Makes sure that the tests of PostgreSQL can start a private server here: its programs are all that is needed, no server
# has to run. On Debian, root gets Debian's package; otherwise this says what to install. It changes nothing that is
# already in order.
set -eu

complete() {
    for folder in /usr/lib/postgresql/*/bin $(echo "$PATH" | tr ':' ' '); do
        if [ -x "$folder/initdb" ] && [ -x "$folder/postgres" ] && [ -x "$folder/pg_isready" ] && [ -x "$folder/psql" ]; then
            echo "$folder"
            return
        fi
    done
    return 1
}

if folder=$(complete); then
    echo "stores: PostgreSQL is in $folder"
    exit 0
fi
if [ -f /etc/debian_version ] && [ "$(id -u)" -eq 0 ]; then
    echo "stores: installing postgresql"
    # No server is wanted beside those that tests start for themselves.
    mkdir -p /etc/postgresql-common
    [ -f /etc/postgresql-common/createcluster.conf ] ||
        echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
    if apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends postgresql &&
        folder=$(complete); then
        echo "stores: PostgreSQL is in $folder"
        exit 0
    fi
fi
cat >&2 <<EOF
stores: no PostgreSQL is installed, and tests start private servers of it. Install its server and client programs and
run this again (14 or newer; initdb, postgres, pg_isready and psql in /usr/lib/postgresql/*/bin or on the PATH):
    apt-get install postgresql        (Debian, as root)
EOF
exit 1
