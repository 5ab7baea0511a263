"""`apps/attention_report.py`: the page has the model's numbers and works in a browser."""

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
import torch
from example_batches import (
    CASES,
    EXAMPLES,
    make_conversation,
    make_small_batch,
    make_video,
)
from helpers import SHAPES, gap, our_model, random_weights, small_config
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import command_line
from apps import attention_report
from apps.attention_report import (
    TEMPLATE,
    compute_attention,
    main,
    pack_weights,
    unpatchify,
    write_report,
)
from generate import generate_steps, stream
from media import load_image
from preprocess import ImageConfig, normalize, patchify, resize

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def page_data(text):
    """Return the data in the HTML of a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def make_page(path, model, processor, media=("shapes",), tokens=12):
    """Write a page; return its text, the data in it, the batch and the token ids of the answer."""
    batch = make_conversation(processor, *media)
    ids = [id for (id,) in stream(model, batch, tokens)]
    write_report(path, model, processor, batch, ids)
    text = path.read_text(encoding="utf-8")
    return text, page_data(text), batch, ids


def unpack_weights(data):
    """Return the attention weights [L, H, A, T] that a page holds."""
    shape = data["layers"], data["heads"], len(data["tokens"])
    content = zlib.decompress(base64.b64decode(data["attention"]))
    largest = np.frombuffer(content, np.float32, np.prod(shape)).reshape(*shape, 1)
    return (
        largest * np.frombuffer(content, np.uint8, offset=largest.nbytes).reshape(*shape, -1) / 255
    )


# -------------------------------------------------------------------------------------- the numbers
WINDOW = small_config(layers=3, use_sliding_window=True, sliding_window=7, max_window_layers=1)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "config", [*(SHAPES[n] for n in ("default", "one kv head", "like 7B", "deep")), WINDOW]
)
def test_compute_attention_equals_the_cached_steps(config):
    model = our_model(config, random_weights(config, seed=3), attn_implementation="eager")
    model.generation_config = {"eos_token_id": []}
    batch = make_small_batch(config, [2, ("image", 2, 3), 3, ("video", 2, 2, 1), 2])
    columns = list(range(batch.input_ids.shape[1]))
    cached_weights = []  # [H, K], by step and layer
    errors = []

    def hook(attention, arguments, output):
        """Compute the last query's weights from the cache, and check the output they give."""
        x, cos, sin, _, cache = arguments
        q = attention.q_proj(x[:, -1:]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        q = attention_report.apply_rotary_pos_emb(q, cos[:, :, -1:], sin[:, :, -1:])
        end = cache.length + x.shape[1]
        group = q.shape[1] // cache.keys.shape[2]
        keys = cache.keys[attention.layer, :, :, :end].repeat_interleave(group, dim=1)
        values = cache.values[attention.layer, :, :, :end].repeat_interleave(group, dim=1)
        scores = q @ keys.mT * attention.head_dim**-0.5
        scores[..., : -(config_window(attention.layer) or end)] = float("-inf")
        weights = scores.softmax(-1)  # [1, H, 1, K]
        expected = attention.o_proj((weights @ values).transpose(1, 2).flatten(2))
        errors.append(gap(output[:, -1:], expected))
        cached_weights.append(weights[0, :, 0, : len(columns)])

    config_window = model.config.window
    handles = [layer.self_attn.register_forward_hook(hook) for layer in model.model.layers]
    steps = list(generate_steps(model, batch, 5))
    for handle in handles:
        handle.remove()
    assert max(errors) < 1e-5

    answer = [step.tokens[0] for step in steps]
    weights, logits = compute_attention(model, batch, answer, columns)
    expected = torch.stack(cached_weights).unflatten(0, (5, -1)).permute(1, 2, 0, 3)
    assert gap(weights, expected) < 1e-6
    assert gap(logits, torch.cat([step.logits for step in steps])) < 3e-5
    assert not any(layer.self_attn._forward_pre_hooks for layer in model.model.layers)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "flash"])
def test_compute_attention_is_equal_for_each_attention_implementation(attn_implementation, flash):
    config = SHAPES["default"]
    batch = make_small_batch(config, [2, ("image", 2, 3), 3])
    columns = list(range(3, 9))
    weights = []
    for name in ("eager", attn_implementation):
        model = our_model(config, random_weights(config), attn_implementation=name)
        weights.append(compute_attention(model, batch, [7, 8, 9], columns)[0])
    assert gap(weights[0], weights[1]) < 1e-6


