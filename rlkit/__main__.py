"""`python -m rlkit` is the command `rlkit`."""

from rlkit.cli import main

raise SystemExit(main())
