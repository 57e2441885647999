"""What somebody has typed, as the API takes it."""


def number(text: str) -> int | float | str:
    """What is none stays text, for the API to say so."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
