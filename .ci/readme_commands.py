# SPDX-License-Identifier: MIT
"""Print the two set-up commands of a README, one a line: `chainrule demo` first, then the tests."""

import re
import sys
from pathlib import Path


def main(readme: str) -> int:
    text = Path(readme).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    commands = [block.strip() for block in blocks if block.startswith("python3 -m venv ")]
    ends = [command.rsplit("/", 1)[-1] for command in commands]
    if ends != ["chainrule demo", "pytest -n auto"]:
        print(f"expected two commands, `chainrule demo` and `pytest`, got {commands}", file=sys.stderr)
        return 1
    print("\n".join(commands))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
