"""`python -m toma_fx` is `toma-fx`."""

import sys

from toma_fx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