@pytest.mark.slow
@given(
    frames=st.integers(1, 5),
    tokens=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    tp=st.integers(1, 3),
    steps=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 9),
)
@settings(max_examples=40)
def test_unpatchify_inverts_patchify_exactly(frames, tokens, tp, steps, seed):
    config = ImageConfig(temporal_patch_size=tp, do_rescale=steps[0], do_normalize=steps[1])
    size = (frames, tokens[0] * 28, tokens[1] * 28, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    inverted = unpatchify(*patchify(normalize(pixels, config), config), config)
    assert (inverted[:frames] == pixels).all()
    assert (inverted[frames:] == pixels[-1]).all()  # the last frame, repeated


def test_pack_weights_is_off_by_at_most_a_510th_of_the_largest():
    weights = torch.rand(2, 3, 4, 50).pow(9)
    weights[0, 0, 0] = 0
    data = {"layers": 2, "heads": 3, "tokens": [0] * 4, "attention": pack_weights(weights)}
    error = np.abs(unpack_weights(data) - weights.numpy())
    assert (error <= weights.amax(-1, keepdim=True).numpy() / 510 + 1e-7).all()


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("limit", "stored"), [(16, (4, 4)), (15, (4, 1)), (4, (4, 1)), (3, (1, 1))]
)
def test_write_report_stores_means_when_too_large(
    tmp_path, tiny, processor, monkeypatch, limit, stored
):
    monkeypatch.setattr(
        attention_report, "MAX_WEIGHTS", limit * 3 * 6
    )  # tokens of the answer, image tokens
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, data, batch, ids = make_page(
            tmp_path / "page.html", tiny, processor, ("small",), tokens=3
        )
    assert len(caught) == stored.count(1)
    assert (data["layers"], data["heads"]) == stored
    weights, _ = compute_attention(tiny, batch, ids, list(range(15, 21)))
    assert np.abs(unpack_weights(data).mean((0, 1)) - weights.mean((0, 1)).numpy()).max() < 1 / 510


# ----------------------------------------------------------------------------------------- the page
@pytest.mark.sweep
@pytest.mark.parametrize("media", CASES.values(), ids=CASES)
def test_write_report_stores_the_numbers_of_the_model(tmp_path, tiny, processor, media):
    _, data, batch, ids = make_page(tmp_path / "page.html", tiny, processor, media)
    prompt = batch.input_ids[0].tolist()
    vision = {tiny.config.image_token_id, tiny.config.video_token_id}
    columns = [i for i, id in enumerate(prompt) if id in vision]
    weights, logits = compute_attention(tiny, batch, ids, columns)
    if media:
        assert np.abs(unpack_weights(data) - weights.numpy()).max() <= 1 / 510
    assert data["image_tokens"] == len(columns)
    assert "".join(token["text"] for token in data["tokens"]) == processor.tokenizer.decode(
        ids, False
    )
    for token, id, probabilities in zip(data["tokens"], ids, logits.softmax(-1), strict=True):
        assert token["probability"] == pytest.approx(probabilities[id].item())
        assert [p for _, p in token["alternatives"]] == pytest.approx(
            probabilities.sort(descending=True).values[:5].tolist()
        )
        assert token["alternatives"][0][0] == processor.tokenizer.decode(
            [probabilities.argmax()], False
        )

    placeholders = [
        i
        for image in data["images"]
        for i in range(image["token"], image["token"] + image["rows"] * image["cols"])
    ]
    assert placeholders == columns
    assert [columns[image["first"]] for image in data["images"]] == [
        image["token"] for image in data["images"]
    ]


def test_write_report_makes_a_small_self_contained_page(tmp_path, tiny, processor):
    text, data, _, _ = make_page(tmp_path / "page.html", tiny, processor, tokens=30)
    assert len(text.encode()) < 150_000
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"[\w+/=]{100,}", "", text))
    assert "default-src 'none'" in text
    assert all(image["src"].startswith("data:image/png;base64,") for image in data["images"])


def open_data_url(url):
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))


def test_write_report_shows_images_as_the_model_gets_them(tmp_path, tiny, processor):
    _, data, batch, _ = make_page(tmp_path / "page.html", tiny, processor, ("shapes", 5))
    images = [np.asarray(open_data_url(image["src"])) for image in data["images"]]
    shapes = resize(load_image(EXAMPLES / "shapes.png"), processor.image_config)
    video = unpatchify(batch.media[1].patches, batch.media[1].grid, processor.image_config)
    for shown, expected in zip(images, [shapes, *video[::2]], strict=True):  # first of each pair
        assert (shown == expected).all()
    names = [image["name"] for image in data["images"]]
    assert names == ["image 1", "video 1, 0.00 s", "video 1, 1.00 s", "video 1, 2.00 s"]


