"""``python -m statebackend``."""

from statebackend.cli import main

raise SystemExit(main())
