"""Prompt lookup: what followed the last tokens when they stood in the text before may follow again.

Reading several tokens at once takes hardly longer than reading one, as long as what takes the time is to fetch the
weights from memory. So where a text repeats itself (code that is edited, names that come again) it pays to guess: the
guess is read along with the last token, and as many of its tokens are kept as the model itself would have written
(after speculative decoding, arXiv 2211.17192, with the text as the draft model: each token is drawn as ever, and when
it is the one that was guessed, the scores of the next one are there already). So the text is the same as without.
"""

from __future__ import annotations

from collections.abc import Sequence

NGRAM = 2
"""Tokens that must have stood before in the same order (docs/LOG.md compares two and three)."""
PLACES = 16
"""Where they did: so many places are looked at, the last ones."""
CONTEXT = 32
"""Tokens before them that are compared, at most."""
LONGEST_PAUSE = 16


class Lookup:
    """Guesses of one row: at most `most` tokens at a time; 0 for none.

    What is guessed is what followed where most of the tokens before agree with the last ones, and it is as long as
    they agree: where much was the same, much will be. A guess that is wrong from its first token is followed by a
    pause, at first of one step, then of twice as many, so that a text that doesn't repeat itself loses little.
    """

    def __init__(self, most: int = 0) -> None:
        if most < 0:
            raise ValueError(f"lookup is {most}; give how many tokens to guess at a time, or 0 for none")
        self._most = most
        # What followed some tokens the last time stands here; and for each place, where it did the time before, or 0.
        self._last: dict[tuple[int, ...], int] = {}
        self._earlier: list[int] = [0] * NGRAM
        self._pause = self._waiting = 0

    def guess(self, tokens: list[int]) -> list[int]:
        """What may follow `tokens`, all that the row has so far; empty where nothing is known."""
        if self._most == 0:
            return []
        for place in range(len(self._earlier), len(tokens)):
            key = tuple(tokens[place - NGRAM : place])
            self._earlier.append(self._last.get(key, 0))
            self._last[key] = place
        if self._waiting:
            self._waiting -= 1
            return []
        length, place, known = 0, 0, self._last.get(tuple(tokens[-NGRAM:]), 0)
        for _ in range(PLACES):
            if not known:
                break
            length, place = max((length, place), (_agreeing_before(tokens, known), known))
            known = self._earlier[known]
        guess: list[int] = []
        for at in range(place, place + min(length, self._most)):
            # What repeats itself up to the end is guessed to go on so: then the guess reads from itself.
            guess.append(tokens[at] if at < len(tokens) else guess[at - len(tokens)])
        return guess

    def learn(self, guessed: int, right: int) -> None:
        """How many of the last guess's tokens came true."""
        if not guessed:
            return
        self._pause = 0 if right else min(LONGEST_PAUSE, max(1, 2 * self._pause))
        self._waiting = self._pause


def _agreeing_before(tokens: list[int], place: int) -> int:
    """How many tokens before a place are the same as before the end."""
    most = min(CONTEXT, place)
    return agreeing(tokens[place - most : place][::-1], tokens[len(tokens) - most :][::-1])


def agreeing(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens are the same, from the beginning on."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
