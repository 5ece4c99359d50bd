"""The server's page in a real browser. Where no Chromium is installed these tests are skipped."""

import json
import time

import pytest
from chromium import Chromium, Tab, find
from page_server import PageServer, card, text_card

from dite.server.problems import Problem

pytestmark = pytest.mark.skipif(find() is None, reason="no chromium, chromium-browser or google-chrome on PATH")
# The page waits 2 s between looks at the server; here a tenth of that.
HURRY = "{ const later = window.setTimeout; window.setTimeout = (run, ms) => later(run, ms / 10); }"
POLLS_S = 0.5  # two of them
HISTORY = "[...document.querySelectorAll('#results b')].map((label) => label.textContent)"


class Page:
    """The page as a person meets it: what is written where, and what can be pressed."""

    def __init__(self, tab: Tab, server: PageServer):
        self.tab, self.server = tab, server

    def open(self) -> "Page":
        self.tab.open(self.server.address)
        self.tab.wait_for("!document.getElementById('workbench').hidden || !document.getElementById('key-form').hidden")
        return self

    def text(self, name: str) -> str:
        return self.tab.run(f"document.getElementById({name!r}).innerText")

    def value(self, name: str) -> str:
        return self.tab.run(f"document.getElementById({name!r}).value")

    def click(self, name: str) -> None:
        self.tab.run(f"document.getElementById({name!r}).click()")

    def fill(self, **values: object) -> None:
        """Fill in fields by their ids, with _ for - and at the end of Python's own words."""
        for name, value in values.items():
            self.tab.run(f"document.getElementById({name.rstrip('_').replace('_', '-')!r}).value = {json.dumps(str(value))}")

    def says(self, name: str, text: str) -> None:
        self.tab.wait_for(f"document.getElementById({name!r}).textContent.includes({json.dumps(text)})")

    def state(self, state: str) -> None:
        self.tab.wait_for(f"document.getElementById('state').dataset.state === {state!r}")

    def ended(self) -> None:
        self.tab.wait_for("!document.getElementById('draw').disabled")

    def draw(self, press: str = "draw", **values: object) -> None:
        """Fill in, draw, and wait until one more result is there."""
        self.fill(**values)
        before = self.tab.run(f"{HISTORY}.length")
        self.click(press)
        self.tab.wait_for(f"{HISTORY}.length === {before + 1}")
        self.ended()

    def shown(self) -> list[str]:
        """The pictures on the stage, as they are told to who doesn't see them."""
        return self.tab.run("[...document.querySelectorAll('#pictures a img')].map((image) => image.alt)")


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("profile")) as browser, browser.tab() as opened:
        opened.call("Page.addScriptToEvaluateOnNewDocument", source=HURRY)
        yield opened


@pytest.fixture
def page(tab):
    """Every test has a server, and with its port an origin, of its own; a new tab for each would take longer than the tests."""
    server = PageServer().start()
    tab.look(1280)
    yield Page(tab, server)
    tab.run("void (window.fetch = () => new Promise(() => {}))")  # it asks no more; to go to an empty page would take longer
    server.held = False
    server.stop()


def test_a_picture_is_drawn_and_shown_with_its_seed_and_timings(page):
    page.open().draw(class_="ship")
    asked = page.server.asked[0]
    assert (asked.condition, asked.partial_images) == (8, 2)
    assert page.shown() == [f"ship, seed {asked.seed}"]
    facts = dict(zip(*[iter(page.text("facts").split("\n"))] * 2, strict=True))
    assert facts.pop("total").endswith("s")
    assert facts == {"steps": "8", "guidance": "4", "size": "32 × 32", "queue": "12.4 ms", "run": "2.34 s"}
    assert page.tab.wait_for("document.querySelector('#pictures img').naturalWidth") == 32
    assert page.tab.run("document.querySelector('#pictures a').download") == f"ship-seed-{asked.seed}.png"


def test_progress_moves_and_partial_pictures_show(page):
    page.server.held = True
    page.open().fill(n=2)
    page.click("draw")
    page.says("bar-text", "Waiting for its turn")
    for step in range(1, 4):
        page.server.allow.release()
        page.says("bar-text", f"Step {step} of 8")
        assert page.value("bar") == step
    page.tab.wait_for("[...document.querySelectorAll('#pictures .frame img')].filter((image) => image.naturalWidth === 32).length === 2")
    assert page.text("announcer") == "Step 2 of 8"  # who listens hears quarters


def test_cancel_hangs_up_and_gives_the_form_back(page):
    page.server.held = True
    page.open().click("draw")
    page.server.allow.release()
    page.says("bar-text", "Step 1 of 8")
    assert not page.server.left.is_set()
    page.click("cancel")
    assert page.server.left.wait(5)
    page.ended()
    assert (page.text("problem"), page.text("announcer")) == ("", "Cancelled.")


