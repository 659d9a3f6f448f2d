# SPDX-License-Identifier: Apache-2.0
"""Makes `python tests/fuzz` run the fuzzers."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.fuzz.command import main  # noqa: E402

sys.exit(main())
