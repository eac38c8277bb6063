"""Prompt lookup: what followed the last tokens when they stood in the text before may follow again.

Reading several tokens at once takes hardly longer than reading one, as long as what takes the time is to fetch the
weights from memory. So where a text repeats itself (code that is edited, names that come again) it pays to guess: the
guess is read along with the last token, and as many of its tokens are kept as the model itself would have written
(after speculative decoding, arXiv 2211.17192, with the text as the draft model: each token is drawn as ever, and when
it is the one that was guessed, the scores of the next one are there already). So the text is the same as without.
"""

from __future__ import annotations

NGRAM = 3
"""Tokens that must have stood before in the same order. After two, more guesses are wrong than right."""
LONGEST_PAUSE = 16


class Lookup:
    """Guesses of one row: at most `most` tokens at a time; 0 for none.

    Guesses that come true get longer, up to `most`; one that is wrong from its first token is followed by a pause, at
    first of one step, then of twice as many, so that a text that doesn't repeat itself loses little.
    """

    def __init__(self, most: int = 0) -> None:
        if most < 0:
            raise ValueError(f"lookup is {most}; give how many tokens to guess at a time, or 0 for none")
        self._most = self._length = most
        self._places: dict[tuple[int, ...], int] = {}  # what followed some tokens stands here, the last time they came
        self._read = NGRAM
        self._pause = self._waiting = 0

    def guess(self, tokens: list[int]) -> list[int]:
        """What may follow `tokens`, all that the row has so far; empty where nothing is known."""
        if self._most == 0:
            return []
        for place in range(self._read, len(tokens)):
            self._places[tuple(tokens[place - NGRAM : place])] = place
        self._read = max(self._read, len(tokens))
        if self._waiting:
            self._waiting -= 1
            return []
        known = self._places.get(tuple(tokens[-NGRAM:]))
        guess: list[int] = []
        while known is not None and len(guess) < self._length:
            # What repeats itself up to the end is guessed to go on so: then the guess reads from itself.
            at = known + len(guess)
            guess.append(tokens[at] if at < len(tokens) else guess[at - len(tokens)])
        return guess

    def learn(self, guessed: int, right: int) -> None:
        """How many of the last guess's tokens came true."""
        if not guessed:
            return
        self._length = min(self._most, max(1, 2 * right))
        self._pause = 0 if right else min(LONGEST_PAUSE, max(1, 2 * self._pause))
        self._waiting = self._pause
