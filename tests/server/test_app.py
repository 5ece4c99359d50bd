"""The routes, and what is answered when something is wrong."""

import asyncio
import base64
import json
import time

import pytest
from fakes import PATH, FakeService, answer_on, counted, is_problem, request_bytes, serving, until
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from dite.server import app as routes
from dite.server.app import create_app
from dite.server.job import Partial, Pictures, Progress
from dite.server.problems import Problem
from dite.server.protocol import Fields

KEY = "a key of sixteen and more"
JSON = {"content-type": "application/json"}
HOME = "http://localhost"


@pytest.fixture
def service():
    return FakeService()


@pytest.fixture
def client(service):
    return TestClient(create_app(service), base_url=HOME)


@pytest.fixture
def lines(capsys):
    """What was logged: one line a request."""
    return lambda: [line for line in map(json.loads, capsys.readouterr().err.splitlines()) if line["event"] == "request"]


def test_pictures_are_answered_with_what_makes_them_again(client, service):
    answer = client.post(PATH, json={"prompt": "cat", "n": 2, "seed": 5})
    document = answer.json()
    assert answer.status_code == 200 and [base64.b64decode(one["b64_json"]) for one in document["data"]] == [b"picture"] * 2
    assert document["dite"]["seeds"] == [5, 6] and document["dite"]["timings"]["total_s"] < 5 and document["dite"]["model"] == "tiny"
    assert service.cancelled == [] and abs(document["created"] - time.time()) < 60


def test_a_stream_shows_steps_and_drafts_and_pictures(client, service):
    service.script = [Progress(1, 2), Partial(0, b"draft"), Partial(1, b"draft"), Progress(2, 2), Partial(0, b"draft"), Partial(0, b"draft")]
    body = {"prompt": "cat", "n": 2, "stream": True, "progress": True, "partial_images": 2}
    answer = client.post(PATH, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["cache-control"] == "no-cache"
    events = [dict(line.split(": ", 1) for line in block.split("\n")) for block in answer.text.strip().split("\n\n")]
    told = [json.loads(event["data"]) for event in events]
    assert [event["event"] for event in events] == [one["type"] for one in told]
    assert [one["type"].rpartition(".")[2] for one in told] == [
        "progress",
        *["partial_image"] * 2,
        "progress",
        *["partial_image"] * 2,
        *["completed"] * 2,
    ]
    drafts = [(one["dite"]["picture"], one["partial_image_index"]) for one in told if "partial_image_index" in one]
    assert drafts == [(0, 0), (1, 0), (0, 1), (0, 1)]


def test_a_stream_without_progress_says_nothing_of_steps(client, service):
    service.script = [Progress(1, 2)]
    assert "dite.progress" not in client.post(PATH, json={"prompt": "cat", "stream": True}).text


def test_a_quiet_stream_is_kept_open_and_loses_nothing(service, monkeypatch):
    monkeypatch.setattr("dite.server.streaming.PAUSE_S", 0.01)
    service.script = None
    sent = []

    async def story():
        asking = asyncio.create_task(ask(service, told(b'{"prompt": "cat", "stream": true, "progress": true}'), sent=sent))
        for event in (Progress(1, 2), Pictures([b"picture"], 0.0, 0.0, 1)):
            quiet = len(sent)
            while len(sent) < quiet + 3:
                await asyncio.sleep(0.001)
            service.jobs[0].report(event)
        await asking

    asyncio.run(asyncio.wait_for(story(), 10))
    told_in_all = b"".join(message.get("body", b"") for message in sent)
    parts = [part for part in told_in_all.split(b"\n\n") if part]
    assert parts.count(b": still here") >= 4 and parts[0] == b": still here"
    assert [part.split(b"\n")[0] for part in parts if part != b": still here"] == [b"event: dite.progress", b"event: image_generation.completed"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_that_fails_at_once_is_answered_with_its_status(client, service, stream, lines):
    service.script = [Problem(500, "out_of_memory", "too large", retry=False)]
    answer = client.post(PATH, json={"prompt": "cat", "stream": stream})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false") and is_problem(answer.json())
    assert lines()[0]["status"] == 500 and counted(service, 500) == 1


def test_a_stream_that_fails_half_way_ends_with_an_error_and_is_counted_as_one(client, service, lines):
    service.script = [Progress(1, 2), Problem(503, "rank_lost", "try again")]
    answer = client.post(PATH, json={"prompt": "cat", "stream": True})
    name, data = answer.text.strip().rpartition("\n\n")[2].split("\n")
    assert (answer.status_code, name) == (200, "event: error") and json.loads(data.removeprefix("data: "))["error"]["code"] == "rank_lost"
    assert lines()[0]["status"] == 503 and counted(service, 503) == 1 and counted(service, 200) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_that_its_service_forgets_is_given_up(client, service, stream, monkeypatch):
    monkeypatch.setattr(routes, "GRACE_S", 0.1)
    service.script = None
    answer = client.post(PATH, json={"prompt": "cat", "timeout_s": 0.1, "stream": stream})
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
    assert service.jobs[0].deadline_s == 0.1 and service.cancelled == service.jobs


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "unknown_url"),
        ("GET", "/docs", 404, "unknown_url"),
        ("GET", "/openapi.json", 404, "unknown_url"),
        ("POST", PATH + "/", 404, "unknown_url"),
        ("GET", "/page/../app.py", 404, "unknown_url"),
        ("GET", PATH, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("OPTIONS", PATH, 405, "method_not_allowed"),
        ("GET", "/v1/models/dall-e-3", 404, "model_not_found"),
    ],
)
def test_urls_and_methods_that_are_not_there_are_problems(client, method, path, status, code, lines):
    answer = client.request(method, path)
    assert answer.status_code == status and is_problem(answer.json()) and answer.json()["error"]["code"] == code
    assert status != 405 or answer.headers["allow"]
    assert lines()[0]["status"] == status