def test_an_error_is_text_and_leads_to_its_field(page):
    message = "num_inference_steps: <img src=x onerror=alert(1)> is at most 250"
    page.server.refusal = Problem(400, "invalid_value", message, param="num_inference_steps")
    page.open().click("draw")
    page.says("problem", message)
    assert page.tab.run("document.activeElement.id") == "steps"
    page.draw()
    assert page.text("problem") == ""


def test_a_full_queue_says_when_to_try_again(page):
    page.server.refusal = Problem(429, "queue_full", "the queue is full", retry_after_s=11.2)
    page.open().click("draw")
    page.says("problem", "the queue is full\nTry again in 12 seconds, at ")


def test_a_failure_half_way_is_told_and_the_earlier_picture_stays(page):
    page.open().draw()
    page.server.failure = Problem(500, "out_of_memory", "there was not <b>enough</b> memory")
    page.click("draw")
    page.says("problem", "there was not <b>enough</b> memory")
    page.ended()
    assert page.shown() == [f"airplane, seed {page.server.asked[0].seed}"]


def test_a_server_that_dies_half_way_is_told(page):
    page.server.held = True
    page.open().click("draw")
    page.server.allow.release()
    page.says("bar-text", "Step 1 of 8")
    page.server.stop()
    page.says("problem", "The connection to the server was lost.")
    page.state("gone")


def test_a_key_is_asked_for_until_it_is_right_and_kept_for_the_tab(page):
    page.server.stop()
    page.server.api_key = "s3cret"
    page.server.start()
    page.open()
    for key, answer in (("wrong", "The server refused this key."), ("s3cret", "")):
        assert page.tab.wait_for("document.activeElement.id") == "key"
        page.fill(key=key)
        page.tab.run("document.querySelector('#key-form button').click()")
        page.says("key-refused", answer)
    page.tab.wait_for("document.activeElement.id === 'draw'")
    page.open().draw()
    assert len(page.shown()) == 1 and page.tab.run("Object.keys(localStorage).length + document.cookie.length") == 0


def test_a_key_that_was_changed_is_asked_for_and_nothing_else_meanwhile(page):
    page.open()
    page.server.stop()
    page.server.api_key = "another"
    page.server.start()
    page.state("locked")
    asked = len(page.tab.requests)
    time.sleep(POLLS_S)
    assert page.tab.run("document.getElementById('workbench').hidden") and len(page.tab.requests) == asked


def test_the_history_brings_pictures_settings_and_the_seed_back(page):
    page.open().draw(class_="ship", steps=3, guidance=2.5, n=2)
    page.draw(class_="frog", steps=4, guidance=1, n=1)
    assert page.tab.run(HISTORY) == ["frog", "ship"]
    page.tab.run("document.querySelectorAll('#results button')[1].click()")
    seed = page.server.asked[0].seed
    assert page.shown() == [f"ship, seed {seed}", f"ship, seed {(seed + 1) % 2**32}"]
    assert [page.value(name) for name in ("class", "steps", "guidance", "n", "seed")] == ["ship", "3", "2.5", "2", str(seed)]
    page.draw()
    assert page.server.asked[2] == page.server.asked[0]


def test_draw_again_takes_a_new_seed_and_a_seed_can_be_used_again(page):
    page.open().draw(n=2)
    page.draw(press="again", n=5)
    page.tab.run("document.querySelectorAll('#pictures button')[1].click()")
    page.draw(n=1)
    first, again, used = page.server.asked
    assert (again.n, again.seed != first.seed, used.seed) == (2, True, again.seeds[1])


def test_a_text_model_is_given_words_and_a_size(page):
    page.server.card = text_card()
    page.open().draw(prompt="a lighthouse, ölgemälde", width=32, height=64)
    page.draw(negative="fog", height=32)
    asked = [(one.condition, one.negative_prompt, one.width_px, one.height_px) for one in page.server.asked]
    assert asked == [("a lighthouse, ölgemälde", None, 32, 64), ("a lighthouse, ölgemälde", "fog", 32, 32)]


def test_many_classes_are_searched_and_the_nearest_are_told(page):
    classes = {f"{word} {at}": at for at in range(1000) for word in ("tench", "tinca")}
    page.server.card = card(classes=classes | {"constructor": 3, "TINCA 12": 999}, class_ids=[*range(1000), 1007])
    page.open()
    assert page.tab.run("[...document.querySelectorAll('datalist option')].map((one) => one.value).slice(-2)") == ["tench 999", "class:1007"]
    for wanted in ("tinca 12", "constructor", "class:1007", "TENCH 5", "77"):
        page.draw(class_name=wanted, steps=1)
    assert [one.condition for one in page.server.asked] == [12, 3, 1007, 5, 77]
    page.fill(class_name="toString")
    page.click("draw")
    page.says("problem", 'no class is called "toString"')
    assert page.tab.run("document.activeElement.id") == "class-name"


