"""The kinds of tasks there are. Nothing registers itself: a new kind is one file and one line here."""

from __future__ import annotations

from recjax.tasks.asked_next import AskedNext
from recjax.tasks.asked_rows import AskedRows
from recjax.tasks.documents import Documents
from recjax.tasks.impressions import Impressions
from recjax.tasks.next_item import NextItem
from recjax.tasks.prompted_conversations import Conversations, Instructions
from recjax.tasks.prompted_ranking import GenreAffinity, Rated, Relevance, Stars, WatchNext
from recjax.tasks.requests import Requests
from recjax.tasks.search import Search
from recjax.tasks.work import Task

KINDS: dict[str, type[Task]] = {
    "next_item": NextItem,
    "search": Search,
    "documents": Documents,
    "impressions": Impressions,
    "asked": AskedRows,
    "asked_next": AskedNext,
    "requests": Requests,
    "conversations": Conversations,
    "instructions": Instructions,
    "like": Rated,
    "stars": Stars,
    "next": WatchNext,
    "genre": GenreAffinity,
    "relevance": Relevance,
}
