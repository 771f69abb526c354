"""For all tests: Ctrl-C is what it is on a terminal."""

import signal

# A shell starts what runs in the background with SIGINT ignored, and every child inherits that;
# tests that send it need it as Python sets it up.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
