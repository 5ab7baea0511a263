"""`extras/report.py`: the page holds the model's own numbers, needs nothing else, and works in a real browser."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import warnings
import zlib

import numpy as np
import pytest
import test_explain
import torch
from helpers import SHAPES, gap, our_model, random_weights, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_explain import CASES, EXAMPLES, clip, conversation, small_batch

import qwen2vl
from extras import report
from generate import stream
from media import load_image
from preprocess import ImageConfig, normalize, patchify, resize
from qwen2vl import get_rope_index

processor, tiny = test_explain.processor, test_explain.tiny  # the fixtures
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def page_of(path, model, processor, media=("shapes",), tokens=12):
    """Writes a page; gives its text, the data in it, the batch and the answer's ids."""
    batch = conversation(processor, *media)
    ids = [id for (id,) in stream(model, batch, tokens)]
    report.write(path, model, processor, batch, ids)
    text = path.read_text(encoding="utf-8")
    return (
        text,
        json.loads(
            re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
        ),
        batch,
        ids,
    )


def unpacked(data):
    """The attention weights [L, H, A, T] that a page holds."""
    shape = data["layers"], data["heads"], len(data["words"])
    content = zlib.decompress(base64.b64decode(data["attention"]))
    largest = np.frombuffer(content, np.float32, np.prod(shape)).reshape(*shape, 1)
    return (
        largest * np.frombuffer(content, np.uint8, offset=largest.nbytes).reshape(*shape, -1) / 255
    )


# ---------------------------------------------------------------------------------------------------- the numbers
WINDOW = small_config(layers=3, use_sliding_window=True, sliding_window=7, max_window_layers=1)


@pytest.mark.parametrize(
    "config", [*(SHAPES[n] for n in ("plain", "one kv head", "like 7B", "deep")), WINDOW]
)
def test_attention_and_logits_equal_those_of_the_cached_steps(config, monkeypatch):
    model = our_model(config, random_weights(config, seed=3), attention="plain")
    model.generation_config = {"eos_token_id": []}
    batch, seen, logits = (
        small_batch(config, [2, ("image", 2, 3), 3, ("video", 2, 2, 1), 2]),
        [],
        [],
    )
    model.register_forward_hook(lambda module, inputs, output: logits.append(output[0, -1]))

    def attention(q, k, v, plan):
        if (
            plan.causal or plan.mask is not None or q.shape[2] == 1
        ):  # the decoder's, not the vision tower's
            unit = torch.eye(k.shape[2]).expand(
                *k.shape[:2], -1, -1
            )  # attending to it gives the weights themselves
            seen.append(plain(q, k, unit, plan)[0, :, -1])  # [H, K]
        return plain(q, k, v, plan)

    plain = qwen2vl.attention
    monkeypatch.setattr(qwen2vl, "attention", attention)
    ids = [id for (id,) in stream(model, batch, 5)]
    monkeypatch.undo()
    layers, columns = config["num_hidden_layers"], list(range(batch.input_ids.shape[1]))
    assert len(seen) == 5 * layers
    steps = [
        torch.stack(seen[n * layers : (n + 1) * layers])[..., : len(columns)] for n in range(5)
    ]
    stepwise = torch.stack(logits)
    found, again = report.look(model, batch, ids, columns)
    assert gap(found, torch.stack(steps, dim=2)) < 1e-6
    assert gap(again, stepwise) < 3e-5
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


@pytest.mark.parametrize("way", ["sdpa", "flash"])
def test_attention_is_the_same_whichever_way_the_model_attends(way, flash):
    config = SHAPES["plain"]
    batch = small_batch(config, [2, ("image", 2, 3), 3])
    one, other = (
        our_model(config, random_weights(config), attention=name) for name in ("plain", way)
    )
    columns = list(range(3, 9))
    assert (
        gap(
            report.look(one, batch, [7, 8, 9], columns)[0],
            report.look(other, batch, [7, 8, 9], columns)[0],
        )
        < 1e-6
    )