def test_our_own_mistakes_are_problems_too_and_their_text_is_kept_from_everybody(client, service, capsys):
    service.refusal = KeyError("a secret prompt")
    answer = client.post(PATH, json={"prompt": "cat"})
    logged = capsys.readouterr().err
    assert answer.status_code == 500 and is_problem(answer.json()) and answer.headers["x-request-id"] in answer.json()["error"]["message"]
    assert "secret" not in answer.text + logged and '"KeyError"' in logged and "fakes.py" in logged and counted(service, 500) == 1


def test_a_refusal_of_the_service_comes_with_its_headers(client, service):
    service.refusal = Problem(429, "queue_full", "come back", retry_after_s=3.2)
    answer = client.post(PATH, json={"prompt": "cat"})
    assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]["code"]) == (429, "4", "queue_full")


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({}, b"{}", 415),
        ({"content-type": "text/plain"}, b"{}", 415),
        ({"content-type": "application/x-www-form-urlencoded"}, b"prompt=cat", 415),
        ({"content-type": "application/json; charset=latin-1"}, b"{}", 415),
        (JSON | {"content-encoding": "gzip"}, b"{}", 415),
        (JSON | {"content-length": "x"}, b"{}", 400),
        (JSON | {"content-length": "9" * 5000}, b"{}", 413),
        (JSON | {"content-length": "65537"}, b"{}", 413),
        (JSON, b" " * 65537, 413),
        (JSON, b'{"prompt": "cat"', 400),
        (JSON, b'{"prompt": "cat", "prompt": "dog"}', 400),
        (JSON, b'{"prompt": "\\ud800"}', 400),
        (JSON, b'{"\\ud800": 1}', 400),
        (JSON, b'{"prompt": "cat", "model": "other"}', 404),
        ({"content-type": 'APPLICATION/JSON; Charset="UTF-8"'}, b'{"prompt": "cat"}', 200),
        (JSON, b'{"prompt": "cat"}' + b" " * 65000, 200),
    ],
)
def test_bodies_are_taken_only_as_they_should_be(client, headers, body, status):
    answer = client.post(PATH, content=body, headers=headers)
    assert answer.status_code == status and (status == 200 or is_problem(answer.json()))


def test_chunks_beyond_the_limit_are_refused_before_they_end():
    async def story():
        async def endless():
            return {"type": "http.request", "body": b" " * 10_000, "more_body": True}

        return await ask(FakeService(), endless)

    status, document = asyncio.run(story())
    assert status == 413 and "at most 65536 bytes, not more" in document["error"]["message"]


def test_a_body_that_does_not_come_is_not_waited_for():
    async def never():
        await asyncio.sleep(60)

    status, document = asyncio.run(ask(FakeService(limits={"body_timeout_s": 0.1}), never))
    assert (status, document["error"]["code"]) == (408, "body_timeout") and "0.1 s; 0 bytes" in document["error"]["message"]


def test_without_a_permit_the_body_is_not_read():
    async def unread():
        raise AssertionError("the body was read")

    async def story():
        service = FakeService(limits={"connections": 1})
        service.script = None
        app = create_app(service)
        first = asyncio.create_task(ask(service, told(b'{"prompt": "cat"}'), app))
        while not service.jobs:
            await asyncio.sleep(0)
        refused = await ask(service, unread, app)
        service.jobs[0].report(Problem(500, "over", "over"))
        return refused, await first, await ask(service, told(b"{}"), app)

    (status, document), first, after = asyncio.run(asyncio.wait_for(story(), 10))
    assert (status, document["error"]["code"], first[0], after[0]) == (429, "too_many_requests", 500, 400)