HOSTILE = "</script><script>document.title = 'ha'</script><!--"


def test_write_report_escapes_names_and_answers(tmp_path, tiny, processor):
    media = make_video(processor, 2, name=HOSTILE)
    batch = processor(
        [
            {
                "role": "user",
                "content": [{"type": "video", "video": media}, {"type": "text", "text": HOSTILE}],
            }
        ]
    )
    ids = processor.tokenizer.encode(HOSTILE)
    write_report(tmp_path / "page.html", tiny, processor, batch, ids)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("</script>") == TEMPLATE.read_text(encoding="utf-8").count("</script>")
    assert "<!--" not in text
    data = page_data(text)
    assert (
        data["images"][0]["file"] == "".join(token["text"] for token in data["tokens"]) == HOSTILE
    )


def test_write_report_shows_a_character_at_its_last_token(tmp_path, tiny, processor):
    batch, ids = make_conversation(processor), processor.tokenizer.encode("é😀")
    write_report(tmp_path / "page.html", tiny, processor, batch, ids)
    data = page_data((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [token["text"] for token in data["tokens"]] == ["", "é", "", "", "", "😀"]


def test_write_report_shows_that_an_answer_ends_within_a_character(tmp_path, tiny, processor):
    batch, ids = make_conversation(processor), processor.tokenizer.encode("é")[:1]
    write_report(tmp_path / "page.html", tiny, processor, batch, ids)
    data = page_data((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [token["text"] for token in data["tokens"]] == ["\ufffd"]


def test_write_report_refuses_an_empty_answer(tmp_path, tiny, processor):
    with pytest.raises(ValueError, match="at least one token"):
        write_report(tmp_path / "page.html", tiny, processor, make_conversation(processor), [])


# -------------------------------------------------------------------------------------- the browser
KEY_CODES = {
    "Tab": 9,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}


class Browser:
    """Control headless Chromium with the DevTools protocol over a pair of pipes."""

    def __init__(self, program, profile):
        from_us, to_browser = os.pipe()
        from_browser, to_us = os.pipe()
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
        self.requests = os.fdopen(to_browser, "wb", 0)
        self.responses = os.fdopen(from_browser, "rb", 0)
        self.number = 0
        self.unread = b""
        self.events = []
        self.session = {}
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
            received = self.responses.read(1 << 16)
            assert received, "the browser has exited"
            self.unread += received
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def do(self, method, **parameters):
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters, **self.session}
        self.requests.write(json.dumps(request).encode() + b"\0")
        while (response := self.read()).get("id") != self.number:
            self.events.append(response)
        assert "error" not in response, response
        return response["result"]

    def js(self, expression):
        response = self.do(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in response, response
        return response["result"].get("value")

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
        # The page is drawn when its status line has text.
        self.js(
            "new Promise(done => { const wait = () => "
            "document.querySelector('#status')?.textContent ? done() : "
            "requestAnimationFrame(wait); wait(); })"
        )

    def press(self, *keys, shift=False):
        for key in keys:
            for kind in ("rawKeyDown", "keyUp"):
                self.do(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    code=key,
                    modifiers=8 if shift else 0,
                    windowsVirtualKeyCode=KEY_CODES[key],
                )

    def hover(self, element, x=0.5, y=0.5):
        """Move the mouse over an element (an expression); x and y are fractions of its size."""
        box = self.js(
            f"{element}.scrollIntoView({{block: 'center'}}), "
            f"{element}.getBoundingClientRect().toJSON()"
        )
        left = box["x"] + x * box["width"]
        top = box["y"] + y * box["height"]
        for step in (-1, 0):
            self.do("Input.dispatchMouseEvent", type="mouseMoved", x=left + step, y=top)

    def text(self, selector):
        return self.js(f"document.querySelector({selector!r}).textContent")

    def close(self):
        self.do("Browser.close")
        self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on the PATH (Debian: apt-get install chromium)")
    chromium = Browser(CHROMIUM, tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tiny, processor):
    """Return a page for each case: its path and what `make_page` returns."""
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name.replace(' ', '-')}.html" for name in CASES}
    return {
        name: (path, *make_page(path, tiny, processor, CASES[name])) for name, path in paths.items()
    }


def percent(share):
    """Return a share as the page formats it."""
    if share >= 0.9995:
        return "100 %"
    if share < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.1f} %"


def close_to(shown_text, share):
    """Return whether a number on the page is that of the model, within packing and rounding."""
    return float(re.sub("[<%]", "", shown_text)) / 100 == pytest.approx(share, abs=0.0025)


SELECTED = (
    "[...document.querySelectorAll('[role=option]')].findIndex(o => o.ariaSelected === 'true')"
)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1000])
@pytest.mark.parametrize("case", CASES)
def test_page_opens_without_errors_requests_or_horizontal_scrolling(
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
    urls = [
        e["params"]["request"]["url"]
        for e in browser.events
        if e["method"] == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:")) for url in urls)
    assert urls, "the page itself at least"


@pytest.mark.slow
@pytest.mark.browser
def test_page_arrow_keys_step_between_tokens(browser, pages):
    path, _, data, _, _ = pages["one image"]
    browser.open(path)
    assert browser.js(SELECTED) == 0
    browser.press("ArrowRight")  # before anything has the focus
    browser.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert browser.js(SELECTED) == 2
    assert browser.js("document.activeElement.textContent") == data["tokens"][2]["text"]
    assert (
        browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    )  # the focus is visible
    assert browser.text("#status").startswith(f"Token 3 of {len(data['tokens'])}, ")
    assert percent(data["tokens"][2]["probability"]) in browser.text("#status")
    alternatives = browser.js(
        "[...document.querySelectorAll('#alternatives tbody tr')].map(r => r.textContent)"
    )
    assert [r.strip() for r in alternatives] == [
        f"{t} {percent(p)}".strip() for t, p in data["tokens"][2]["alternatives"]
    ]
    browser.press("End")
    assert browser.js(SELECTED) == len(data["tokens"]) - 1
    browser.press("ArrowRight")  # no token follows
    assert browser.js(SELECTED) == len(data["tokens"]) - 1
    browser.press("Home")
    assert browser.js(SELECTED) == 0


@pytest.mark.slow
@pytest.mark.browser
def test_page_steps_scroll_the_boxes_only(browser, tmp_path, tiny, processor):
    make_page(tmp_path / "long.html", tiny, processor, tokens=200)
    browser.open(tmp_path / "long.html", "#token=190", width=360)
    assert browser.js(SELECTED) == 189
    inside = (
        "(() => { const box = {box}.getBoundingClientRect(); "
        "const item = {item}.getBoundingClientRect(); "
        "return item.top >= box.top && item.bottom <= box.bottom })()"
    )
    inside = inside.replace("{box}", "document.querySelector('#answer')")
    inside = inside.replace("{item}", "document.querySelector('[aria-selected=true]')")
    browser.hover("document.querySelectorAll('[role=option]')[185]")
    assert browser.js(SELECTED) == 185
    browser.js("window.scrollTo(0, 0)")
    # The mouse does not move; tokens that scroll under it are not selected.
    for keys in (["ArrowLeft"], ["End"], ["Home"]):
        browser.press(*keys)
        assert browser.js(inside), keys
        assert browser.js("window.scrollY") == 0
        browser.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert browser.js(SELECTED) == {"ArrowLeft": 184, "End": 199, "Home": 0}[keys[0]]


@pytest.mark.browser
def test_page_tab_order_follows_the_layout(browser, pages):
    browser.open(pages["two images"][0])
    stops = []
    for _ in range(7):
        browser.press("Tab")
        stops.append(
            browser.js("document.activeElement.id || document.activeElement.getAttribute('role')")
        )
    assert stops == ["option", "layer", "head", "show-heat", "show-grid", "img", "img"]


@pytest.mark.browser
def test_page_hover_shows_the_attention_of_a_token(browser, pages):
    path, _, data, _, _ = pages["two images"]
    browser.open(path)
    weights = unpack_weights(data).mean((0, 1))  # [A, T]
    for token in (4, 1):
        browser.hover(f"document.querySelectorAll('[role=option]')[{token}]")
        assert browser.js(SELECTED) == token
        assert close_to(browser.text("#maximum"), weights[token].max())
        shares = browser.js(
            "[...document.querySelectorAll('figcaption strong')].map(share => share.textContent)"
        )
        first = data["images"][1]["first"]
        assert close_to(shares[0], weights[token, :first].sum())
        assert close_to(shares[1], weights[token, first:].sum())
        # The heat maps are brightest at the largest weight.
        bright = browser.js(
            "[...document.querySelectorAll('.heat')].flatMap(c => "
            "[...c.getContext('2d').getImageData(0, 0, c.width, "
            "c.height).data].filter((_, i) => i % 4 === 3))"
        )
        assert len(bright) == weights.shape[1]
        assert bright[weights[token].argmax()] == max(bright) == 204
        assert np.corrcoef(bright, weights[token])[0, 1] > 0.99


@pytest.mark.browser
def test_page_shows_the_chosen_layer_and_head(browser, pages):
    path, _, data, _, _ = pages["one image"]
    browser.open(path, "#token=4")
    weights = unpack_weights(data)[:, :, 3]  # [L, H, T]
    choices = {
        ("all", "all"): weights.mean((0, 1)),
        (1, "all"): weights[1].mean(0),
        ("all", 2): weights[:, 2].mean(0),
    }
    choices |= {(layer, head): weights[layer, head] for layer in (0, 3) for head in (1, 3)}
    for (layer, head), expected in choices.items():
        for name, value in (("layer", layer), ("head", head)):
            browser.js(f"document.querySelector('#{name}').value = '{value}'")
        browser.js("document.querySelector('#head').dispatchEvent(new Event('change'))")
        assert close_to(browser.text("#maximum"), expected.max())
        assert close_to(browser.text("figcaption strong"), expected.sum())


@pytest.mark.browser
def test_page_of_means_offers_no_single_head(browser, tmp_path, tiny, processor, monkeypatch):
    monkeypatch.setattr(attention_report, "MAX_WEIGHTS", 500)
    with pytest.warns(UserWarning, match="too large for each head"):
        _, data, _, _ = make_page(tmp_path / "page.html", tiny, processor, tokens=3)
    browser.open(tmp_path / "page.html")
    options = "[...document.querySelector('#{}').options].map(option => option.text)"
    assert browser.js(options.format("layer")) == ["mean", "1", "2", "3", "4"]
    assert browser.js(options.format("head")) == ["mean"]
    assert close_to(browser.text("#maximum"), unpack_weights(data)[:, 0, 0].mean(0).max())


@pytest.mark.browser
def test_page_describes_an_image_token_by_mouse_and_keys(browser, pages):
    path, _, data, _, _ = pages["a video"]
    browser.open(path, "#token=2")
    weights = unpack_weights(data).mean((0, 1))
    image = data["images"][1]
    rows, cols = image["rows"], image["cols"]

    def check_place(y, x, selected=1):
        shown_text = browser.text("#place")
        token = image["token"] + y * cols + x
        assert f"row {y + 1}, column {x + 1}: token {token}, " in shown_text
        assert close_to(
            re.search(r"token \d+, (.*%)", shown_text)[1],
            weights[selected, image["first"] + y * cols + x],
        )

    browser.hover("document.querySelectorAll('.heat')[1]", (2 + 0.5) / cols, (1 + 0.5) / rows)
    check_place(1, 2)
    browser.js("document.querySelectorAll('.heat')[1].focus()")
    browser.press("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft")
    check_place(2, 3)
    assert browser.js(SELECTED) == 1, "the arrow keys move in the image, not in the answer"
    browser.hover("document.querySelectorAll('[role=option]')[4]")
    check_place(2, 3, selected=4)


@pytest.mark.browser
def test_page_hides_heat_map_and_grid(browser, pages):
    browser.open(pages["one image"][0])
    for name, layer in (("show-heat", ".heat"), ("show-grid", ".grid")):
        assert browser.js(f"getComputedStyle(document.querySelector('{layer}')).opacity") == "1"
        browser.js(f"document.querySelector('#{name}').click()")
        assert browser.js(f"getComputedStyle(document.querySelector('{layer}')).opacity") == "0"


# ------------------------------------------------------------------------------------------ program
@pytest.mark.slow
def test_main_writes_the_page(capsys, tmp_path):
    page = tmp_path / "page.html"
    image = str(EXAMPLES / "shapes.png")
    assert main(["--image", image, "--out", str(page), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    assert err == ""
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    page.write_text("mine")
    assert main(["--image", image, "--out", str(page)]) == 2
    assert "page.html exists: expected a new file for --out, or --force" in capsys.readouterr().err
    assert page.read_text() == "mine"


def test_main_checks_the_directory_before_loading_the_model(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "open_session", None)
    assert main(["--prompt", "x", "--out", str(tmp_path / "missing" / "page.html")]) == 2
    assert "there is no directory" in capsys.readouterr().err


def test_write_report_names_the_path_in_its_error(tmp_path, tiny, processor):
    batch = make_conversation(processor)
    with pytest.raises(OSError, match=f"^cannot write {re.escape(str(tmp_path))}: expected a file"):
        write_report(tmp_path, tiny, processor, batch, [7])
