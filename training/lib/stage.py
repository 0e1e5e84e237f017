"""How a command ends: what a user did is answered in one line, what is broken in the code with a traceback."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, SafetensorError)
DEBUG = "BLIP_RBM_DEBUG"


def run_stage(main: Callable[[], None]) -> None:
    """Run the `main` of a command: `if __name__ == "__main__": run_stage(main)`.

    An error that a user can mend (`USER_ERRORS`) is one line on stderr and exit code 2, as argparse does; with
    BLIP_RBM_DEBUG=1 in the environment it is a traceback. Ctrl-C ends with exit code 130. All other errors are
    tracebacks.

    Args:
        main: takes no arguments, reads `sys.argv`.
    """
    name = Path(sys.argv[0]).stem
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more when it ends
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)
    except USER_ERRORS as error:
        if os.environ.get(DEBUG):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{name}: error: {message}", file=sys.stderr)
        sys.exit(2)
