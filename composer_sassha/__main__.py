"""`python -m composer_sassha COMMAND ...`."""

import sys

from composer_sassha.commands import main

if __name__ == "__main__":
    sys.exit(main())
