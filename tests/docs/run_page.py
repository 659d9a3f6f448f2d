# SPDX-License-Identifier: Apache-2.0
"""Runs the blocks of Python of a page, from its text, in one namespace: python run_page.py < PAGE.

Blocks with >>> must give what they say, all others must run. It uses nothing but Python, so that a
page can run where nothing but the package is installed.
"""

import doctest
import re
import sys

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
UNCHECKED = "# not checked: "  # such a block begins with this, and says what it needs


def blocks(text: str) -> list[str]:
    """Return the blocks of Python of a page."""
    return [found[1] for found in BLOCK.finditer(text)]


def main() -> int:
    """Run the blocks, up to the first one that fails."""
    globs = {"__name__": "__main__"}
    for number, block in enumerate(blocks(sys.stdin.read()), 1):
        if block.startswith(UNCHECKED):
            continue
        name = f"block {number}"
        if not block.startswith(">>> "):
            exec(compile(block, name, "exec"), globs)
            continue
        test = doctest.DocTestParser().get_doctest(block, globs, name, name, 0)
        test.globs = globs  # itself, not a copy
        runner = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST)
        if runner.run(test, out=sys.stderr.write, clear_globs=False).failed:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
