"""What the tests of the losses share is in `losses_common`, imported by name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
