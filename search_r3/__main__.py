"""`python -m search_r3` is `search-r3`."""

import sys

from search_r3.cli import main

sys.exit(main())
