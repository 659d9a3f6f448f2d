# SPDX-License-Identifier: Apache-2.0
"""The page of a map in a browser: what it shows is its data, by mouse and by keyboard.

Opens the pages of fastattn.maps in Chromium, without a window and without a network.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from fastattn import maps
from fastattn.maps import _html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
WORDS = ["Yesterday", "evening", "Ivan", "came", "home", "early", "because", "he", "was", "tired"]
IVAN, HE = WORDS.index("Ivan"), WORDS.index("he")
LAYERS, HEADS = [3, 9, 16], [0, 1, 5, 8]
HOSTILE = [
    "</script><script>document.title = 'broken'</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "{{data}}",
    "&lt;",
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f600\U0001f469\u200d\U0001f467",
    "\ud800",
    "\x00",
    "",
    "\n",
    "x" * 10_000,
]

Open = Callable[..., AbstractContextManager[Page]]


def causal_weights() -> np.ndarray:
    """Weights of 17 layers; in layer 16, head 5, "he" looks at "Ivan" more than anywhere else."""
    rng = np.random.default_rng(0)
    weights = rng.random((17, 9, len(WORDS), len(WORDS))) ** 4
    weights[..., 0] += 2
    weights = np.tril(weights)
    weights[16, 5, HE, : HE + 1] = 0.01
    weights[16, 5, HE, [0, IVAN]] = 0.26, 0.68
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


WEIGHTS = causal_weights()
SHOWN = WEIGHTS[np.ix_(LAYERS, HEADS)]


def map_data(**others: Any) -> dict[str, Any]:
    """Return what the page of some heads is given."""
    check = {"text": "A map is not a cause.", "code": "model.ablate([({layer}, {head})])"}
    shown = maps.show(WEIGHTS, WORDS, layers=LAYERS, heads=HEADS, word="he")
    return shown.data() | {"check": check} | others


def percent(share: float) -> str:
    """Return a share as the page shows one of 0.5 % or more."""
    return f"{int(100 * share + 0.5)} %"


def listed(page: Page, place: str) -> list[str]:
    """Return the lines of a list: what is linked, and its share."""
    return [" ".join(text.split()) for text in page.locator(f"{place} li").all_inner_texts()]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Open:
    """Open data as a page; fail where the page reports an error or asks for anything."""

    @contextmanager
    def opened(data: dict[str, Any], **options: Any) -> Iterator[Page]:
        path = tmp_path / "map.html"
        path.write_text(_html.page(data), "utf-8")
        said, asked = [], []
        context = browser.new_context(**options)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("[data-ready]", state="attached")
        yield page
        context.close()
        assert said == []
        assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [path.as_uri()]

    return opened


@needs_chromium
def test_the_strongest_head_of_the_word_is_shown_first(opened: Open) -> None:
    with opened(map_data()) as page:
        expect(page.locator("#head-title")).to_have_text("Layer 16, head 5")
        assert listed(page, "#links")[0] == "Ivan 68 %"
        assert "Apart: “Yesterday” 26 %" in page.inner_text("#links")
        links = maps.show(WEIGHTS, WORDS, layers=LAYERS, heads=HEADS, word="he").links()
        assert len(links) == HE - 1  # each word before it but the first
        assert listed(page, "#ranking") == [
            f"layer {link.layer}, head {link.head} → {link.key} {percent(link.share)}"
            for link in links
        ]
        assert page.inner_text("#code") == "model.ablate([(16, 5)])"


@needs_chromium
def test_a_word_that_is_hovered_shows_its_links(opened: Open) -> None:
    with opened(map_data()) as page:
        for query, word in enumerate(WORDS):
            page.locator("#queries button").nth(query).hover()
            expect(page.locator("#links h2")).to_have_text(f"“{word}” looks at")
            row = SHOWN[2, 2, query]
            order = [k for k in np.argsort(-row) if k not in (0, query) and row[k] >= 0.005][:8]
            found = listed(page, "#links")
            assert sorted(found) == sorted(f"{WORDS[k]} {percent(row[k])}" for k in order)
            assert len(found) < 2 or found[0] == f"{WORDS[order[0]]} {percent(row[order[0]])}"
        page.locator("#keys button").nth(IVAN).hover()
        expect(page.locator("#links h2")).to_have_text("“Ivan” is looked at by")
        assert listed(page, "#links")[0] == "he 68 %"
        page.mouse.move(0, 0)
        expect(page.locator("#links h2")).to_have_text("“he” looks at")


@needs_chromium
def test_a_head_is_chosen_in_the_overview_the_layer_and_the_ranking(opened: Open) -> None:
    with opened(map_data()) as page:
        page.locator("#cells button").nth(5).click()
        expect(page.locator("#head-title")).to_have_text("Layer 9, head 1")
        expect(page.locator("#layer-title")).to_have_text("Maps of layer 9")
        page.locator("#maps button").nth(3).click()
        expect(page.locator("#head-title")).to_have_text("Layer 9, head 8")
        expect(page.locator("#sink")).to_contain_text(
            f"In layer 9, head 8: {percent(round(float(SHOWN[1, 3, 1:, 0].mean()), 3))}"
        )
        page.locator("#ranking button").first.click()
        expect(page.locator("#head-title")).to_have_text("Layer 16, head 5")
        assert page.locator("[aria-pressed=true] > canvas").count() == 2  # overview and layer
        page.get_by_role("button", name="Maps").click()
        cell = page.locator("#cells canvas").nth(10)
        assert cell.evaluate("canvas => [canvas.width, canvas.height]") == [len(WORDS)] * 2


@needs_chromium
def test_heads_are_ranked_for_two_words(opened: Open) -> None:
    with opened(map_data()) as page:
        page.locator("#keys button").nth(IVAN).click()
        expect(page.locator("#ranking h3")).to_have_text("Heads that link “he” to “Ivan”")
        shares = np.sort(SHOWN[:, :, HE, IVAN].ravel())[::-1]
        assert [line.split("Ivan ")[1] for line in listed(page, "#ranking")] == [
            percent(share) for share in shares[shares >= 0.005][:10]
        ]


@needs_chromium
def test_the_sink_is_hidden_visibly_until_it_is_asked_for(opened: Open) -> None:
    with opened(map_data()) as page:
        sink = page.locator("#sink")
        strong = page.locator("#lines path[stroke-width]")
        canvas, picture = page.locator("#maps canvas").nth(2), "canvas => canvas.toDataURL()"
        hidden, lines = canvas.evaluate(picture), strong.count()
        expect(sink).to_contain_text(
            f"{percent(SHOWN[:, :, 1:, 0].mean())} of the attention goes to the first token"
        )
        expect(sink).to_contain_text("hidden in the pictures; S shows it")
        page.keyboard.press("s")
        expect(sink).to_contain_text("shown in the pictures; S hides it")
        assert strong.count() == lines + 1
        assert canvas.evaluate(picture) != hidden
        page.click("#toggle")
        expect(sink).to_contain_text("hidden in the pictures; S shows it")
        expect(page.locator("#toggle")).to_be_focused()
        assert strong.count() == lines
        assert canvas.evaluate(picture) == hidden


@needs_chromium
def test_the_keyboard_reaches_everything(opened: Open) -> None:
    with opened(map_data()) as page:
        stops = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            place = page.evaluate("document.activeElement.closest('[id]')?.id ?? ''")
            stops.add(place)
            if place == "cells":
                page.keyboard.press("ArrowUp")
                expect(page.locator("#head-title")).to_have_text("Layer 9, head 5")
                page.keyboard.press("ArrowRight")
                expect(page.locator("#head-title")).to_have_text("Layer 9, head 8")
            elif place == "queries":
                page.keyboard.press("ArrowDown")
                expect(page.locator("#links h2")).to_have_text("“was” looks at")
                page.keyboard.press("End")
                expect(page.locator("#links h2")).to_have_text("“tired” looks at")
            elif place == "code":
                break
        boxes = {"cells", "queries", "keys", "ranking", "maps"}  # one stop each; of a list, many
        assert stops == boxes | {"toggle", "pictures", "strongest", "code"}
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"


@needs_chromium
def test_two_texts_and_generated_words_are_the_same_view(opened: Open) -> None:
    french = ["hier", "soir", "Ivan", "rentra"]
    rng = np.random.default_rng(1)
    cross = rng.dirichlet(np.ones(len(WORDS)), (1, 1, len(french))).astype(np.float32)
    data = maps.show(cross, french, WORDS, word="rentra").data()
    with opened(data) as page:
        expect(page.locator("#head-title")).to_have_text("Layer 0, head 0")
        best = int(cross[0, 0, 3].argmax())
        assert listed(page, "#links")[0] == f"{WORDS[best]} {percent(cross[0, 0, 3, best])}"
        expect(page.locator("#overview")).to_be_hidden()
        expect(page.locator("#sink")).to_be_empty()
    generated = {"queries": WORDS[-4:], "positions": [6, 7, 8, 9], "generated": 2, "word": 1}
    data = map_data(weights=_html.pack(SHOWN[:, :, -4:]), **generated)
    with opened(data) as page:
        assert listed(page, "#links")[0] == "Ivan 68 %"
        expect(page.locator("#head-title")).to_contain_text("new words stand below the line")
        page.locator("#queries button").nth(1).focus()
        page.keyboard.press("End")
        expect(page.locator("#links h2")).to_have_text("“tired” looks at")


@needs_chromium
def test_a_text_may_hold_anything(opened: Open) -> None:
    count = len(HOSTILE)
    weights = np.full((1, 2, count, count), 1 / count, np.float32)
    data = map_data(
        title=HOSTILE[0] * 200,
        sink={"text": HOSTILE[2], "shares": [[0, 0]]},
        queries=HOSTILE,
        keys=HOSTILE,
        positions=list(range(count)),
        causal=False,
        layers=[0],
        heads=[0, 1],
        weights=_html.pack(weights),
        word=0,
        layer=0,
        head=0,
    )
    with opened(data, viewport={"width": 400, "height": 800}) as page:
        shown = page.locator("#queries bdi").all_inner_texts()
        assert shown[:7] == HOSTILE[:7]
        assert shown[-2] == "↵"
        assert len(shown[-1]) < 100
        assert page.title().startswith("</script><script>")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        for button in page.locator("#queries button").all():
            button.click()


@needs_chromium
def test_light_dark_and_narrow(opened: Open) -> None:
    looks = {}
    for scheme in ("light", "dark"):
        size = {"width": 400, "height": 700}
        with opened(map_data(), color_scheme=scheme, viewport=size) as page:
            looks[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
            picture = "canvas => canvas.toDataURL()"
            before = page.locator("#maps canvas").first.evaluate(picture)
            page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
            changed = "before => document.querySelector('#maps canvas').toDataURL() !== before"
            page.wait_for_function(changed, arg=before)
    assert looks["light"] != looks["dark"]


@needs_chromium
def test_shares_that_are_left_out_are_said(opened: Open) -> None:
    packed = _html.pack(SHOWN, budget=400)
    assert packed["floor"] > 0.01
    with opened(map_data(weights=packed)) as page:
        expect(page.locator("#floor")).to_contain_text(f"below {percent(packed['floor'])}")
        assert listed(page, "#links") == ["Ivan 68 %"]


def long_map(count: int, heads: int = 1, **options: Any) -> maps.LongMap:
    """Return a map of a long text, in which no word looks at all others alike."""
    query, key = np.random.default_rng(2).standard_normal((2, heads, count, 16), np.float32)
    return maps.pyramid(2 * query, key, [f" w{i}" for i in range(count)], **options)


@needs_chromium
def test_a_long_text_is_zoomed_from_chapters_to_words(opened: Open) -> None:
    sizes = {"chapters": 600, "pages": 100, "paragraphs": 20}
    levels = {name: np.arange(0, 6000, size) for name, size in sizes.items()}
    shown = long_map(6000, heads=2, levels=levels, layers=[16, 16])
    check = {"text": "A map is not a cause.", "code": "model.ablate([({layer}, {head})])"}
    with opened(shown.data() | {"check": check}) as page:
        crumbs, says = page.locator("#crumbs"), page.locator("#says")
        expect(says).to_contain_text("of chapter 10 (words 5,401\u20136,000) goes to chapter")
        page.focus("#plane")
        page.keyboard.press("ArrowUp")
        expect(says).to_contain_text("of chapter 9 (words 4,801\u20135,400) goes to")
        box = page.locator("#plane").bounding_box()
        assert box is not None
        middle = {"x": 0.25 * box["width"], "y": 0.45 * box["height"]}  # of columns 3, of rows 5
        page.locator("#plane").click(position=middle)
        expect(crumbs).to_contain_text("chapter 5 → chapter 3")
        page.keyboard.press("-")
        chapters = shown.levels[0].shares[0, 4]  # column 0 is the first token
        expect(says).to_contain_text(f"{percent(chapters[3])} of the attention of chapter 5")
        assert [line.split(") ")[1] for line in listed(page, "#links")] == [
            percent(share) for share in np.sort(chapters[1:6])[::-1]
        ]
        page.wait_for_timeout(400)  # what turns the wheel sooner is the same turn
        page.locator("#plane").hover(position=middle)
        page.mouse.wheel(0, -100)
        expect(crumbs).to_contain_text("chapter 5 → chapter 3")
        page.focus("#plane")
        page.keyboard.press("+")
        page.keyboard.press("Enter")
        expect(crumbs.locator("button")).to_have_count(4)
        expect(crumbs).to_contain_text("words")
        word = page.locator("#passage [aria-pressed=true]")
        query = int(word.inner_text()[1:])
        assert 2400 <= query < 3000
        assert listed(page, "#links") == [
            f"“w{key}” (word {key + 1:,}) {percent(share)}"
            for key, share in zip(
                shown.top_keys[0, query].tolist(), shown.top_weights[0, query], strict=True
            )
        ]
        word.focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#links h2")).to_have_text(f"“w{query + 1}” looks most at")
        page.focus("#plane")
        page.keyboard.press("-")
        page.locator("#out").click()
        page.hover("#plane")
        page.wait_for_timeout(400)
        page.mouse.wheel(0, 100)
        expect(crumbs.locator("button")).to_have_count(1)
        expect(page.locator("#out")).to_be_disabled()
        page.keyboard.press("s")
        expect(page.locator("#sink")).to_contain_text("shown in the pictures")
        page.locator("#heads button").nth(1).click()
        expect(page.locator("#code")).to_have_text("model.ablate([(16, 1)])")


@needs_chromium
def test_a_text_of_a_hundred_thousand_words_opens(opened: Open) -> None:
    shown = long_map(100_000, window=(256, 0))
    assert len(shown.html().encode()) < _html.PYRAMID_BOUND
    with opened(shown.data(), viewport={"width": 400, "height": 800}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        for _ in range(3):
            page.locator("#in").click()
        expect(page.locator("#in")).to_be_disabled()
        expect(page.locator("#passage button")).not_to_have_count(0)


def test_a_page_is_bounded_and_says_what_to_leave_out() -> None:
    with pytest.raises(ValueError, match=r"12 heads of 10 x 10 words .* at most \d+ heads"):
        _html.pack(SHOWN, budget=150)
    with pytest.raises(ValueError, match=r"shares, above 100,000,000"):
        _html.pack(np.broadcast_to(np.float32(0), (3, 5, 3000, 3000)))
    with pytest.raises(ValueError, match=r"above its bound of 1,000,000"):
        _html.page(map_data(title="x" * 1_000_000))
    for wrong in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            _html.pack(np.full((1, 1, 2, 2), wrong, np.float32))


def test_a_page_of_text_with_all_heads_is_below_its_bound() -> None:
    rng = np.random.default_rng(3)
    weights = np.tril(rng.random((12, 12, 300, 300), np.float32) ** 8)
    weights /= weights.sum(-1, keepdims=True)
    words = [f"word{i}" for i in range(300)]
    assert len(maps.show(weights, words).html().encode()) < _html.BOUND
