#!/bin/sh
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

case $interval in
*[!0-9.]* | *.*.* | .) echo "watch.sh: INTERVAL is no number of seconds: $interval" >&2; exit 2 ;;
esac
# One that begins with a dash would be taken for an option.
case $directory in /*) ;; *) directory=./$directory ;; esac
[ -d "$directory" ] || { echo "watch.sh: $directory is no directory" >&2; exit 1; }
state=$directory/weight_state_$slot.json

# One word or number of the state document.  A quote inside a JSON string is escaped, so this finds
# keys only; the first one is the outermost.
field() { # text, key
    value=${1#*\""$2"\":}
    [ "$value" != "$1" ] || value=
    value=${value#"${value%%[! ]*}"} # without the spaces before it
    case $value in
    \"*) value=${value#\"}; value=${value%%\"*} ;;
    *) value=${value%%[!0-9]*} ;;
    esac
    case $value in '' | *[!a-z0-9]*) value='?' ;; esac
    printf %s "$value"
}

# What is no file is not waited for, nor read for ever: others may have put it there, also between
# the test and the opening.  The state has less than 2 KB.
look() {
    text=
    [ -f "$state" ] && text=$(timeout 5 dd if="$state" iflag=nonblock bs=4096 count=1)
    [ -n "$text" ] || { echo found absent; return; }
    echo "found $(field "$text" state) layout=$(field "$text" layout_generation)" \
        "content=$(field "$text" content_generation) physical=$(field "$text" physical_epoch)"
}

tick() {
    trap 'kill "$!" 2>/dev/null; exit' TERM
    while :; do
        sleep "$interval" >/dev/null &
        wait "$!" || exit
        echo tick
    done
}

# Everything that takes time is a process of its own, which writes lines into a pipe, so that this
# shell only ever waits in `read`: there a signal ends it at once.  It alone has the pipe open for
# reading (3), and the others for writing (4): killed, it leaves nobody who does not notice.
watcher='' ticker='' looker='' pipe=''
trap 'kill $watcher $ticker $looker 2>/dev/null; [ -z "$pipe" ] || rm -rf "$pipe"' EXIT
trap 'exit 0' HUP INT PIPE TERM
pipe=$(mktemp -d) && mkfifo "$pipe/events" && exec 3<>"$pipe/events" 4>"$pipe/events" || exit 1
rm -rf "$pipe"
pipe=

# File names are not asked for: one with a line break in it could say anything.  What it says on
# stderr is a reason to look, too: that it watches from now on.
if command -v inotifywait >/dev/null; then
    inotifywait --monitor --format changed --event moved_to --event delete -- "$directory" \
        3<&- >&4 2>&4 4>&- &
    watcher=$!
fi
tick 3<&- >&4 4>&- &
ticker=$!

last='' again=yes
while :; do
    if [ "$again" = yes ] && [ -z "$looker" ]; then
        look 3<&- >&4 4>&- 2>/dev/null &
        looker=$! again=no
    fi
    read -r what now <&3 || exit 1
    if [ "$what" = found ]; then
        looker=
        [ "$now" = "$last" ] || echo "$now" || exit 1
        last=$now
    else
        [ -d "$directory" ] || { echo "watch.sh: $directory was removed" >&2; exit 1; }
        again=yes
    fi
done
