"""What is hostile, malformed, slow or too large is refused with the right status, and nothing is drawn for it."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import socket
import struct
import time
import zlib
from pathlib import Path

import pytest
import requests
from PIL import Image

from latentdiff.errors import UsageError
from latentdiff.serving.app import make_app
from latentdiff.serving.settings import Limits, ServerSettings, WorkerSettings
from tests.serving.conftest import Running, running, tiny_worker, wait_for

DRAW = {"prompt": "a cat", "steps": 2}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with a token and little patience, whose workers are not needed."""
    limits = Limits(upload=200_000, text=20_000, body_seconds=1.0, source_pixels=1_000_000, side=1024)
    out = tmp_path_factory.mktemp("guarded") / "images"
    with running(worker=tiny_worker(), devices=(), out=out, token="open sesame", limits=limits) as found:
        yield found


@pytest.fixture
def opened(guarded) -> requests.Session:
    session = requests.Session()
    session.headers["Authorization"] = "Bearer open sesame"
    return session


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic nonsense"},
        {"Authorization": "Basic " + base64.b64encode(b"user:wrong").decode()},
        {"Cookie": "latentdiff-token=wrong"},
        {"Cookie": "\x01;=;latentdiff-token"},
    ],
)
@pytest.mark.parametrize("path", ["/", "/v1/models", "/sdapi/v1/options", "/api/about", "/metrics", "/docs"])
def test_without_the_token_nothing_is_told(guarded, path, headers):
    answer = guarded.get(path, headers=headers)
    assert answer.status_code == 401 and "token" in answer.text and "sesame" not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer open sesame"},
        {"Authorization": "Basic " + base64.b64encode(b"anybody:open sesame").decode()},
        {"Cookie": "latentdiff-token=open%20sesame"},
    ],
)
def test_with_the_token_all_interfaces_answer(guarded, headers):
    assert guarded.get("/v1/models", headers=headers).status_code == 200


def test_the_address_with_the_token_leaves_a_cookie(guarded):
    with requests.Session() as browser:
        answer = browser.get(f"{guarded.url}/?token=open%20sesame")
        assert answer.status_code == 200 and answer.url == f"{guarded.url}/", "the token does not stay in the address"
        cookie = answer.history[0].headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert guarded.get("/?token=wrong").status_code == 401


def test_health_is_told_to_everybody(guarded):
    assert guarded.get("/health").json() == {"status": "ok"}
    assert guarded.get("/ready").status_code == 503, "it has no workers"


def test_other_machines_need_a_token():
    worker = WorkerSettings(models={"m": None})
    with pytest.raises(UsageError, match="expected a token for the address 0.0.0.0"):
        make_app(ServerSettings(host="0.0.0.0", worker=worker))
    make_app(ServerSettings(host="0.0.0.0", token="x", worker=worker))


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img", "/api/draw", "/sdapi/v1/interrupt"])
def test_pages_of_other_sites_post_nothing(served, path, headers):
    before = served.engine.queue.jobs
    answer = served.post(path, DRAW, headers=headers)
    assert answer.status_code == 403 and "another site" in answer.text
    assert served.engine.queue.jobs == before


def test_its_own_page_posts(served):
    assert served.post("/api/explain", {"prompt": "a cat"}, headers={"Origin": served.url}).status_code == 200


