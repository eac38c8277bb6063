"""What others have published, in percent, to be laid beside one's own figures: pass@1 greedy, pass@10, pass@100."""

from __future__ import annotations

from dataclasses import dataclass

_PAPER = "arXiv 2308.12950v3, table 2"
_APPENDIX = "arXiv 2308.12950v3, appendix E"
_BLOG = "huggingface.co/blog/codellama, leaderboard"


@dataclass(frozen=True)
class Published:
    benchmark: str
    model: str
    figures: dict[str, float]
    source: str
    protocol: str = "paper"


def _passes(text: str) -> dict[str, float]:
    return dict(zip(("pass@1", "pass@10", "pass@100"), map(float, text.split("/")), strict=False))


_TABLE_2 = """
Llama 2 7B | 12.2/25.2/44.4 | 20.8/41.8/65.5
Llama 2 13B | 20.1/34.8/61.2 | 27.6/48.1/69.5
Llama 2 34B | 22.6/47.0/79.5 | 33.8/56.9/77.6
Llama 2 70B | 30.5/59.4/87.0 | 45.4/66.2/83.1
Code Llama 7B | 33.5/59.6/85.9 | 41.4/66.7/82.5
Code Llama 13B | 36.0/69.4/89.8 | 47.0/71.7/87.1
Code Llama 34B | 48.8/76.8/93.0 | 55.0/76.2/86.6
Code Llama 70B | 53.0/84.6/96.2 | 62.4/81.1/91.9
Code Llama Instruct 7B | 34.8/64.3/88.1 | 44.4/65.4/76.8
Code Llama Instruct 13B | 42.7/71.6/91.6 | 49.4/71.2/84.1
Code Llama Instruct 34B | 41.5/77.2/93.5 | 57.0/74.6/85.4
Code Llama Instruct 70B | 67.8/90.3/97.3 | 62.2/79.6/89.2
Code Llama Python 7B | 38.4/70.3/90.6 | 47.6/70.3/84.8
Code Llama Python 13B | 43.3/77.4/94.1 | 49.0/74.0/87.6
Code Llama Python 34B | 53.7/82.8/94.7 | 56.2/76.4/88.2
Code Llama Python 70B | 57.3/89.3/98.4 | 65.6/81.5/91.9
"""
_INFILLING = """
Code Llama 7B | 74.1 83.3 | 48.2 50.8 | 59.7 39.0
Code Llama 13B | 75.9 85.6 | 51.0 56.1 | 63.6 41.9
"""
_MULTIPLE = """
Code Llama 7B | 28.6/34.2/24.2/33.3/25.3/12.0
Code Llama 13B | 39.1/38.0/34.2/29.6/27.3/15.2
Code Llama 34B | 47.8/45.6/44.1/33.3/30.4/17.1
Code Llama 70B | 52.8/51.9/50.9/49.1/38.0/29.1
Code Llama Instruct 7B | 31.1/30.4/28.6/32.7/21.6/10.1
Code Llama Instruct 13B | 42.2/40.5/32.3/39.0/24.0/13.9
Code Llama Instruct 34B | 45.3/43.7/36.6/40.3/31.0/19.6
Code Llama Instruct 70B | 53.4/58.2/58.4/39.0/36.7/29.7
Code Llama Python 7B | 32.3/35.4/32.3/23.9/24.7/16.5
Code Llama Python 13B | 39.1/37.3/33.5/35.2/29.8/13.9
Code Llama Python 34B | 42.2/44.9/42.9/34.3/31.7/14.6
Code Llama Python 70B | 54.7/57.6/53.4/44.0/34.8/25.3
"""
_LEADERBOARD = """
Code Llama 7B | 29.98 31.80
Code Llama 13B | 35.07 38.26
Code Llama 34B | 45.11 41.66
Code Llama Python 7B | 40.48 36.34
Code Llama Python 13B | 42.89 40.66
Code Llama Python 34B | 53.29 44.72
Code Llama Instruct 7B | 45.65 33.11
Code Llama Instruct 13B | 50.60 40.91
Code Llama Instruct 34B | 50.79 45.85
StarCoder 15B | 33.57 30.79
WizardCoder 15B | 58.12 41.91
"""


def _cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().split("\n")]


def _all() -> list[Published]:
    found = []
    for model, humaneval, mbpp in _cells(_TABLE_2):
        found.append(Published("humaneval", model, _passes(humaneval), _PAPER))
        found.append(Published("mbpp", model, _passes(mbpp), _PAPER))
    for model, *columns in _cells(_INFILLING):
        for word, column in zip(("single-line", "multi-line", "random-span"), columns, strict=True):
            for protocol, value in zip(("psm", "spm"), column.split(), strict=True):
                found.append(Published(f"infilling:{word}", model, {"pass@1": float(value)}, _APPENDIX, protocol))
    for model, column in _cells(_MULTIPLE):
        for language, value in zip(("cpp", "java", "php", "ts", "cs", "sh"), column.split("/"), strict=True):
            source = "arXiv 2308.12950v3, table 4"
            found.append(Published(f"multiple:{language}", model, {"pass@1": float(value)}, source))
    for model, column in _cells(_LEADERBOARD):
        for bench, value in zip(("humaneval", "multiple:js"), column.split(), strict=True):
            found.append(Published(bench, model, {"pass@1": float(value)}, _BLOG, "blog"))
    return found


PUBLISHED = _all()