def told(body):
    """`receive` of a client that sends `body` and stays."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if not messages:
            await asyncio.sleep(60)
        return messages.pop()

    return receive


async def ask(service, receive, app=None, sent=None):
    """A POST without a server: its status and document, or all messages in `sent`."""
    messages = [] if sent is None else sent

    async def send(message):
        messages.append(message)

    scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": [(b"content-type", b"application/json")]}
    await (app or create_app(service))(scope | {"http_version": "1.1", "scheme": "http", "server": ("test", 80), "root_path": ""}, receive, send)
    return sent or (messages[0]["status"], json.loads(b"".join(message.get("body", b"") for message in messages[1:])))


@pytest.mark.parametrize("path", ["/health", "/ready", "/", "/page.js", "/page.css"])
def test_probes_and_the_page_need_no_key(path):
    client = TestClient(create_app(FakeService(api_key=KEY)), base_url=HOME)
    assert client.get(path).status_code in (200, 404)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/v1/status", "/metrics", "/nothing", "//health", "/health/"])
def test_everything_else_needs_the_key(path):
    client = TestClient(create_app(FakeService(api_key=KEY)), base_url="http://test")
    for header in (None, "", KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", "Bearer \xff"):
        answer = client.get("http://test" + path, headers={} if header is None else {"authorization": header.encode("latin-1")})
        assert answer.status_code == 401 and is_problem(answer.json()) and answer.headers["www-authenticate"] == "Bearer"
    assert client.get("http://test" + path, headers={"authorization": f"bearer {KEY}"}).status_code in (200, 404)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.evil.example", "192.168.1.7", "a b"])
def test_without_a_key_a_page_under_another_name_gets_nothing(client, service, host):
    for path in ("/", "/v1/status", "/v1/models", "/metrics", "/nothing"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == 403 and is_problem(answer.json()) and answer.json()["error"]["code"] == "unknown_host"
    assert client.post(PATH, json={"prompt": "cat"}, headers={"host": host}).status_code == 403 and not service.jobs
    assert client.get("/health", headers={"host": host}).status_code == client.get("/ready", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.0.0.9", "[::1]:8000", "[::1]", "box.lan:8000"])
def test_without_a_key_this_machines_own_names_and_those_set_are_answered_to(host):
    client = TestClient(create_app(FakeService(hosts=["Box.lan"])), base_url=HOME)
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_with_a_key_any_name_will_do():
    client = TestClient(
        create_app(FakeService(api_key=KEY, host="0.0.0.0")), base_url="http://dite.example", headers={"authorization": f"Bearer {KEY}"}
    )
    assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("path, status", [("/", 200), ("/page.js", 200), ("/nothing", 404)])
def test_a_host_header_is_no_part_of_a_files_name(monkeypatch, path, status):
    client = TestClient(create_app(FakeService(api_key=KEY)), base_url=HOME)
    monkeypatch.setattr(HTTPConnection, "url", property(lambda _: pytest.fail("the URL is made of the Host header as well")))
    answer = client.get(path, headers={"host": "x/../../../../../etc/passwd?", "authorization": f"Bearer {KEY}"})
    assert answer.status_code == status and "root:" not in answer.text


def test_without_a_key_any_is_welcome(client):
    assert client.get("/v1/models", headers={"authorization": "Bearer sk-whatever"}).status_code == 200


def test_the_model_is_listed_by_its_name_even_one_with_a_slash():
    client = TestClient(create_app(FakeService(name="me/dit-w4a8")), base_url=HOME)
    (listed,) = client.get("/v1/models").json()["data"]
    assert (listed["id"], listed["object"], listed["dite"]["class_ids"]) == ("me/dit-w4a8", "model", list(range(10)))
    assert client.get("/v1/models/me/dit-w4a8").json() == client.get("/v1/models/me%2Fdit-w4a8").json() == listed


def test_a_server_that_is_not_ready_is_alive_and_says_so():
    service = FakeService(card=None)
    service.state = "starting"
    client = TestClient(create_app(service), base_url=HOME)
    assert client.get("/health").json() == {"status": "alive"} and client.head("/health").status_code == 200
    assert (client.get("/ready").status_code, client.get("/ready").json()) == (503, {"status": "starting"})
    refused = client.post(PATH, json={"prompt": "cat"})
    assert (refused.status_code, refused.json()["error"]["code"], "retry-after" in refused.headers) == (503, "starting", True)
    assert client.get("/v1/models").status_code == client.get("/v1/status").status_code == 200
    service.state = "ready"
    assert client.get("/ready").status_code == 200


def test_the_status_tells_the_page_what_it_needs_and_no_secret():
    client = TestClient(
        create_app(FakeService(api_key=KEY, model="private/folder", steps=7, guidance=2.5)), headers={"authorization": f"Bearer {KEY}"}
    )
    status = client.get("/v1/status")
    document = status.json()
    assert (document["state"], document["card"]["classes"]["cat"], document["limits"]["images"]) == ("ready", 3, 10)
    assert document["defaults"] == {"n": 1, "size": "32x32", "steps": 7, "guidance": 2.5, "output_format": "png"}
    assert KEY not in status.text and "private" not in status.text


def test_the_page_is_served_with_headers_that_confine_it(client, tmp_path, monkeypatch):
    monkeypatch.setattr(routes, "PAGE", tmp_path)
    for path, name, kind in [("/", "index.html", "text/html"), ("/page.js", "page.js", "text/javascript"), ("/page.css", "page.css", "text/css")]:
        assert client.get(path).status_code == 404 and is_problem(client.get(path).json())
        (tmp_path / name).write_bytes(b"\xc3\xa9")
        answer = client.get(path)
        assert (answer.text, answer.headers["content-type"]) == ("é", f"{kind}; charset=utf-8")
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' data: blob:;")
        assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == ("no-cache", "nosniff")


def test_every_request_leaves_one_line_without_its_prompt_or_key(client, lines):
    client.post(PATH, json={"prompt": "golden retriever"}, headers={"authorization": "Bearer sk-secret"})
    client.post(PATH, json={"prompt": "a purple zebra"})
    client.get("/v1/models/tiny")
    client.get("/nothing?prompt=zebra")
    first, second, third, fourth = lines()
    assert (first["method"], first["route"], first["status"], first["job"][:4], first["seconds"] < 5) == ("POST", PATH, 200, "job-", True)
    assert (second["status"], second["job"], third["route"], fourth["route"]) == (400, None, "/v1/models/{model:path}", None)
    assert not any(word in str([first, second, third, fourth]) for word in ("retriever", "zebra", "secret", "tiny"))


def test_requests_are_counted_by_status_but_for_those_of_monitoring(client, service):
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/nothing"):
        client.get(path)
    client.post(PATH, json={"prompt": "cat"})
    page = client.get("/metrics")
    assert (counted(service, 200), counted(service, 404)) == (2, 1) and "dite_request_seconds_count 1.0" in page.text
    assert page.headers["content-type"].startswith("text/plain; version=")


@pytest.fixture(scope="module")
def live():
    with serving(FakeService(limits={"connections": 8})) as served:
        yield served


@pytest.mark.parametrize("script", [None, [Progress(1, 2), 600]], ids=["waiting", "drawing"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_job_and_gives_its_permit_back(live, monkeypatch, script, stream):
    monkeypatch.setattr(live.service, "script", script)
    for _ in range(7):  # of 6 permits
        seen = len(live.service.jobs)
        with live.dial(request_bytes({"prompt": "cat", "stream": stream, "progress": stream})) as wire:
            until(lambda seen=seen: len(live.service.jobs) > seen)
            if stream and script:
                assert wire.recv(100)
            assert len(live.service.held) == 1
        until(lambda: not live.service.held, seconds=1)
    monkeypatch.setattr(live.service, "script", [])
    with live.dial(request_bytes()) as wire:
        assert answer_on(wire)[0] == 200


def test_a_client_that_leaves_in_the_middle_of_its_body_is_forgotten(live):
    before, jobs = counted(live.service, 499), len(live.service.jobs)
    with live.dial(request_bytes()[:-3]):
        time.sleep(0.05)
    until(lambda: counted(live.service, 499) == before + 1)
    assert len(live.service.jobs) == jobs


FIELDS = [*Fields.model_fields, "user"]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.sampled_from(["cat", "32x32", "tiny", "auto", 1, 3.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
documents = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), anything, max_size=4).map(lambda one: {"prompt": "cat"} | one)
bodies = st.binary(max_size=200) | (documents | anything).map(lambda one: json.dumps(one).encode("ascii"))


@examples(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=bodies)
def test_no_body_makes_the_server_fail(body, client):
    answer = client.post(PATH, content=body, headers=JSON)
    assert answer.status_code < 500 and (answer.status_code == 200 or is_problem(answer.json()))
