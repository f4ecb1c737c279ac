"""`python -m matvae_server` is `matvae-serve`."""

from matvae_server.cli import main

raise SystemExit(main())
