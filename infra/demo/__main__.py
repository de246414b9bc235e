"""`python -m infra.demo` is `streamformer demo`."""

import sys

from infra.cli import main

sys.argv.insert(1, "demo")
main()
