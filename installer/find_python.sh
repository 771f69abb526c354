# Sourced by the two scripts: reads the command line, finds the target interpreter, makes sure
# that it is one, and hands over to the Python in this directory, run by that interpreter.
#
# Expects in the caller: `name` (the script's), `here` (the checkout), `action`, `usage`, and
# `allowed` (the options that are handed on).

refuse() {
    printf '%s: %s\n' "$name" "$1" >&2
    exit "${2:-1}"
}

hand_over() {
    python=
    given=no
    # Options to hand on, as separate words; none of them holds a space.
    options=
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help)
                printf '%s\n' "$usage"
                exit 0
                ;;
            --python)
                [ $# -ge 2 ] || refuse "--python needs the path of an interpreter." 2
                python=$2
                given=yes
                shift
                ;;
            --python=*)
                python=${1#--python=}
                given=yes
                ;;
            *)
                case " $allowed " in
                    *" $1 "*) options="$options $1" ;;
                    *) refuse "unknown option $1; --help lists them." 2 ;;
                esac
                ;;
        esac
        shift
    done

    if [ "$given" = no ]; then
        python=python3
        command -v python3 >/dev/null 2>&1 ||
            refuse "there is no python3 on PATH; activate an environment, or name one with --python."
    elif [ -z "$python" ]; then
        refuse "--python needs the path of an interpreter." 2
    elif ! command -v -- "$python" >/dev/null 2>&1; then
        refuse "$python is not there or is not executable; --python takes a Python interpreter."
    fi

    # Understood by every Python since 2.0.  -S: the target's .pth files may print or fail.
    probe=$("$python" -E -S -c 'import sys
sys.stdout.write("python %s %d.%d %d" % (
    getattr(getattr(sys, "implementation", None), "name", "cpython"),
    sys.version_info[0], sys.version_info[1],
    tuple(sys.version_info[:2]) >= (3, 9)))' 2>/dev/null </dev/null) || probe=
    case $probe in
        "python cpython "*" 1") ;;
        "python "*" "*" "[01])
            # shellcheck disable=SC2086 # these are words
            set -- $probe
            refuse "$python is $2 $3, and the hook needs CPython 3.9 or later."
            ;;
        *) refuse "$python does not run as a Python interpreter." ;;
    esac

    # -I: neither the user's PYTHON* variables nor the working directory have a say.  -B: no
    # __pycache__ in this checkout.  Not -S: up to Python 3.13 a virtual environment under -S
    # takes itself for the Python that it was made from.
    # shellcheck disable=SC2086 # these are words
    exec "$python" -I -B "$here/installer" "$action" $options
}
