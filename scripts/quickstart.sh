#!/bin/sh
# Starts a server on SQLite in a temporary folder with the sample plugins, publishes a stream of shop events, shows what
# came of each, and stays up until Ctrl-C. QUICKSTART_EXIT=1 ends it after the table.
set -eu

tidegate=${TIDEGATE:-target/debug/tidegate}
folder=$(mktemp -d)
listen=${QUICKSTART_LISTEN:-127.0.0.1:7700}
export TIDEGATE_URL="http://$listen"
server=

stop() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    [ -z "$server" ] || wait "$server" 2>/dev/null || true
    rm -rf "$folder"
}
trap stop EXIT
trap 'exit 0' INT TERM

mkdir "$folder/plugins"
for sample in order-totals signup-guard audit-trail; do
    cp "target/plugins/$sample.wasm" "$folder/plugins/"
done

"$tidegate" serve --config examples/quickstart/tidegate.toml --listen "$listen" \
    --provider "sqlite://$folder/tidegate.db" --plugins "$folder/plugins" 2>"$folder/log" &
server=$!

tries=0
until [ "$("$tidegate" plugin list --json 2>/dev/null | grep -o '"digest"' | wc -l)" -ge 3 ]; do
    tries=$((tries + 1))
    if [ "$tries" -gt 300 ] || ! kill -0 "$server" 2>/dev/null; then
        echo "the server did not start:" >&2
        cat "$folder/log" >&2
        exit 1
    fi
    sleep 0.1
done

# Two orders are refused on purpose, and publish says so with exit code 1.
"$tidegate" publish --from examples/quickstart/events.ndjson --wait=10s >/dev/null || [ $? = 1 ]
echo
"$tidegate" events list --deliveries
echo
echo "tidegate serves $TIDEGATE_URL with events in $folder/tidegate.db. Try, in another terminal:"
echo "    export TIDEGATE_URL=$TIDEGATE_URL"
echo "    $tidegate publish shop.users.create --payload '{\"name\":\"Grace\",\"email\":\"grace@mailinator.com\"}' --wait"
echo "    $tidegate dead list"
echo "    $tidegate plugin list"

if [ "${QUICKSTART_EXIT:-0}" = 1 ]; then
    exit 0
fi
echo "Ctrl-C ends it."
wait "$server"
