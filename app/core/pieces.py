"""Text that comes in pieces: what of it may yet become a certain word."""


def overlap(text: str, word: str) -> int:
    """Length of the longest proper beginning of `word` that the text ends with."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
