"""Run the `rlkit` command as a module, as launchers need it: `accelerate launch -m rlkit train ...`."""

from rlkit.commands.main import main

raise SystemExit(main())
