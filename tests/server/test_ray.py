"""A real Ray of its own, two replicas with real ranks, and the official client."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from living import exists, save_model

pytest.importorskip("ray", reason="needs dite[ray]")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KEY = "swordfish-swordfish-swordfish"
SECRET = "a-prompt-that-nobody-may-read"
START_S = 240  # a quarter of a minute where nobody else computes


class Server:
    """`dite serve --engine ray` in a process of its own."""

    def __init__(self, model, *options):
        self.folder = tempfile.mkdtemp(prefix="dite_ray_")  # short: Ray puts sockets into it
        self.log = Path(self.folder, "stderr")
        environment = {**os.environ, "RAY_TMPDIR": self.folder, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
        command = [sys.executable, "-m", "dite", "serve", model, "--engine", "ray", "--port", "0", "--json", *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log)
        self.family = {self.process.pid}

    def url(self):
        """Where it is, once it is ready."""
        said = {}
        reader = threading.Thread(target=lambda: said.update(json.loads(self._document())), daemon=True)
        reader.start()
        reader.join(START_S)
        assert "url" in said, f"{said or 'nothing said'}\n{self.log.read_text()[-3000:]}"
        return said["url"]

    def _document(self):
        lines = []
        for line in self.process.stdout:
            lines.append(line.decode())
            if line == b"}\n":
                break
        return "".join(lines)

    def meet_family(self):
        """Remember every process that it has started so far."""
        self.family |= {pid for pid in descendants(self.process.pid)}

    def end(self):
        self.meet_family()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()
            left = survivors(self.family, 10)
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)
        assert left == set()


def descendants(pid):
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found = list(children.get(pid, []))
    for one in found:
        found += children.get(one, [])
    return found


def alive(pid):
    """Neither gone nor a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def survivors(processes, timeout_s):
    deadline = time.monotonic() + timeout_s
    while (left := {pid for pid in processes if alive(pid)}) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def until(condition, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(KEY + "\n")
    server = Server(model, "--replicas", "2", "--steps", "20", "--api-key-file", str(key), "--set", "max_restarts=0", "--set", "limits.steps=1000")
    try:
        server.client = client(server.url())
        yield server
    finally:
        server.end()


def client(url):
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, timeout=60, max_retries=5)


def draw(client, number=3, **fields):
    return client.images.generate(model="tiny", prompt=f"class:{number}", extra_body={"seed": 5, **fields}).data[0].b64_json


def metric(client, name):
    """A metric of each replica, summed over its other labels."""
    import httpx

    page = httpx.get(str(client.base_url).replace("/v1/", "/metrics"), headers={"authorization": f"Bearer {KEY}"}, timeout=20).text
    values = {}
    for labels, value in re.findall(rf"^{name}\{{(.*)\}} (\S+)$", page, re.MULTILINE):
        replica = re.search('ray_replica="(.*?)"', labels)[1]
        values[replica] = values.get(replica, 0) + float(value)
    return values


def ranks(client):
    return {int(pid) for pid in metric(client, "dite_rank_pid").values()}


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_both_replicas_draw_and_draw_the_same(server):
    with ThreadPoolExecutor(16) as pool:
        pictures = set(pool.map(lambda _: draw(server.client), range(32)))
    until(lambda: sum(metric(server.client, "dite_images_total").values()) == 32, 10)
    assert len(pictures) == 1 and min(metric(server.client, "dite_images_total").values()) > 0


def test_a_client_that_leaves_takes_its_work_with_it(server):
    import httpx

    def steps():
        return sum(metric(server.client, "dite_step_seconds_count").values())

    before = steps()
    body = {"prompt": "class:3", "n": 8, "num_inference_steps": 1000, "stream": True, "progress": True}
    with httpx.Client(base_url=str(server.client.base_url), headers={"authorization": f"Bearer {KEY}"}, timeout=20) as http:
        with http.stream("POST", "images/generations", json=body) as stream:
            assert next(stream.iter_lines()).startswith("event: dite.progress")
        time.sleep(2.5)  # replicas tell each other what they have counted every second
        stopped = steps()
        time.sleep(1.5)
        assert 0 < stopped - before < 1000 and steps() == stopped


@pytest.mark.parametrize("victim", ["replica", "rank"])
def test_a_replica_that_is_killed_or_loses_its_ranks_comes_back_and_leaves_no_orphan(server, victim):
    before = until(lambda: len(now := ranks(server.client)) == 2 and now, 10)  # replicas hear of each other every second
    rank = min(before)
    replica = parent(rank)
    os.kill(rank if victim == "rank" else replica, signal.SIGKILL)  # with max_restarts=0 a replica gives up with its ranks
    assert survivors({rank}, 5) == set()
    after = until(lambda: len(now := ranks(server.client)) == 2 and rank not in now and now, 90)
    assert survivors({replica}, 10) == set() and all(exists(pid) for pid in after)
    assert draw(server.client) == draw(server.client)


def test_the_key_is_needed_and_neither_it_nor_a_prompt_is_written_anywhere(server):
    import openai

    with pytest.raises(openai.AuthenticationError):
        draw(server.client.with_options(api_key="another-key"))
    with pytest.raises(openai.BadRequestError):
        server.client.images.generate(model="tiny", prompt=SECRET)
    files = [path for path in Path(server.folder).rglob("*") if path.is_file()]
    assert any(path.name.startswith("gcs_server") for path in files)
    assert [path for path in files for word in (KEY, SECRET) if word.encode() in path.read_bytes()] == []


def test_sigterm_answers_what_was_accepted_refuses_what_is_new_and_leaves_nothing(server):
    import httpx

    url = str(server.client.base_url).removesuffix("/v1/")
    server.meet_family()
    with ThreadPoolExecutor(12) as pool:
        calm = draw(server.client, num_inference_steps=150)
        patient = server.client.with_options(max_retries=0)
        answers = [pool.submit(draw, patient, num_inference_steps=150) for _ in range(12)]
        until(lambda: len([value for value in metric(server.client, "dite_queue_wait_seconds_count").values() if value]) == 2, 20)
        time.sleep(0.5)
        assert not all(answer.done() for answer in answers)
        server.process.terminate()
        until(lambda: httpx.get(f"{url}/ready").status_code == 503, 5)
        refused = httpx.post(f"{url}/v1/images/generations", json={"prompt": "class:3"}, headers={"authorization": f"Bearer {KEY}"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert {answer.result(60) for answer in answers} == {calm}
    assert server.process.wait(30) == 0
    assert survivors(server.family, 10) == set()


def test_a_model_that_cannot_be_loaded_ends_the_command_in_the_words_of_its_rank(model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model_index.json").write_text("{}")
    server = Server(str(broken))
    try:
        assert server.process.wait(START_S) not in (0, None)
        said = json.loads(server.process.stdout.read())["error"]
        assert "model_index.json" in said["what"] and "Ray" not in said["what"]
    finally:
        server.end()
