import sys

from aapo_fast.cli import main

sys.exit(main())
