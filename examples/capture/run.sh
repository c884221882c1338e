#!/bin/sh
# Captures two tables of PostgreSQL, and lets plain SQL drive the sample plugin audit-trail. Needs `make plugins`, psql, and
# a database of its own, empty:
#
#     createdb capture_example
#     examples/capture/run.sh postgres://postgres@127.0.0.1/capture_example
set -eu

database=${1:?the URL of an empty database of PostgreSQL}
tidegate=${TIDEGATE:-target/debug/tidegate}
listen=${CAPTURE_LISTEN:-127.0.0.1:7701}
export TIDEGATE_URL="http://$listen"
folder=$(mktemp -d)
server=

stop() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    [ -z "$server" ] || wait "$server" 2>/dev/null || true
    rm -rf "$folder"
}
trap stop EXIT
trap 'exit 1' INT TERM

mkdir "$folder/plugins"
cp target/plugins/audit-trail.wasm "$folder/plugins/"
psql -q -v ON_ERROR_STOP=1 -f examples/capture/tables.sql "$database"
"$tidegate" migrate --provider "$database"
"$tidegate" capture install public.users --exclude password --database "$database"
"$tidegate" capture install public.orders --database "$database"
"$tidegate" capture status --database "$database"

"$tidegate" serve --listen "$listen" --provider "$database" --plugins "$folder/plugins" 2>"$folder/log" &
server=$!
tries=0
until "$tidegate" plugin list --json 2>/dev/null | grep -q '"digest"'; do
    tries=$((tries + 1))
    if [ "$tries" -gt 300 ] || ! kill -0 "$server" 2>/dev/null; then
        echo "the server did not start:" >&2
        cat "$folder/log" >&2
        exit 1
    fi
    sleep 0.1
done

psql -q -v ON_ERROR_STOP=1 -f examples/capture/writes.sql "$database" >/dev/null
# Two users, two orders, one payment, and Bob with his order: seven events, each handled.
tries=0
until [ "$("$tidegate" events list --json | grep -o '"status":"completed"' | wc -l)" -ge 7 ]; do
    tries=$((tries + 1))
    [ "$tries" -lt 300 ] || break
    sleep 0.1
done
echo
"$tidegate" events list --deliveries