@pytest.mark.parametrize("host", ["elsewhere.example", "127.0.0.1.elsewhere.example", "localhost@elsewhere.example", ""])
def test_a_name_that_points_here_is_not_this_host(served, host):
    """DNS rebinding: the browser believes that this is the other site."""
    assert served.get("/v1/models", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9", "[::1]:9"])
def test_names_of_this_host(served, host):
    assert served.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "name",
    [
        "../../pyproject.toml", "..%2f..%2fetc%2fpasswd", "%2e%2e/x.png", "inputs/x.png", ".hidden.png", "x.png%00.txt",
        "%2fetc%2fpasswd",
    ],
)
@pytest.mark.parametrize("path", ["/page/", "/api/images/"])
def test_paths_lead_nowhere(served, path, name):
    with socket.create_connection(("127.0.0.1", served.port)) as plain:  # clients would tidy the path up
        plain.sendall(f"GET {path}{name} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert plain.makefile("rb").readline().split()[1] == b"404"


def test_links_out_of_the_gallery_are_not_followed(served, tmp_path):
    out = served.engine.settings.out
    out.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (out / "link.png").symlink_to(tmp_path / "secret.png")
    assert "link.png" not in served.get("/api/images").json()
    assert served.get("/api/images/link.png").status_code == 404


def test_a_prompt_of_a_megabyte(served, opened, guarded):
    answer = served.post("/v1/images/generations", {"prompt": "a " * 500_000})
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"
    assert opened.post(f"{guarded.url}/api/draw", json={"prompt": "a" * 15_000}).status_code == 400


@pytest.mark.parametrize("length", [b"99999999999", b"-1", b"many"])
def test_the_length_is_looked_at_before_the_body(served, length):
    with socket.create_connection(("127.0.0.1", served.port)) as plain:
        head = b"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + length + b"\r\n\r\n"
        plain.sendall(head)
        assert plain.makefile("rb").readline().split()[1] in (b"413", b"400")


def test_a_body_that_says_no_length_is_counted(guarded, opened):
    def endless():
        for _ in range(100):
            yield b"x" * 10_000

    answer = opened.post(f"{guarded.url}/api/draw", data=endless(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_slow_bodies_are_not_waited_for(guarded):
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", guarded.port)) as plain:
        head = "POST /api/draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\nAuthorization: Bearer open sesame\r\n\r\n{"
        plain.sendall(head.encode())
        assert plain.makefile("rb").readline().split()[1] == b"408"
    assert time.monotonic() - began < 30


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that says it has side x side pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * min(side * (3 * side + 1), 5_000_000), 9)
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")


@pytest.mark.parametrize("side", [2_000, 60_000])
def test_decompression_bombs_are_known_by_their_header(guarded, opened, side):
    file = base64.b64encode(bomb(side)).decode()
    began = time.process_time()
    for path, body in (
        ("/api/draw", {"image": file, **DRAW}),
        ("/sdapi/v1/img2img", {"init_images": [file], **DRAW}),
    ):
        answer = opened.post(guarded.url + path, json=body)
        assert answer.status_code == 400, answer.text
        assert "pixels" in answer.text or "bomb" in answer.text
    answer = opened.post(f"{guarded.url}/v1/images/edits", files={"image": bomb(side)}, data=DRAW)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "image"
    assert time.process_time() - began < 2.0


@pytest.mark.parametrize(
    ("width", "height"), [(1_000, 4_000), (1025, None), (None, 1025), (512, 2**31)]
)
def test_sizes_beyond_the_limits(guarded, opened, width, height):
    answer = opened.post(f"{guarded.url}/api/draw", json={**DRAW, "width": width, "height": height})
    assert answer.status_code == 400 and "pixels" in answer.json()["detail"]


def test_a_second_pass_counts_with_its_size_and_steps(guarded, opened):
    for fields, unit in (({"width": 512, "hires": 4}, "pixels"), ({"hires": "8x"}, "pixels"), ({"hires_steps": 500}, "steps")):
        body = {"prompt": "a cat", "steps": 2, "hires": 1.5, **fields}
        answer = opened.post(f"{guarded.url}/api/draw", json=body)
        assert answer.status_code in (400, 422) and (unit in answer.text or "hires" in answer.text)


def test_a_side_that_follows_from_the_other_is_limited(guarded, opened):
    file = io.BytesIO()
    Image.new("RGB", (4, 4000)).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    answer = opened.post(f"{guarded.url}/api/draw", json={**DRAW, "image": image, "width": 64})
    assert answer.status_code == 400 and "pixels a side" in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "guidance_scale": NaN}',
        b'{"prompt": "a", "guidance_scale": 1e999}',
        b'{"prompt": "a", "seed": -1}',
        b'{"prompt": "a", "seed": 18446744073709551616}',
        b'{"prompt": "a", "num_images": 100000000}',
        b'{"prompt": "a", "steps": 1000000}',
        b'{"prompt": "a", "sigmas": [' + b"1," * 2000 + b"0.5]}",
        b'{"prompt": "a", "image": "data:,"}',
        b'{"prompt": "a", "mask": "AAAA"}',
        b'{"prompt": "' + b"(" * 9000 + b'"}',
        b"[" * 9000,
        b"\xff\xfe",
    ],
)
def test_malformed_bodies(guarded, opened, body):
    began = time.process_time()
    answer = opened.post(f"{guarded.url}/api/draw", data=body, headers={"Content-Type": "application/json"})
    assert time.process_time() - began < 2.0
    nested = body.startswith(b'{"prompt": "((')
    assert answer.status_code in ((200,) if nested else (400, 422)), answer.text
    assert "Traceback" not in answer.text


def test_what_is_said_is_not_sent_back(served):
    """Errors of types name the place; the value may be megabytes, or a secret."""
    answer = served.post("/sdapi/v1/txt2img", {"steps": "a secret"})
    assert answer.status_code == 422 and "secret" not in answer.text


def test_headers_keep_the_page_to_itself(served):
    headers = served.get("/").headers
    assert "default-src 'none'" in headers["content-security-policy"] and headers["x-frame-options"] == "DENY"
    assert "access-control-allow-origin" not in headers and "server" not in headers


def test_websockets_are_not_spoken(served):
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x"}
    assert served.get("/", headers=upgrade).status_code in (200, 400, 403)


def test_a_full_queue_says_when_to_come_again(served: Running):
    jobs = []
    try:
        for _ in range(8):
            answer = served.post("/api/draw", {"prompt": "a cat", "steps": 60, "num_images": 8})
            if answer.status_code != 200:
                break
            jobs.append(answer.json()["job"])
        assert answer.status_code == 429 and answer.headers["retry-after"]
    finally:
        for job in jobs:
            served.post(f"/api/jobs/{job}/cancel", {})
    wait_for(lambda: served.engine.queue.in_making == 0)


def test_the_page_of_the_documentation_has_the_limits():
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    said = {}
    for names, defaults in re.findall(r"^\| (`.*`) \|.*\| ([\d, ]+) \|$", page, re.MULTILINE):
        numbers = [float(text.replace(",", "")) for text in defaults.split(", ")]
        said |= dict(zip(re.findall(r"`(\w+)`", names), numbers, strict=True))
    assert said == dataclasses.asdict(Limits())


@pytest.mark.parametrize("name", ["../x", "--help", "", "a/b", "nothing"])
def test_data_sets_and_runs_are_names(tmp_path, name):
    (tmp_path / "data" / "own").mkdir(parents=True)
    places = {"data": tmp_path / "data", "out": tmp_path / "out"}
    with running(worker=tiny_worker(), devices=(), **places) as server:
        assert server.get("/api/train").json()["datasets"] == ["own"]
        assert server.post("/api/train/check", {"data": name}).status_code == 404
        if name != "nothing":
            assert server.post("/api/train/start", {"data": "own", "name": name}).status_code == 400
        assert server.get(f"/api/train/runs/{name or 'x'}").status_code == 404
        assert server.get("/api/train").json()["running"] is False