@given(
    frames=st.integers(1, 5),
    tokens=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    tp=st.integers(1, 3),
    steps=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 9),
)
@settings(max_examples=40)
def test_pictures_come_back_from_their_patches_to_the_bit(frames, tokens, tp, steps, seed):
    config = ImageConfig(temporal_patch_size=tp, do_rescale=steps[0], do_normalize=steps[1])
    size = (frames, tokens[0] * 28, tokens[1] * 28, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    again = report.unpatchify(*patchify(normalize(pixels, config), config), config)
    assert (again[:frames] == pixels).all()
    assert (again[frames:] == pixels[-1]).all()  # the last one, repeated


def test_packed_attention_is_off_by_a_510th_of_the_largest_at_most():
    weights = torch.rand(2, 3, 4, 50).pow(9)
    weights[0, 0, 0] = 0
    data = {"layers": 2, "heads": 3, "words": [0] * 4, "attention": report.pack(weights)}
    error = np.abs(unpacked(data) - weights.numpy())
    assert (error <= weights.amax(-1, keepdim=True).numpy() / 510 + 1e-7).all()


@pytest.mark.parametrize(("most", "stored"), [(16, (4, 4)), (15, (4, 1)), (4, (4, 1)), (3, (1, 1))])
def test_a_page_that_grew_too_large_holds_means(
    tmp_path, tiny, processor, monkeypatch, most, stored
):
    monkeypatch.setattr(report, "MOST", most * 3 * 6)  # words and tokens
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _, data, batch, ids = page_of(tmp_path / "page.html", tiny, processor, ("small",), tokens=3)
    assert len(said) == stored.count(1)
    assert (data["layers"], data["heads"]) == stored
    weights, _ = report.look(tiny, batch, ids, list(range(15, 21)))
    assert np.abs(unpacked(data).mean((0, 1)) - weights.mean((0, 1)).numpy()).max() < 1 / 510
    assert data["means"] == [4, 4]


# ------------------------------------------------------------------------------------------------------- the page
@pytest.mark.parametrize("media", CASES.values(), ids=CASES)
def test_the_page_holds_the_models_numbers(tmp_path, tiny, processor, media):
    _, data, batch, ids = page_of(tmp_path / "page.html", tiny, processor, media)
    prompt = batch.input_ids[0].tolist()
    vision = {tiny.config.image_token_id, tiny.config.video_token_id}
    columns = [i for i, id in enumerate(prompt) if id in vision]
    weights, logits = report.look(tiny, batch, ids, columns)
    if media:
        assert np.abs(unpacked(data) - weights.numpy()).max() <= 1 / 510
    assert (data["tokens"], data["length"]) == (len(columns), len(prompt))
    assert "".join(word["text"] for word in data["words"]) == processor.tokenizer.decode(ids, False)
    for word, id, chances in zip(data["words"], ids, logits.softmax(-1), strict=True):
        assert word["chance"] == pytest.approx(chances[id].item())
        assert [p for _, p in word["runners"]] == pytest.approx(
            chances.sort(descending=True).values[:5].tolist()
        )
        assert word["runners"][0][0] == processor.tokenizer.decode([chances.argmax()], False)

    arrays = (np.array([prompt + ids]), batch.image_grid_thw, batch.video_grid_thw)
    positions, _ = get_rope_index(
        tiny.config, *(None if x is None else torch.as_tensor(x) for x in arrays)
    )
    told = []
    for row in data["positions"]:  # within a row of a picture only the width runs on
        assert [low == high for low, high in row["at"][:2]] == [True, True]
        assert row["at"][2][1] - row["at"][2][0] == row["count"] - 1
        assert row["first"] == len(told)
        told += [
            [row["at"][0][0], row["at"][1][0], row["at"][2][0] + x] for x in range(row["count"])
        ]
    assert told == positions[:, 0].T.tolist()

    shown = [
        i
        for one in data["pictures"]
        for i in range(one["token"], one["token"] + one["rows"] * one["cols"])
    ]
    assert shown == columns
    assert [columns[one["first"]] for one in data["pictures"]] == [
        one["token"] for one in data["pictures"]
    ]


def test_the_page_is_small_and_needs_nothing_else(tmp_path, tiny, processor):
    text, data, _, _ = page_of(tmp_path / "page.html", tiny, processor, tokens=30)
    assert len(text.encode()) < 150_000
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"[\w+/=]{100,}", "", text))
    assert "default-src 'none'" in text
    assert all(
        one["src"].startswith(("data:image/png;", "data:image/jpeg;")) for one in data["pictures"]
    )


