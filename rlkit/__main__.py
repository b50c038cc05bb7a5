"""`python -m rlkit` is the command `rlkit`, also for launchers: `accelerate launch -m rlkit train ...`."""

from rlkit.commands.main import main

raise SystemExit(main())
