"""The page: always its promises (one file, nobody else asked, the API it speaks), and in a browser what one sees of it.

The tests in a browser want playwright and a Chromium; both are left out of what `make test` installs:

    pip install playwright && playwright install chromium    # or a system Chromium, such as apt-get install chromium
    pytest -m browser
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from recjax.serve.app import create_app
from recjax.serve.bundle import Bundle
from recjax.serve.page import PAGE


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(PAGE)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def ids(self) -> dict[str, str]:
        return {str(attrs["id"]): tag for tag, attrs in self.tags if "id" in attrs}


@pytest.fixture(scope="module")
def client(searcher: Any) -> Iterator[TestClient]:
    with TestClient(create_app([Bundle(searcher.path)], max_batch=1)) as client:
        yield client


def test_it_is_one_file_that_asks_its_own_server_alone(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == PAGE and len(PAGE) < 20_000
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|\beval\b|innerHTML", PAGE)
    assert all(attrs.get("href") == "data:," for tag, attrs in Tags().tags if tag == "link")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    [script] = re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["script-src"] == f"'sha256-{digest}'"


def test_every_field_has_a_label_and_every_list_a_name() -> None:
    tags = Tags()
    ids = tags.ids()
    labelled = {attrs["for"] for tag, attrs in tags.tags if tag == "label"}
    assert {name for name, tag in ids.items() if tag in ("input", "select")} == labelled
    assert all(attrs.get("aria-labelledby") in ids for tag, attrs in tags.tags if tag == "section")
    assert all(attrs.get("aria-label") for tag, attrs in tags.tags if tag == "ol" and attrs.get("class") == "results")
    assert [attrs["role"] for tag, attrs in tags.tags if tag == "p" and "id" in attrs] == ["status", "status"]
    assert ("html", {"lang": "en"}) in tags.tags and "prefers" not in PAGE and "color-scheme: light dark" in PAGE
    used = set(re.findall(r"\bat\(\"([a-z-]+)\"\)", PAGE)) | set(
        re.findall(r"fill\(\"([a-z-]+)\", \"([a-z-]+)\"", PAGE)[0]
    )
    assert used <= set(ids)


def test_the_api_gives_what_the_page_reads(client: TestClient) -> None:
    """The calls that its script makes, with the fields that it reads."""
    [model] = client.get("/v1/models").json()["models"]
    assert {"name", "max_k", "recommends", "searches", "facets"} <= set(model)
    [user, _] = client.get(f"/v1/users?model={model['name']}").json()["users"]
    ids = [item["item_id"] for item in user["history"]]
    assert all(set(item) == {"item_id", "title"} for item in user["history"])
    times = {name: value for name, value in user.items() if name != "history"}
    facet, values = next(iter(model["facets"].items()))
    for path, question in (("/v1/recommend", {"user_history": ids, **times}), ("/v1/search", {"query": "lamp"})):
        body = {**question, "k": min(10, model["max_k"]), "filter": {facet: values[0]}, "model": model["name"]}
        answer = client.post(path, json=body)
        assert answer.status_code == 200 and len(answer.json()["items"]) == 10
        assert {"item_id", "title", "score"} <= set(answer.json()["items"][0])
    refused = client.post("/v1/search", json={"query": "\u200b"})
    assert refused.status_code == 422 and refused.json()["error"]["what"]


def chromium() -> str | None:
    """A Chromium of the system; None leaves the choice to playwright."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def address(searcher: Any, exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of two models as a process."""
    command = [sys.executable, "-m", "recjax.serve", "--port", "0", "--max_batch", "1"]
    command += ["--bundle", str(searcher.path), "--bundle", str(exported.path)]
    environment = {**os.environ, "RECJAX_CACHE": str(tmp_path_factory.mktemp("cache"))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def until(page: Any, claim: str) -> None:
    """Wait for a claim to come true; unlike playwright's own waiting without eval, which the page does not allow."""
    for _ in range(1500):
        if page.evaluate(claim):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never true: {claim}")


@contextlib.contextmanager
def browsing(address: str, **options: Any) -> Iterator[Any]:
    """A page in headless Chromium that has loaded, and that must not have complained or asked anybody else."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="pip install playwright && playwright install chromium"
    )
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(**options)
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        until(page, "document.querySelectorAll('#user option').length > 1")
        yield page
        assert [text for text in said if "Failed to load" not in text] == [] and all(
            url.startswith((address, "data:")) for url in asked
        )
        browser.close()


def shown(page: Any, name: str) -> list[tuple[str, float]]:
    """Titles and scores of a list, once it is filled."""
    page.wait_for_selector(f"#{name} li")
    until(page, "![...document.querySelectorAll('.status')].some(p => p.textContent.startsWith('Asking'))")
    return [
        (line.query_selector(".title").inner_text(), float(line.query_selector(".score").inner_text()))
        for line in page.query_selector_all(f"#{name} li")
    ]


def answered(address: str, path: str, **body: Any) -> list[tuple[str, float]]:
    """The same from the API."""
    import httpx

    items = httpx.post(address + path, json=body, timeout=30).json()["items"]
    return [(item["title"] or str(item["item_id"]), round(item["score"], 3)) for item in items]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_user_and_a_query_at_phone_width(address: str, scheme: str, tmp_path: Path) -> None:
    with browsing(address, viewport={"width": 360, "height": 780}, color_scheme=scheme, has_touch=True) as page:
        page.select_option("#user", index=1)
        model = {"k": 10, "model": "searcher"}
        expected = answered(address, "/v1/recommend", user_history=["item3", "item8"], **model)
        same(shown(page, "recommended"), expected)
        page.fill("#query", "green lamp")
        page.press("#query", "Enter")
        same(shown(page, "found"), answered(address, "/v1/search", query="green lamp", **model))
        page.select_option("select[data-facet=domain]", "red")
        until(page, "[...document.querySelectorAll('.title')].every(e => e.textContent.startsWith('red'))")
        same(
            shown(page, "found"), answered(address, "/v1/search", query="green lamp", filter={"domain": "red"}, **model)
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        # Fingers need room, and eyes contrast (WCAG 2.2, 4.5 to 1).
        boxes = [e.bounding_box() for e in page.query_selector_all("select, input, button") if e.is_visible()]
        assert boxes and all(box["height"] >= 44 for box in boxes)
        for selector in ("body", ".title", ".score", ".status", "button", "h2", "label"):
            assert page.evaluate(CONTRAST, selector) >= 4.5, selector
        page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)


def same(found: list[tuple[str, float]], expected: list[tuple[str, float]]) -> None:
    assert [title for title, _ in found] == [title for title, _ in expected] and len(found) == 10
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=2e-3)


# The contrast of an element's text and the ground it stands on.
CONTRAST = """selector => {
  const lightness = rgb => {
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = rgb.match(/[0-9.]+/g).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  let element = document.querySelector(selector), ground = element;
  const clear = e => getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)';
  while (ground.parentElement && clear(ground)) ground = ground.parentElement;
  const a = lightness(getComputedStyle(element).color), b = lightness(getComputedStyle(ground).backgroundColor);
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
}"""


@pytest.mark.browser
def test_titles_are_text_by_keyboard_and_other_models_can_be_chosen(address: str) -> None:
    with browsing(address, viewport={"width": 1200, "height": 800}) as page:
        assert page.is_visible("#model")
        page.focus("#user")
        page.keyboard.press("ArrowDown")
        titles = [title for title, _ in shown(page, "recommended")]
        assert all(re.fullmatch(r"(red|blue|green|grey) \w+ <\d+>", title) for title in titles)
        boxes = [page.query_selector(f"#{name}").bounding_box() for name in ("recommend", "search")]
        assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]  # side by side
        page.click("summary")
        assert "item" not in page.inner_text("#history") and page.query_selector_all("#history li")
        page.focus("#query")
        page.keyboard.type("blue chair")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert len(shown(page, "found")) == 10
        page.select_option("#model", "decay")
        until(page, "document.querySelector('#query').disabled")
        until(page, "document.querySelectorAll('.results li').length === 0")
        assert "does not search" in page.inner_text("#query-status")
        assert "no sample users" in page.inner_text("#user-status")
        assert not page.query_selector("select[data-facet]")


@pytest.mark.browser
def test_what_the_server_refuses_is_shown(address: str) -> None:
    with browsing(address) as page:
        page.route(
            "**/v1/search",
            lambda route: route.fulfill(
                status=503, content_type="application/json", body=json.dumps({"error": {"what": "too many requests"}})
            ),
        )
        page.fill("#query", "lamp")
        page.evaluate("document.querySelector('#search-form').requestSubmit()")
        page.wait_for_selector("#query-status.wrong")
        assert page.inner_text("#query-status") == "too many requests"
