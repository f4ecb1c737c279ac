"""`python -m matvae_client` is `matvae`."""

import sys

from matvae_client._cli import main

sys.exit(main())