def test_the_keyboard_alone_draws_and_cancels(page):
    page.server.held = True
    page.open()
    seen = []
    while "draw" not in seen and len(seen) < 12:
        page.tab.press("Tab")
        seen.append(page.tab.run("document.activeElement.id"))
    assert seen == ["class", "n", "steps", "guidance", "random", "draw"]
    page.tab.press("Enter")
    page.tab.wait_for("document.activeElement.id === 'cancel'")
    page.tab.press("Enter")
    page.tab.wait_for("document.activeElement.id === 'draw'")
    assert page.server.left.wait(5)


def test_everything_that_can_be_operated_has_a_name(page):
    page.server.card = text_card()
    page.open().draw(prompt="a lighthouse", width=32, height=32)
    roles = {"button", "checkbox", "combobox", "link", "progressbar", "spinbutton", "textbox"}
    tree = page.tab.call("Accessibility.getFullAXTree")["nodes"]
    nodes = [(node["role"]["value"], node.get("name", {}).get("value")) for node in tree if not node["ignored"]]
    assert len([role for role, _ in nodes if role in roles]) >= 10
    assert [role for role, name in nodes if role in roles and not name] == []


def test_a_server_that_goes_is_missed_and_comes_back(page):
    page.open().draw()
    page.server.stop()
    page.says("notice", "The server doesn't answer.")
    page.click("draw")
    page.says("problem", "The server doesn't answer.")
    page.server.start()
    page.state("ready")
    assert (page.text("notice"), page.text("announcer")) == ("", "The server is ready.")
    page.draw()
    assert page.server.images == 2


def test_a_model_that_loads_is_waited_for(page):
    loaded, page.server.card, page.server.state = page.server.card, None, "starting"
    page.tab.open(page.server.address)
    page.says("notice", "The model is loading.")
    assert page.tab.run("document.getElementById('workbench').hidden")
    page.server.state, page.server.card = "ready", loaded
    page.tab.wait_for("!document.getElementById('workbench').hidden")


def test_the_server_s_state_is_seen_at_a_glance(page):
    page.server.waiting, page.server.ranks, page.server.state = 3, 2, "restarting"
    page.open()
    assert (page.text("state"), page.text("load")) == ("restarting", "0 running, 3 waiting")
    assert "1 of 2" in page.text("tiles") and page.text("ranks").split("\n") == ["rank 0", "process 4100, 320 MiB", "rank 1", "not running"]


def test_a_hidden_tab_does_not_ask(page):
    page.open()
    hide = "Object.defineProperty(document, 'hidden', {{ value: {}, configurable: true }}); document.dispatchEvent(new Event('visibilitychange'))"
    page.tab.run(hide.format("true"))
    time.sleep(POLLS_S)  # one look may have been under way
    polls = page.server.polls
    time.sleep(POLLS_S)
    assert page.server.polls == polls
    page.tab.run(hide.format("false"))
    page.server.waiting = 7
    page.says("load", "7 waiting")


def test_events_are_read_whatever_pieces_they_come_in(page):
    stream = ': still here\r\n\r\nevent: a\r\ndata: {"type": "ß→😀"}\r\n\r\ndata: 2\r\n\r\n\n\ndata: {"a":\ndata: 1}\n\ndata: {"cut'
    pieces = [list(stream.encode()[at : at + 1]) for at in range(len(stream.encode()))]
    read = """(async () => {
        const { readEvents } = await import("/page.js");
        const body = new ReadableStream({ start(to) { for (const piece of PIECES) to.enqueue(Uint8Array.from(piece)); to.close(); } });
        const events = [];
        for await (const event of readEvents(body)) events.push(event);
        return events;
    })()"""
    assert page.open().tab.run(read.replace("PIECES", json.dumps(pieces))) == [{"type": "ß→😀"}, 2, {"a": 1}]


@pytest.mark.parametrize("model", [card(classes={"long" * 20: 0, "<b>b</b>": 1}, class_ids=[0, 1]), text_card()], ids=["classes", "text"])
def test_nothing_is_wider_than_a_telephone_and_nothing_complains(page, model, tmp_path):
    page.server.stop()
    page.server.card, page.server.name, page.server.ranks = model, f"<b>{'a-long-name' * 9}</b>", 4
    page.server.start()
    fields = {"prompt": "word" * 200, "width": 32, "height": 32} if model.reads_text else {}
    page.open().draw(**fields, n=3)
    page.draw(n=1)
    for width_px, dark in ((360, False), (360, True), (1280, False), (1280, True)):
        page.tab.look(width_px, dark)
        page.tab.screenshot(tmp_path / f"{width_px}-{'dark' if dark else 'light'}.png")
        assert page.tab.run("document.documentElement.scrollWidth") <= width_px
    assert page.tab.complaints == [] and page.tab.run("document.querySelectorAll('h1 b, option b').length") == 0
    assert [url for url in page.tab.requests if not url.startswith((page.server.address, f"blob:{page.server.address}", "data:"))] == []
