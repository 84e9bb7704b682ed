"""The page at `/`: one file of HTML that asks the API of its own server and nobody else."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _script_hash() -> str:
    """What a browser compares with the script of the page before it runs it."""
    [script] = re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL)
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{_script_hash()}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}
