#!/usr/bin/env bash
# Puts the hook into one Python environment.  `--help` lists the options; installer/ does the work.
set -eu

name=install_sglang_hook_patch.sh
source=${BASH_SOURCE[0]}
if [ -L "$source" ]; then source=$(readlink -f -- "$source"); fi
case $source in */*) here=${source%/*} ;; *) here=. ;; esac
here=$(CDPATH='' cd -- "$here" && pwd -P)
action=install
allowed='--check --dry-run --force'
usage='Usage: install_sglang_hook_patch.sh [--python PYTHON] [--check | --dry-run] [--force]

Installs the SGLang weight hook into the active Python environment, or upgrades it there.
Needs neither pip nor a network, and edits nothing of SGLang.

  --python PYTHON  the interpreter to install into (default: python3 on PATH)
  --check          report whether the hook is installed, intact and live; change nothing
  --dry-run        list what would be written and removed; change nothing
  --force          install even into an externally managed Python (PEP 668), over files that
                   belong to others, or behind another copy in the user site
  -h, --help       show this

Exit status: 0 done, or --check found no fault; 1 refused, or --check found a fault, with
nothing changed; 2 wrong usage.'

# shellcheck source=installer/find_python.sh
. "$here/installer/find_python.sh"
hand_over "$@"
