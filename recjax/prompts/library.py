"""The templates that come with recjax: one for each kind of ranking task, and one for logs told as documents."""

from __future__ import annotations

from recjax.prompts.template import Template

DOCUMENT = Template(
    instruction=("The member's history.\n", "What one member did.\n"),
    question=("Next?",),
)
LIKE = Template(
    instruction=(
        "Decide whether the member will like an item, rating it {least} or more.\n",
        "Given what a member did, say whether an item gets a rating of at least {least}.\n",
    ),
    question=("Will the member like [{item}]? Yes or No.", "[{item}]: liked? Yes or No."),
)
STARS = Template(
    instruction=("Say how many stars the member gives an item.\n", "Foretell the member's rating.\n"),
    question=("How many stars for [{item}]?", "The member's rating of [{item}]?"),
)
NEXT = Template(
    instruction=(
        "Decide whether an item is what the member picks next.\n",
        "Given what a member did, say whether an item comes next.\n",
    ),
    question=("Is the next one [{item}]? Yes or No.", "Does [{item}] come next? Yes or No."),
)
GENRE = Template(
    instruction=(
        "Decide whether a genre is among what the member picks next.\n",
        "Given what a member did, say whether a genre comes up soon.\n",
    ),
    question=(
        "Is one of the next {horizon} a {genre}? Yes or No.",
        "Will {genre} be in the next {horizon}? Yes or No.",
    ),
)
RELEVANCE = Template(
    instruction=("Decide whether an item answers a search for: {query}\n", "A member searches for: {query}\n"),
    question=("Is [{item}] what was meant? Yes or No.", "Does [{item}] answer it? Yes or No."),
)
CONVERSATION = Template(
    instruction=("Say what the member did with each item.\n", "For each item, tell what the member did.\n"),
    question=("[{item}]",),
)
CATALOGUE = Template(
    instruction=("Answer questions about the catalogue.\n", "Questions and answers about items.\n"),
    question=("What are the {field} of {item}?", "Tell the {field}: {item}"),
)
TEMPLATES = (DOCUMENT, LIKE, STARS, NEXT, GENRE, RELEVANCE, CONVERSATION, CATALOGUE)