def picture_at(address):
    return Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))


def test_a_photograph_becomes_a_jpeg_as_that_is_smaller():
    grain = np.random.default_rng(0).normal(0, 9, (140, 196, 3))
    photo = (np.linspace(40, 200, 196)[:, None] + grain).clip(0, 255).astype(np.uint8)
    address = report.data_address(photo)
    assert address.startswith("data:image/jpeg;base64,")
    assert np.abs(np.asarray(picture_at(address)) - photo.astype(float)).mean() < 10


def test_pictures_are_shown_as_the_model_gets_them(tmp_path, tiny, processor):
    _, data, batch, _ = page_of(tmp_path / "page.html", tiny, processor, ("shapes", 5))
    drawn, *frames = (picture_at(one["src"]) for one in data["pictures"])
    assert (
        np.asarray(drawn) == resize(load_image(EXAMPLES / "shapes.png"), processor.image_config)
    ).all()
    film = report.unpatchify(batch.media[1].patches, batch.media[1].grid, processor.image_config)
    assert (np.stack(frames) == film[::2]).all()  # the first of each pair
    assert [one["name"] for one in data["pictures"]][1:] == [
        "clip 1, 0.00 s to 0.50 s", "clip 1, 1.00 s to 1.50 s", "clip 1, 2.00 s"]  # fmt: skip


HOSTILE = "</script><script>document.title = 'ha'</script><!--"


def test_no_name_nor_answer_breaks_out_of_the_data(tmp_path, tiny, processor):
    media = clip(processor, 2, name=HOSTILE)
    batch = processor(
        [
            {
                "role": "user",
                "content": [{"type": "video", "video": media}, {"type": "text", "text": HOSTILE}],
            }
        ]
    )
    ids = processor.tokenizer.encode(HOSTILE)
    report.write(tmp_path / "page.html", tiny, processor, batch, ids)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("</script>") == report.TEMPLATE.read_text(encoding="utf-8").count("</script>")
    assert "<!--" not in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert data["pictures"][0]["file"] == "".join(word["text"] for word in data["words"]) == HOSTILE


def test_a_character_of_several_tokens_stands_whole_at_its_last(tmp_path, tiny, processor):
    batch, ids = conversation(processor), processor.tokenizer.encode("é😀")
    report.write(tmp_path / "page.html", tiny, processor, batch, ids)
    data = json.loads(
        re.search(
            r'id="data">(.*?)</script>', (tmp_path / "page.html").read_text(encoding="utf-8"), re.S
        )[1]
    )
    assert [word["text"] for word in data["words"]] == ["", "é", "", "", "", "😀"]


def test_an_answer_without_tokens_has_no_page(tmp_path, tiny, processor):
    with pytest.raises(ValueError, match="at least one token"):
        report.write(tmp_path / "page.html", tiny, processor, conversation(processor), [])


