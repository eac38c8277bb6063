"""A chapter whose figures nobody types: between its marks stands what the report last wrote.

A mark is `<!-- report: NAME -->` on a line of its own, and what it opens ends at `<!-- end -->`. What stands outside is
a person's, and is left alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from llama.system import replacing

_BLOCK = re.compile(r"(?P<open><!-- report: (?P<name>[\w-]+) -->\n).*?(?P<close><!-- end -->)", re.DOTALL)


def require(path: Path) -> None:
    """ValueError where there is no chapter."""
    if not path.is_file():
        raise ValueError(f"there is no chapter {path}; give a Markdown file with lines `<!-- report: NAME -->`")


def fill(path: Path, blocks: dict[str, str]) -> None:
    """Replaces the text of every block in a Markdown file.

    Raises ValueError for a name that `blocks` lacks, and where there is no block at all: the file is then unchanged.
    """
    require(path)
    text = path.read_text(encoding="utf-8")
    names = [match["name"] for match in _BLOCK.finditer(text)]
    unknown = sorted(set(names) - set(blocks))
    if unknown or not names:
        raise ValueError(
            f"{path} asks for {', '.join(unknown) or 'nothing'}; a block, from `<!-- report: NAME -->` to "
            f"`<!-- end -->`, may be {', '.join(blocks)}"
        )
    filled = _BLOCK.sub(lambda match: f"{match['open']}\n{blocks[match['name']]}\n\n{match['close']}", text)
    with replacing(path) as temporary:
        temporary.write_text(filled, encoding="utf-8")
