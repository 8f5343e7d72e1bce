"""`python -m precision_compiler` is the command `precision-compiler`."""

import sys

from precision_compiler.cli import main

sys.exit(main())