# ---------------------------------------------------------------------------------------------------- the browser
class Browser:
    """Headless Chromium, through the DevTools protocol on a pair of pipes, for which no library is needed."""

    def __init__(self, program, profile):
        (from_us, to_browser), (from_browser, to_us) = os.pipe(), os.pipe()
        # The browser reads its file descriptor 3 and writes 4.
        line = f'exec "$@" 3<&{from_us} 4>&{to_us}'
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--remote-debugging-pipe",
        ]
        command = [
            "bash",
            "-c",
            line,
            "bash",
            program,
            *flags,
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(from_us, to_us), **quiet)
        os.close(from_us)
        os.close(to_us)
        self.into, self.out = os.fdopen(to_browser, "wb", 0), os.fdopen(from_browser, "rb", 0)
        self.number, self.unread, self.events, self.session = 0, b"", [], {}
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self.session = {
            "sessionId": self.do("Target.attachToTarget", targetId=target, flatten=True)[
                "sessionId"
            ]
        }
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.do(f"{domain}.enable")

    def read(self):
        while b"\0" not in self.unread:
            self.unread += (more := self.out.read(1 << 16))
            assert more, "the browser is gone"
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def do(self, method, **parameters):
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters, **self.session}
        self.into.write(json.dumps(request).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def js(self, expression):
        answer = self.do(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path, fragment="", width=1000, mode="light"):
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.do(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}]
        )
        self.do("Page.navigate", url="about:blank")
        self.events.clear()
        self.do("Page.navigate", url=f"{path.as_uri()}{fragment}")
        # Drawn once the answer's status line says something.
        self.js("new Promise(done => { const wait = () => document.querySelector('#status')?.textContent ? done() : "
                "requestAnimationFrame(wait); wait(); })")  # fmt: skip

    def press(self, *keys, shift=False):
        for key in keys:
            for kind in ("rawKeyDown", "keyUp"):
                code = {
                    "Tab": 9,
                    "End": 35,
                    "Home": 36,
                    "ArrowLeft": 37,
                    "ArrowUp": 38,
                    "ArrowRight": 39,
                    "ArrowDown": 40,
                }
                self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=8 * shift,
                        windowsVirtualKeyCode=code[key])  # fmt: skip

    def hover(self, element, x=0.5, y=0.5):
        """Moves the mouse over an element, given as an expression; x and y are shares of its width and height."""
        box = self.js(
            f"{element}.scrollIntoView({{block: 'center'}}), {element}.getBoundingClientRect().toJSON()"
        )
        place = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
        for step in (-1, 0):
            self.do(
                "Input.dispatchMouseEvent", type="mouseMoved", x=place["x"] + step, y=place["y"]
            )

    def text(self, selector):
        return self.js(f"document.querySelector({selector!r}).textContent")

    def close(self):
        self.do("Browser.close")
        self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on the PATH (Debian: apt-get install chromium)")
    one = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tiny, processor):
    """A page for each case, written once: its path and what `page_of` gives."""
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name.replace(' ', '-')}.html" for name in CASES}
    return {
        name: (path, *page_of(path, tiny, processor, CASES[name])) for name, path in paths.items()
    }


def percent(share):
    return "100 %" if share >= 0.9995 else "< 0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


def close_to(told, share):
    """Whether a number on the page is that of the model, up to what packing and rounding take."""
    return float(re.sub("[<%]", "", told)) / 100 == pytest.approx(share, abs=0.0025)


