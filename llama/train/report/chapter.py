"""A chapter whose figures nobody types: between its marks stands what the report last wrote.

A mark is `<!-- report: NAME -->` on a line of its own, and what it opens ends at `<!-- end -->`. What stands outside is
a person's, and is left alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from llama.system import replacing

_BLOCK = r"(?P<open><!-- WORD: (?P<name>[\w-]+) -->\n).*?(?P<close><!-- end -->)"


def require(path: Path) -> None:
    """ValueError where there is no chapter."""
    if not path.is_file():
        raise ValueError(f"there is no chapter {path}; give a Markdown file with lines `<!-- report: NAME -->`")


def fill(path: Path, blocks: dict[str, str], word: str = "report") -> None:
    """Replaces the text of every block in a Markdown file whose mark begins with `word`.

    Raises ValueError for a name that `blocks` lacks, and where there is no block at all: the file is then unchanged.
    """
    require(path)
    text = path.read_text(encoding="utf-8")
    block = re.compile(_BLOCK.replace("WORD", re.escape(word)), re.DOTALL)
    names = [match["name"] for match in block.finditer(text)]
    unknown = sorted(set(names) - set(blocks))
    if unknown or not names:
        raise ValueError(
            f"{path} asks for {', '.join(unknown) or 'nothing'}; a block, from `<!-- {word}: NAME -->` to "
            f"`<!-- end -->`, may be {', '.join(blocks)}"
        )
    filled = block.sub(lambda match: f"{match['open']}\n{blocks[match['name']]}\n\n{match['close']}", text)
    with replacing(path) as temporary:
        temporary.write_text(filled, encoding="utf-8")
