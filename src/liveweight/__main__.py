"""python -m liveweight: the same as the command liveweight."""

from liveweight.cli import main

raise SystemExit(main())
