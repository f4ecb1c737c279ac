"""`python -m matvae_bench` is `matvae-bench`."""

from matvae_bench.cli import main

raise SystemExit(main())
