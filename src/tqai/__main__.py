"""`python -m tqai`."""

import sys

from tqai.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
