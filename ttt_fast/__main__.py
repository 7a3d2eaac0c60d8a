"""``python -m ttt_fast`` is ``ttt-fast``."""

import sys

from ttt_fast.cli import main

sys.exit(main())
