"""`python -m recjax` is the `recjax` command."""

import sys

from recjax import cli

if __name__ == "__main__":
    sys.exit(cli.main())
