#!/usr/bin/env bash
# Say when the weights of a slot have changed: one line a change, on stdout.
#
#     ./watch.sh weights_metadata 0
#     ready layout=1 content=5 physical=0
#     updating layout=1 content=5 physical=0
#     ready layout=1 content=6 physical=0
#
# layout: register again; physical: register everything again, no address differs; content: the
# values are new.  "absent": there is no state file.
#
# The server replaces the state file by rename, so the directory is watched, not the file: a
# watch on the file would follow the old one.  inotifywait is in the package inotify-tools;
# without it, and on network file systems, which send no events, the loop below looks every
# INTERVAL seconds by itself.  It never reads the large layout document and takes no lock.
set -u

directory=${1:?usage: watch.sh DIRECTORY SLOT}
slot=${2:?usage: watch.sh DIRECTORY SLOT}
interval=${INTERVAL:-0.5}
state=$directory/weight_state_$slot.json

[ -d "$directory" ] || { echo "watch.sh: $directory is no directory" >&2; exit 1; }

# One number or word of the state document.  A quote inside a JSON string is escaped, so these
# patterns match keys only; the first match is the outermost.
field() { # text, key
    local value
    value=$(printf '%s\n' "$1" | grep -oE "\"$2\": *(\"[a-z]*\"|[0-9]+)" | head -n 1)
    value=${value#*:}
    value=${value//[\" ]/}
    echo "${value:-?}"
}

look() {
    local text now
    # What is no file is not waited for, nor read for ever: others may have put it there.
    if [ -f "$state" ] && text=$(head -c 65536 -- "$state" 2>/dev/null); then
        now="$(field "$text" state) layout=$(field "$text" layout_generation)"
        now+=" content=$(field "$text" content_generation)"
        now+=" physical=$(field "$text" physical_epoch)"
    else
        now=absent
    fi
    [ "$now" = "${last-}" ] || echo "$now"
    last=$now
}

# Events on descriptor 3, begun before the first look so that none falls in between.
if command -v inotifywait >/dev/null; then
    exec 3< <(exec inotifywait --monitor --quiet --format %f \
        --event moved_to --event delete -- "$directory" 2>/dev/null)
else
    exec 3< <(exec sleep infinity)
fi
watcher=$!
trap 'kill "$watcher" 2>/dev/null' EXIT
trap 'exit 0' INT TERM

look
while :; do
    # After a timeout (a status above 128) look, too.
    if read -r -t "$interval" name <&3; then
        [ "$name" = "weight_state_$slot.json" ] || continue
    elif [ $? -le 128 ]; then
        [ -d "$directory" ] || exit 1 # the watcher has ended, because the directory was removed
        sleep "$interval"
    fi
    look
done
