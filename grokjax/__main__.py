"""`python -m grokjax`: the command line."""

from grokjax.cli import main

raise SystemExit(main())
