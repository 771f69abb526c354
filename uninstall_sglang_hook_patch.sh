#!/usr/bin/env bash
# Takes the hook out of one Python environment.  `--help` lists the options; installer/ does the work.
set -eu

name=uninstall_sglang_hook_patch.sh
source=${BASH_SOURCE[0]}
if [ -L "$source" ]; then source=$(readlink -f -- "$source"); fi
case $source in */*) here=${source%/*} ;; *) here=. ;; esac
here=$(CDPATH='' cd -- "$here" && pwd -P)
action=uninstall
allowed='--dry-run --force'
usage='Usage: uninstall_sglang_hook_patch.sh [--python PYTHON] [--dry-run] [--force]

Removes what install_sglang_hook_patch.sh put into the active Python environment, and nothing
else.  Finishes an interrupted installation or removal.

  --python PYTHON  the interpreter to remove the hook from (default: python3 on PATH)
  --dry-run        list what would be removed; change nothing
  --force          remove files of the hook that another distribution claims too
  -h, --help       show this

Exit status: 0 removed, or there was nothing to remove; 1 refused; 2 wrong usage.'

# shellcheck source=installer/find_python.sh
. "$here/installer/find_python.sh"
hand_over "$@"
