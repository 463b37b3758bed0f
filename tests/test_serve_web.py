"""The web page in headless Chromium: drawn, placed, compared, traced, by mouse and by keys, under its strict policy."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from serve_parts import answering, desk, encoded, pixels

from mezzotint.serve import keys
from mezzotint.serve.crew import Desk
from mezzotint.serve.examinations import DATA, LOG, PAGE
from mezzotint.serve.server import Server
from mezzotint.serve.store import Store

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
expect.set_options(timeout=30_000)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: `make test` installs it where it may")


@dataclass
class Site:
    """A server and a browser that looks at it; whatever the browser complains of is kept."""

    server: Server
    url: str
    page: Page
    complaints: list[str]
    asked: list[str]
    keys: dict[str, str]  # by role, where the server has some

    def go(self, path: str) -> Page:
        self.page.goto(f"{self.url}{path}")
        return self.page

    def jobs(self) -> list[dict[str, Any]]:
        return httpx.get(f"{self.url}/v1/jobs", headers={"authorization": "Bearer any"}).json()["jobs"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chromium: Any, request: pytest.FixtureRequest
) -> Iterator[Site]:
    told: dict[str, Any] = getattr(request, "param", {})
    monkeypatch.setenv("MEZZOTINT_HOME", str(tmp_path / "home"))
    store = Store(f"sqlite:///{tmp_path / 'jobs.db'}")
    made = {role: keys.add(store, role, role) for role in keys.ROLES} if told.get("keys") else {}
    server = Server(store, told.get("desks", lambda: {"cells": desk()})(), not made, tmp_path / "audit.jsonl")
    server.examinations.paths = {"cells": tmp_path}
    with answering(server) as url:
        context = chromium.new_context(viewport={"width": 1100, "height": 800}, reduced_motion="reduce")
        page = context.new_page()
        page.set_default_timeout(30_000)
        complaints, asked = list[str](), list[str]()
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        yield Site(server, url, page, complaints, asked, made)
        context.close()
    strangers = [address for address in asked if not address.startswith((url, "blob:", "data:"))]
    assert not strangers, "the page asked somebody else"


def test_drawing_by_keys_alone(site: Site) -> None:
    page = site.go("/")
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    for _ in range(12):  # to the first field of the form
        page.keyboard.press("Tab")
        if page.locator("select[name=label]:focus").count():
            break
    page.keyboard.type("crack")
    page.keyboard.press("Tab")
    page.keyboard.type("2")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".run .thumb img")).to_have_count(2)
    (job,) = site.jobs()
    assert job["state"] == "done" and job["request"]["label"] == "crack" and job["request"]["count"] == 2
    assert job["request"]["previews"] and job["request"]["seed"] is not None
    page.locator(".run .thumb").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("crack")
    assert not site.complaints


def slow() -> dict[str, Desk]:
    """A model that takes its time, so that a preview can be seen."""
    made = desk()
    network = made.pipeline.model.backbone
    network.register_forward_pre_hook(lambda *_: time.sleep(0.15))
    return {"cells": made}


@pytest.mark.parametrize("site", [{"desks": slow}], indirect=True)
def test_a_picture_is_seen_while_it_grows_and_can_be_stopped(site: Site) -> None:
    page = site.go("/")
    page.locator("summary").click()
    page.fill("input[name=steps]", "60")
    page.fill("input[name=count]", "1")
    page.click("button.main")
    grown = page.locator(".growing img")
    expect(grown).to_be_visible()
    first = grown.get_attribute("src")
    assert first is not None and "/preview?step=" in first
    expect(grown).not_to_have_attribute("src", first)  # another one follows
    (job,) = site.jobs()
    answer = httpx.get(f"{site.url}/v1/jobs/{job['id']}/preview")
    assert answer.headers["content-type"] == "image/jpeg" and pixels(answer.content).std() > 0
    with page.expect_response(lambda answer: answer.request.method == "DELETE"):
        page.click("text=Cancel")
    expect(page.locator(".run")).to_contain_text("cancelled")
    assert site.jobs()[0]["state"] == "cancelled"
    assert httpx.get(f"{site.url}/v1/jobs/{job['id']}/preview").status_code == 204
    assert not site.complaints


def test_a_defect_is_placed_where_the_mask_is(site: Site) -> None:
    page = site.go("/place")
    expect(page.locator("button.main")).to_be_disabled()
    good = Image.fromarray((np.arange(64 * 64 * 3) % 251).astype(np.uint8).reshape(64, 64, 3))
    page.set_input_files("input[name=picture]", {"name": "good.png", "mimeType": "image/png", "buffer": encoded(good)})
    expect(page.locator(".stage .empty")).to_be_hidden()
    page.select_option("select[name=label]", "crack")
    box = page.locator("#mask").bounding_box()
    assert box is not None
    at = [(box["x"] + box["width"] * part, box["y"] + box["height"] * 0.5) for part in (0.3, 0.7)]
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=4)
    page.mouse.up()
    expect(page.locator("#share")).not_to_have_text("0.0 % of the picture")
    page.click("button.main")
    expect(page.locator("#results .thumb img")).to_be_visible()
    (job,) = site.jobs()
    sent = {row.role: row.data for row in site.server.store.pictures(job["id"]) if row.role != "result"}
    mask = np.asarray(Image.open(io.BytesIO(sent["mask"])).convert("L")) > 127
    assert mask[32, 20:45].all() and not mask[:16].any() and not mask[48:].any()
    drawn = pixels(httpx.get(f"{site.url}{job['pictures'][0]['url']}").content)
    small = np.asarray(good.resize(drawn.shape[1::-1], Image.Resampling.LANCZOS), dtype=int)
    cells = np.asarray(Image.fromarray(mask).resize(drawn.shape[1::-1], Image.Resampling.BOX))
    untouched = ~np.asarray(cells, dtype=bool)
    assert np.abs(drawn - small)[untouched].max() <= 1 and np.abs(drawn - small)[~untouched].mean() > 5
    assert not site.complaints


def test_a_mask_is_painted_and_undone_by_keys(site: Site) -> None:
    page = site.go("/place")
    picture = encoded(Image.new("RGB", (100, 100), "gray"))
    page.set_input_files("input[name=picture]", {"name": "good.png", "mimeType": "image/png", "buffer": picture})
    share = page.locator("#share")
    expect(share).to_have_text("0.0 % of the picture")
    page.locator("#clear").focus()
    page.keyboard.press("Tab")
    expect(page.locator("#mask")).to_be_focused()
    page.keyboard.down(" ")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    page.keyboard.up(" ")
    expect(share).not_to_have_text("0.0 % of the picture")
    stroke = float(share.inner_text().split(" ")[0])
    # 10 steps of 2 % with a brush of 16 % of a quarter of the side: a rectangle and two half discs
    assert stroke == pytest.approx(100 * (0.2 * 0.08 + np.pi * 0.04**2), rel=0.1)
    page.keyboard.press("e")
    page.keyboard.press(" ")
    expect(share).not_to_have_text(f"{stroke:.1f} % of the picture")
    page.keyboard.press("Control+z")
    expect(share).to_have_text(f"{stroke:.1f} % of the picture")
    page.keyboard.press("Delete")
    expect(share).to_have_text("0.0 % of the picture")
    expect(page.locator("button.main")).to_be_disabled()
    assert not site.complaints


def test_samplers_side_by_side(site: Site) -> None:
    page = site.go("/compare")
    page.select_option("select[name=label]", "crack")
    while page.locator("#samplers input:checked").count():
        page.locator("#samplers input:checked").first.uncheck()
    for name in ("ddim", "heun", "euler", "dpmpp_2m"):
        page.check(f"#samplers input[value={name}]")
    page.fill("input[name=counts]", "2, 3")
    expect(page.locator("#many")).to_have_text("8 pictures")
    page.click("button.main")
    expect(page.locator(".compare td img[alt*=seed]")).to_have_count(8)  # more than the streams a browser opens
    asked = [(job["request"]["sampler"], job["request"]["steps"], job["request"]["seed"]) for job in site.jobs()]
    assert len({seed for *_, seed in asked}) == 1
    assert {each[:2] for each in asked} == {(n, s) for n in ("ddim", "heun", "euler", "dpmpp_2m") for s in (2, 3)}
    page.fill("input[name=counts]", "many")
    page.click("button.main")
    expect(page.locator("#wish .wrong")).to_contain_text("whole numbers")
    assert not site.complaints


def test_gallery_jobs_and_a_chain_that_can_be_read(site: Site) -> None:
    page = site.go("/gallery")
    expect(page.locator(".empty")).to_be_visible()
    with httpx.Client(base_url=site.url) as client:
        evil = '<img src=x onerror="document.title=1">'
        client.post("/v1/images/generations", json={"prompt": "crack", "n": 2, "seed": 5, "steps": 2}, timeout=60)
        bad = client.post("/v1/jobs", json={"model": "cells", "prompt": evil, "seed": 1})
        assert bad.status_code == 400
    page = site.go("/jobs")
    expect(page.locator("tbody tr")).to_have_count(1)
    httpx.post(f"{site.url}/v1/images/generations", json={"prompt": "crack", "steps": 2, "seed": 9}, timeout=60)
    expect(page.locator("tbody tr")).to_have_count(2)  # by itself
    page = site.go("/gallery")
    expect(page.locator(".gallery img")).to_have_count(3)
    page.locator(".gallery a").nth(1).click()
    expect(page.locator(".facts")).to_contain_text("2")
    chain = page.locator(".chain")
    expect(chain).to_contain_text("credentials of the picture")
    expect(chain).to_contain_text("the weights are those that drew")
    expect(page.locator(".verdict")).to_contain_text("It holds")
    with page.expect_download() as saved:
        page.click("text=Save the signed file")
    data = saved.value.path().read_bytes()
    (job,) = [job for job in site.jobs() if job["request"]["count"] == 2]
    assert data == site.server.store.picture(job["id"], 0).data  # type: ignore[union-attr]
    assert not site.complaints


def test_the_doctor_s_reports(site: Site) -> None:
    page = site.go("/doctor")
    expect(page.locator(".exam")).to_contain_text("not examined yet")
    folder = site.server.examinations.folder / "cells"
    folder.mkdir(parents=True)
    (folder / PAGE).write_text("<title>the report</title><style>p{color:red}</style><p>all of it</p><script>x</script>")
    finding = {"grade": "harmful", "cause": "guidance.scale", "says": "too <b>strong</b>"}
    (folder / DATA).write_text(json.dumps({"verdict": "Harmful: that.", "healthy": False, "findings": [finding]}))
    expect(page.locator(".exam")).to_contain_text("Harmful: that.")  # by itself
    expect(page.locator(".findings")).to_contain_text("too <b>strong</b>")
    page.click("text=The whole report")
    expect(page.locator("p")).to_have_text("all of it")
    page.go_back()
    page.click("text=Examine again")  # the folder is no model: the doctor says so
    expect(page.locator(".exam")).to_contain_text("failed")
    assert (folder / f"{LOG}.failed").is_file() and (folder / PAGE).is_file()
    assert not [each for each in site.complaints if "sandbox" not in each]


@pytest.mark.parametrize("site", [{"keys": True}], indirect=True)
def test_signing_in(site: Site) -> None:
    made, page = site.keys, site.go("/gallery")
    assert page.url == f"{site.url}/sign-in?next=/gallery"
    page.fill("input[name=key]", "mz-wrong")
    page.keyboard.press("Enter")
    expect(page.locator(".wrong")).to_have_text("This key opens nothing here.")
    page.fill("input[name=key]", made["user"])
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Gallery")
    page = site.go("/")
    page.click("button.main")
    expect(page.locator(".run .thumb img")).to_have_count(4)
    cookie: Any
    (cookie,) = page.context.cookies()
    assert cookie["httpOnly"] and cookie["sameSite"] == "Strict" and cookie["value"] not in made.values()
    jar = {cookie["name"]: cookie["value"]}
    with httpx.Client(base_url=site.url, cookies=jar) as client:
        for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
            answer = client.post("/v1/jobs", json={"model": "cells"}, headers=headers)
            assert answer.status_code == 403 and "another site" in answer.json()["error"]["message"]
        assert client.post("/v1/jobs", json={"model": "cells", "steps": 2}).status_code == 202
        assert client.get("/doctor/cells/report").status_code == 403
        assert client.post("/doctor/cells").status_code == 403
    page.click("text=Sign out")
    expect(page.locator("h1")).to_have_text("Sign in")
    assert httpx.get(f"{site.url}/v1/jobs", cookies=jar).status_code == 401
    page.fill("input[name=key]", made["viewer"])
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Gallery")  # who looks is offered nothing that asks
    assert page.locator("nav a").all_inner_texts() == ["Gallery", "Jobs", "Doctor"]
    page.locator(".gallery a").first.click()
    expect(page.locator("text=Save the signed file")).to_be_visible()
    expect(page.locator("text=Place a defect on it")).to_have_count(0)
    page.click("text=Sign out")
    keys.revoke(site.server.store, "viewer")
    page.fill("input[name=key]", made["viewer"])
    page.keyboard.press("Enter")
    expect(page.locator(".wrong")).to_be_visible()


def test_nobody_is_led_elsewhere_and_no_other_name_is_answered(site: Site) -> None:
    answer = httpx.get(f"{site.url}/v1/models", headers={"host": "evil.example"})
    assert answer.status_code == 403 and "this machine's own name" in answer.json()["error"]["message"]
    secret = keys.add(site.server.store, "somebody")
    for place, to in (("//evil.example", "/"), ("https://evil.example", "/"), ("/\\evil", "/"), ("/jobs", "/jobs")):
        answer = httpx.post(f"{site.url}/sign-in", data={"key": secret, "next": place})
        assert answer.status_code == 303 and answer.headers["location"] == to
    tries = [httpx.post(f"{site.url}/sign-in", data={"key": "mz-guess"}).status_code for _ in range(30)]
    assert tries[0] == 401 and tries[-1] == 429


@pytest.mark.parametrize("path", ["/", "/place", "/compare", "/gallery", "/jobs", "/doctor", "/jobs/none"])
def test_a_page_fits_a_telephone_and_names_its_parts(site: Site, path: str) -> None:
    site.page.set_viewport_size({"width": 360, "height": 700})
    page = site.go(path)
    page.wait_for_timeout(100)
    wide = page.locator("html").evaluate("node => node.scrollWidth")
    assert wide <= 360, f"{path} is {wide} pixels wide"
    unnamed = page.locator("input, select, textarea, button").evaluate_all(
        "nodes => nodes.filter(n => n.type !== 'hidden' && !n.labels?.length && !n.ariaLabel && !n.textContent.trim())"
        ".map(n => n.outerHTML)"
    )
    assert not unnamed and page.locator("h1").count() == 1 and page.title()
    if path == "/jobs/none":
        expect(page.locator("h1")).to_have_text("Not here")
    else:
        assert not site.complaints
