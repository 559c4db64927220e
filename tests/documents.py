"""The code that the docs show, as it is written there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python_block(document: str, first_line: str) -> str:
    """The one block of Python in the document that begins with this line."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if block.startswith(first_line)]
    return block


def sql_blocks(document: str) -> list[str]:
    """All blocks of SQL in the document."""
    return re.findall(r"```sql\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
