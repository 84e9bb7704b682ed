"""Words for the simulated world: names that can be pronounced, titles, descriptions and queries.

Everything is built from short lists and integers, so that text carries the hidden genre and mood of an item the way
real titles do: most of the time, and in ordinary words.
"""

from __future__ import annotations

GENRES = (
    *("mystery", "romance", "western", "fantasy", "comedy", "horror", "history", "travel", "cooking", "sports"),
    *("science", "war", "music", "nature", "family", "crime", "spy", "school", "circus", "ocean", "space", "desert"),
    *("winter", "robot", "dragon", "pirate", "detective", "ghost", "garden", "city", "island", "railway"),
)
MOODS = (
    *("quiet", "bright", "dark", "gentle", "wild", "lonely", "merry", "strange", "bitter", "golden", "hidden"),
    *("frozen", "tender", "restless", "solemn", "crooked"),
)
MAX_GENRES, MAX_MOODS, MAX_NAMES = 1000, len(MOODS), 10**6
COUNTRIES = ("Arvenia", "Belmoor", "Costara", "Dunmark", "Estwick", "Farland")
_ONSETS = ("b", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kl", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")
_TITLES = (
    "{name} and the {mood} {genre}",
    "The {mood} {genre} of {name}",
    "{name}: a {mood} {genre}",
    "{mood} {genre} in {name}",
    "The {genre} of {name}",  # not every title gives the mood away
)
_DESCRIPTIONS = (
    "A {mood} {genre} by {maker}, first seen in {year}.",
    "{maker} made this {mood} {genre} in {year}.",
    "From {maker} ({year}): {genre}, {mood} throughout.",
)


def genre_word(k: int) -> str:
    """The k-th genre: one word for the first 32, then two words."""
    n = len(GENRES)
    if k < n:
        return GENRES[k]
    step = k // n
    return f"{GENRES[(k + step) % n]} {GENRES[k % n]}"


def name(k: int) -> str:
    """The k-th invented name, different for each k below a million: three syllables, such as Velora."""
    k = (k * 611_953 + 271_828) % MAX_NAMES  # 611953 is prime to 10**6, so this is a permutation
    syllables = []
    for _ in range(3):
        k, syllable = divmod(k, 100)
        syllables.append(_ONSETS[syllable // 5] + _VOWELS[syllable % 5])
    return "".join(syllables).capitalize()


def title(pattern: int, *, name: str, mood: str, genre: str) -> str:
    """A title of one of several patterns; one in five does not name the mood."""
    text = _TITLES[pattern % len(_TITLES)].format(name=name, mood=mood.title(), genre=genre.title())
    return text


def description(pattern: int, **words: str) -> str:
    """One sentence from the words mood, genre, maker and year."""
    return _DESCRIPTIONS[pattern % len(_DESCRIPTIONS)].format(**words)
