#!/bin/sh
# Serves the plugin in JavaScript that `make plugins-js` builds, publishes invoices to it, good ones and others, and ends
# with 1 unless every answer is the right one. TRY_PLUGIN names another component of the same handler.
set -eu

tidegate=${TIDEGATE:-target/debug/tidegate}
plugin=${TRY_PLUGIN:-target/plugins/invoice-lines.wasm}
folder=$(mktemp -d)
port=$(node -e 'const s = require("net").createServer().listen(0, "127.0.0.1", () => { console.log(s.address().port); s.close(); })')
export TIDEGATE_URL="http://127.0.0.1:$port"
server=

stop() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    [ -z "$server" ] || wait "$server" 2>/dev/null || true
    rm -rf "$folder"
}
trap stop EXIT
trap 'exit 1' INT TERM

mkdir "$folder/plugins"
cp "$plugin" "$folder/plugins/"
"$tidegate" serve --listen "127.0.0.1:$port" --provider "sqlite://$folder/tidegate.db" --plugins "$folder/plugins" \
    2>"$folder/log" &
server=$!

tries=0
until "$tidegate" plugin list --json 2>/dev/null | grep -q '"active_since"'; do
    tries=$((tries + 1))
    if [ "$tries" -gt 600 ] || ! kill -0 "$server" 2>/dev/null; then
        echo "the server did not start with the plugin:" >&2
        cat "$folder/log" >&2
        exit 1
    fi
    sleep 0.1
done

wrong=0
count=0

# expect PAYLOAD PART...: the record of an event with this payload holds each of these parts.
expect() {
    count=$((count + 1))
    payload=$1
    shift
    printf %s "$payload" >"$folder/payload"
    # A handler that rejects makes publish end with 1, and the record says more.
    "$tidegate" publish shop.invoices.create --id "invoice-$count" --content-type "$content_type" \
        --payload "@$folder/payload" --wait=20s >"$folder/said" 2>&1 || [ $? = 1 ] || cat "$folder/said" >&2
    "$tidegate" events get "invoice-$count" --json >"$folder/record"
    for part in "$@" '"number":1,' '"digest":"sha256:' '"peak_memory":'; do
        if ! grep -qF -- "$part" "$folder/record"; then
            printf 'wrong: no %s in the record of %s\n' "$part" "$payload" >&2
            cat "$folder/record" >&2
            wrong=1
        fi
    done
}

accepted() {
    expect "$1" '"status":"completed"' '"verdict":"ok"' "\"body\":$2" '"message":"invoice added up"' '["attempt","1"]'
}

# Rejected means at once and for good: a first attempt and no other.
rejected() {
    expect "$1" '"status":"failed","retry_count":0' '"verdict":"reject"' "\"code\":\"$2\",\"message\":\"$3" \
        '"message":"invoice rejected"'
}

content_type=application/json
accepted '{"invoice_id":"i-1","lines":[{"quantity":3,"unit_cents":450},{"quantity":1,"unit_cents":99}]}' \
    '{"invoice_id":"i-1","lines":2,"total_cents":1449}'
accepted '{"invoice_id":"Rechnung für 東京 🧾","lines":[{"quantity":1,"unit_cents":0}]}' \
    '{"invoice_id":"Rechnung für 東京 🧾","lines":1,"total_cents":0}'
rejected 'null' invalid-payload 'invoice_id must be a text'
rejected '{"invoice_id":"i-2"}' invalid-lines 'invoice i-2 has no lines'
rejected '{"invoice_id":"i-3","lines":[{"quantity":1,"unit_cents":5},{"quantity":0,"unit_cents":5}]}' invalid-lines \
    'line 2: quantity must be a whole number from 1, and is 0'
rejected '{"invoice_id":"i-4","lines":[{"quantity":1.5}]}' invalid-lines 'line 1: quantity must be a whole number'
rejected '{"invoice_id":"i-5","lines":[null]}' invalid-lines 'line 1: quantity must be a whole number from 1, and is missing'
rejected '{"invoice_id":"i-6","lines":[{"quantity":9007199254740991,"unit_cents":2}]}' invalid-lines 'the lines come to more'
content_type=text/plain
rejected '{"invoice_id":"i-7",' invalid-payload 'the payload is no JSON'
rejected "$(printf '{"invoice_id":"\377"}')" invalid-payload 'the payload is no JSON'

[ "$wrong" = 0 ] && echo "$plugin: $count invoices, every answer is right"
exit "$wrong"
