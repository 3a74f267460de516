"""`python -m chunkdist.cli`."""

import sys

from chunkdist.cli.main import main

sys.exit(main())
