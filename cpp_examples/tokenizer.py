"""A byte-level BPE tokenizer (GPT-2's, digits one by one, as SmolLM2 wants it) and the chat template around a user's turn."""

import json
import re
import unicodedata

# Words with their leading space, runs of other signs, white space; the last blank goes to the word that follows.
WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)


def byte_letters():
    """GPT-2's printable letter for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in plain}
    others = (b for b in range(256) if b not in letters)
    letters.update({b: chr(256 + i) for i, b in enumerate(others)})
    return letters


def ascii_class(c):
    """Python's `re` knows no \\p{L}: the ASCII sign that WORDS treats alike."""
    if c.isascii():
        return c
    if c.isspace():
        return "\t"
    return {"L": "a", "N": "0"}.get(unicodedata.category(c)[0], ".")


class Tokenizer:
    def __init__(self, path):
        with open(path) as f:
            data = json.load(f)
        self.tokens = data["tokens"]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(data["merges"])}
        self.begin, self.end = self.ids[data["begin"]], self.ids[data["end"]]
        self.unknown = data["unknown"]
        self.system = data["system"]
        self.letters = byte_letters()
        self.bytes = {letter: b for b, letter in self.letters.items()}

    def chat(self, prompt):
        """Token ids of the default system turn, the user's turn and the beginning of the answer."""
        newline = self.encode("\n")
        ids = []
        for role, text in (("system", self.system), ("user", prompt)):
            ids += [self.begin, *self.encode(f"{role}\n{text}"), self.end, *newline]
        return [*ids, self.begin, *self.encode("assistant\n")]

    def encode(self, text):
        classes = "".join(map(ascii_class, text))
        ids, start = [], 0
        for piece in re.split("([0-9])", classes):  # a digit is a piece of its own
            for word in WORDS.findall(piece) if not piece.isdigit() else [piece]:
                ids += self.merge(text[start : start + len(word)])
                start += len(word)
        return ids

    def merge(self, word):
        parts = [self.letters[b] for b in word.encode()]
        while len(parts) > 1:
            rank, i = min((self.ranks.get(pair, 1 << 30), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == 1 << 30:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids.get(part, self.unknown) for part in parts]

    def decode(self, ids):
        """The text up to the end of the turn."""
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        letters = "".join(self.tokens[i] for i in ids)
        return bytes(self.bytes[c] for c in letters).decode(errors="replace")