WORD = "[...document.querySelectorAll('[role=option]')].findIndex(o => o.ariaSelected === 'true')"


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000])
@pytest.mark.parametrize("case", CASES)
def test_pages_open_without_errors_requests_or_sideways_scrolling(
    browser, pages, case, width, mode
):
    browser.open(pages[case][0], width=width, mode=mode)
    assert browser.js("document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.js("[...document.images].every(image => image.complete && image.naturalWidth)")
    lightness = browser.js(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    )
    assert (lightness > 200) == (mode == "light")
    kinds = [event["method"] for event in browser.events]
    assert "Runtime.exceptionThrown" not in kinds
    assert "Log.entryAdded" not in kinds
    asked = [
        e["params"]["request"]["url"]
        for e in browser.events
        if e["method"] == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert asked, "the page itself at least"


def test_arrow_keys_step_from_word_to_word(browser, pages):
    path, _, data, _, _ = pages["one picture"]
    browser.open(path)
    assert browser.js(WORD) == 0
    browser.press("ArrowRight")  # before anything has the focus
    browser.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert browser.js(WORD) == 2
    assert browser.js("document.activeElement.textContent") == data["words"][2]["text"]
    assert (
        browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    )  # the focus can be seen
    assert browser.text("#status").startswith(f"Word 3 of {len(data['words'])}, ")
    assert percent(data["words"][2]["chance"]) in browser.text("#status")
    marked = browser.js(
        "[...document.querySelectorAll('tr.marked td')].map(cell => cell.textContent)"
    )
    row = data["positions"][-len(data["words"]) + 2]
    assert marked[1:] == [str(row["first"]), *(str(low) for low, _ in row["at"])]
    runners = browser.js(
        "[...document.querySelectorAll('#runners tbody tr')].map(r => r.textContent)"
    )
    assert [r.strip() for r in runners] == [
        f"{t} {percent(p)}".strip() for t, p in data["words"][2]["runners"]
    ]
    browser.press("End")
    assert browser.js(WORD) == len(data["words"]) - 1
    browser.press("ArrowRight")  # stays
    assert browser.js(WORD) == len(data["words"]) - 1
    browser.press("Home")
    assert browser.js(WORD) == 0


def test_stepping_scrolls_the_boxes_and_not_the_page(browser, tmp_path, tiny, processor):
    page_of(tmp_path / "long.html", tiny, processor, tokens=200)
    browser.open(tmp_path / "long.html", "#word=190", width=360)
    assert browser.js(WORD) == 189
    inside = (
        "(() => { const box = {box}.getBoundingClientRect(), one = {one}.getBoundingClientRect(); "
        "return one.top >= box.top && one.bottom <= box.bottom })()"
    )
    parts = [("document.querySelector('#answer')", "document.querySelector('[aria-selected=true]')"),
             ("document.querySelector('.scroll')", "document.querySelector('tr.marked')")]  # fmt: skip
    browser.hover("document.querySelectorAll('[role=option]')[185]")
    assert browser.js(WORD) == 185
    browser.js("window.scrollTo(0, 0)")
    # The mouse rests where it is; the words that scroll by under it are not meant.
    for keys in (["ArrowLeft"], ["End"], ["Home"]):
        browser.press(*keys)
        for box, one in parts:
            assert browser.js(inside.replace("{box}", box).replace("{one}", one)), keys
        assert browser.js("window.scrollY") == 0
        browser.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert browser.js(WORD) == {"ArrowLeft": 184, "End": 199, "Home": 0}[keys[0]]


def test_tab_goes_through_the_page_in_order(browser, pages):
    browser.open(pages["two pictures"][0])
    stops = []
    for _ in range(8):
        browser.press("Tab")
        stops.append(
            browser.js("document.activeElement.id || document.activeElement.getAttribute('role')")
        )
    assert stops == ["option", "layer", "head", "show-heat", "show-grid", "img", "img", "region"]


def test_hovering_over_a_word_shows_what_it_looked_at(browser, pages):
    path, _, data, _, _ = pages["two pictures"]
    browser.open(path)
    weights = unpacked(data).mean((0, 1))  # [A, T]
    for word in (4, 1):
        browser.hover(f"document.querySelectorAll('[role=option]')[{word}]")
        assert browser.js(WORD) == word
        assert close_to(browser.text("#most"), weights[word].max())
        shares = browser.js(
            "[...document.querySelectorAll('figcaption strong')].map(share => share.textContent)"
        )
        first = data["pictures"][1]["first"]
        assert close_to(shares[0], weights[word, :first].sum())
        assert close_to(shares[1], weights[word, first:].sum())
        # The brightest place of the heat maps is that of the largest weight.
        bright = browser.js(
            "[...document.querySelectorAll('.heat')].flatMap(c => [...c.getContext('2d').getImageData(0, 0, c.width, "
            "c.height).data].filter((_, i) => i % 4 === 3))"
        )
        assert len(bright) == weights.shape[1]
        assert bright[weights[word].argmax()] == max(bright) == 204
        assert np.corrcoef(bright, weights[word])[0, 1] > 0.99


def test_each_layer_and_head_can_be_chosen(browser, pages):
    path, _, data, _, _ = pages["one picture"]
    browser.open(path, "#word=4")
    weights = unpacked(data)[:, :, 3]  # [L, H, T]
    choices = {
        ("all", "all"): weights.mean((0, 1)),
        (1, "all"): weights[1].mean(0),
        ("all", 2): weights[:, 2].mean(0),
    }
    choices |= {(layer, head): weights[layer, head] for layer in (0, 3) for head in (1, 3)}
    for (layer, head), wanted in choices.items():
        for name, value in (("layer", layer), ("head", head)):
            browser.js(f"document.querySelector('#{name}').value = '{value}'")
        browser.js("document.querySelector('#head').dispatchEvent(new Event('change'))")
        assert close_to(browser.text("#most"), wanted.max())
        assert close_to(browser.text("figcaption strong"), wanted.sum())


def test_a_page_of_means_offers_nothing_else(browser, tmp_path, tiny, processor, monkeypatch):
    monkeypatch.setattr(report, "MOST", 500)
    with pytest.warns(UserWarning, match="mean of all heads"):
        _, data, _, _ = page_of(tmp_path / "page.html", tiny, processor, tokens=3)
    browser.open(tmp_path / "page.html")
    options = "[...document.querySelector('#{}').options].map(option => option.text)"
    assert browser.js(options.format("layer")) == ["mean of 4", "1", "2", "3", "4"]
    assert browser.js(options.format("head")) == ["mean of 4"]
    assert close_to(browser.text("#most"), unpacked(data)[:, 0, 0].mean(0).max())


def test_one_token_of_a_picture_is_told_by_mouse_and_by_keys(browser, pages):
    path, _, data, _, _ = pages["a clip"]
    browser.open(path, "#word=2")
    weights, picture = unpacked(data).mean((0, 1)), data["pictures"][1]
    rows, cols = picture["rows"], picture["cols"]

    def check(y, x, word=1):
        told = browser.text("#place")
        token = picture["token"] + y * cols + x
        [row] = [r for r in data["positions"] if r["first"] <= token < r["first"] + r["count"]]
        (t, _), (h, _), (w, _) = row["at"]
        assert (
            f"row {y + 1}, column {x + 1}: token {token}, position time {t}, height {h}, width {w + x};"
            in told
        )
        assert close_to(
            re.search(r"; (.*%)", told)[1], weights[word, picture["first"] + y * cols + x]
        )
        assert browser.text("tr.pointed td") == row["what"]

    browser.hover("document.querySelectorAll('.heat')[1]", (2 + 0.5) / cols, (1 + 0.5) / rows)
    check(1, 2)
    browser.js("document.querySelectorAll('.heat')[1].focus()")
    browser.press("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft")
    check(2, 3)
    assert browser.js(WORD) == 1, "the arrows moved in the picture, not in the answer"
    browser.hover("document.querySelectorAll('[role=option]')[4]")
    check(2, 3, word=4)


def test_heat_map_and_grid_can_be_turned_off(browser, pages):
    browser.open(pages["one picture"][0])
    for name, layer in (("show-heat", ".heat"), ("show-grid", ".grid")):
        assert browser.js(f"getComputedStyle(document.querySelector('{layer}')).opacity") == "1"
        browser.js(f"document.querySelector('#{name}').click()")
        assert browser.js(f"getComputedStyle(document.querySelector('{layer}')).opacity") == "0"
