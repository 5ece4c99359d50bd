"""`dite serve` as people start and stop it, wrongly and rightly."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import openai
import pytest

from dite_evals.serving import alive, served

KEY = "0123456789abcdef0123456789abcdef"


def client(server, key="none"):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def server(model_folder_once):
    with served(str(model_folder_once), "--steps", "4", "--guidance", "2", "--nproc", "2", "--codec", "int4") as one:
        yield one


def pids(server):
    """Of the ranks: the server's children."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(server.process.pid)], capture_output=True, text=True, check=False)
    return [int(pid) for pid in listed.stdout.split()]


def test_the_openai_client_gets_pictures_that_can_be_made_again(server):
    from PIL import Image

    first, again = (client(server).images.generate(prompt="ship", n=2, extra_body={"seed": 5}) for _ in range(2))
    pictures = [base64.b64decode(one.b64_json) for one in first.data]
    assert [one.b64_json for one in first.data] == [one.b64_json for one in again.data]
    assert Image.open(io.BytesIO(pictures[0])).size == (32, 32) and first.model_extra["dite"]["seeds"] == [5, 6]


def test_a_served_picture_is_the_one_that_generate_draws(server, model_folder_once, run, tmp_path):
    import numpy as np
    from PIL import Image

    served_one = client(server).images.generate(prompt="ship", extra_body={"seed": 5, "num_inference_steps": 8})
    run("generate", model_folder_once, "--class", "ship", "-n", 1, "--seed", 5, "--steps", 8, "--guidance", 2, "-o", tmp_path / "out")
    drawn = np.asarray(Image.open(next((tmp_path / "out").glob("0000-*.png")))).astype(int)
    ours = np.asarray(Image.open(io.BytesIO(base64.b64decode(served_one.data[0].b64_json)))).astype(int)
    assert abs(drawn - ours).max() <= 8  # random weights amplify what int4 exchanges round away


def test_a_stream_ends_in_the_picture(server):
    events = list(client(server).images.generate(prompt="cat", stream=True, partial_images=1, extra_body={"seed": 1}))
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]


def test_wrong_requests_raise_the_clients_own_errors(server):
    with pytest.raises(openai.BadRequestError, match="nearest are ship"):
        client(server).images.generate(prompt="shipp")
    with pytest.raises(openai.NotFoundError):
        client(server).images.generate(prompt="ship", model="dall-e-3")


def test_a_rank_killed_under_a_request_costs_time_and_nothing_else(server):
    """20 kills are in docs/results/serve-faults.json."""
    body = {"seed": 9, "num_inference_steps": 60}
    calm = client(server).images.generate(prompt="dog", extra_body=body).data[0].b64_json
    stream = client(server).images.generate(prompt="dog", stream=True, partial_images=3, extra_body=body)
    next(iter(stream))
    os.kill(pids(server)[-1], signal.SIGKILL)
    assert [event.b64_json for event in stream if event.type == "image_generation.completed"] == [calm]


def test_sigterm_lets_a_request_finish_and_leaves_no_process(model_folder_once):
    with served(str(model_folder_once), "--steps", "400", "--guidance", "2") as server:
        ranks = pids(server)
        stream = client(server).images.generate(prompt="dog", stream=True, partial_images=1)
        server.process.send_signal(signal.SIGTERM)
        assert [event.type for event in stream][-1] == "image_generation.completed"
        assert server.process.wait(20) == 0 and not any(alive(pid) for pid in ranks)


def test_ranks_die_with_their_server(model_folder_once):
    with served(str(model_folder_once)) as server:
        ranks = pids(server)
        server.process.kill()
        server.process.wait(10)
        deadline = time.monotonic() + 5
        while any(alive(pid) for pid in ranks):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert ranks


def test_a_key_is_asked_for_and_never_shown(model_folder_once, tmp_path):
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    with served(str(model_folder_once), "--steps", "2", "--api-key-file", str(file), "--host", "0.0.0.0") as server:
        with pytest.raises(openai.AuthenticationError):
            client(server).models.list()
        assert client(server, KEY).images.generate(prompt="cat").data and KEY not in server.log.read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--batching", "static"], "'continuous', 'dynamic' or 'none'"),
        (["--set", "limits.step=3"], "did you mean steps?"),
        (["--set", "max_restarts=-1"], "max_restarts"),
        (["--engine", "k8s"], "local and ray"),
        (["--replicas", "2"], "--engine ray"),
        (["--codec", "int3"], "int4"),
        (["--mode", "rings"], "ring"),
        (["--api-key-file", "nowhere"], "no key file"),
        (["--set", f"api_key={KEY}"], "use --api-key-file"),
        (["--set", "steps=3"], "use --steps"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_starts(run, flags, said):
    outcome = run("serve", "builtin:cifar10-dit", *flags)
    assert outcome.code == 2 and said in outcome.err


def test_the_help_names_the_extra_that_ray_needs(run):
    assert "dite[ray]" in run("serve", "--help").out


def test_a_drain_that_takes_too_long_is_no_success(model_folder_once):
    with served(str(model_folder_once), "--set", "drain_timeout_s=0.3", "--set", "limits.steps=1000") as server:
        stream = client(server).images.generate(prompt="dog", stream=True, partial_images=1, extra_body={"num_inference_steps": 1000})
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="stopped before these pictures were done"):
            list(stream)
        assert server.process.wait(20) == 1 and "drain_timeout_s is 0.3" in server.log.read_text()


@pytest.mark.slow
def test_sigterm_lets_a_slow_client_read_its_answer_to_the_end(model_folder_once):
    body = json.dumps({"prompt": "ship", "n": 64, "num_inference_steps": 1, "guidance_scale": 1}).encode()
    lines = ["POST /v1/images/generations HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    with served(str(model_folder_once), "--set", "limits.images=64") as server, socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(server.address)
        wire.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        head = wire.recv(1024)
        server.process.send_signal(signal.SIGTERM)
        got, length = len(head) - head.index(b"\r\n\r\n") - 4, int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        time.sleep(9)
        while piece := wire.recv(65536):
            got += len(piece)
        assert got == length and server.process.wait(20) == 0


def test_a_key_that_is_no_secret_is_refused_without_being_shown(run, tmp_path):
    (tmp_path / "key").write_text("hunter2")
    outcome = run("serve", "builtin:cifar10-dit", "--api-key-file", tmp_path / "key")
    assert outcome.code == 2 and "at least 16" in outcome.err and "hunter2" not in outcome.err


def test_a_dry_run_lists_every_setting_and_hides_the_key(run, tmp_path):
    (tmp_path / "key").write_text(KEY)
    outcome = run("serve", "builtin:cifar10-dit", "--dry-run", "--json", "--api-key-file", tmp_path / "key", "--set", "limits.steps=9")
    settings = outcome.document["settings"]
    assert settings["limits"]["steps"] == 9 and settings["max_queue"] == 64 and KEY not in outcome.out


def test_a_model_that_is_not_there_is_refused_at_once(run):
    outcome = run("serve", "nothing-here")
    assert outcome.code == 2 and "no model at nothing-here" in outcome.err


def test_a_folder_that_holds_no_model_is_refused_in_the_ranks_own_words(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dite", "serve", str(tmp_path), "--port", "0"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and "error: " in done.stderr and "holds no model" in done.stderr


def test_a_port_that_is_taken_is_refused(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        outcome = run("serve", "builtin:cifar10-dit", "--port", taken.getsockname()[1])
    assert outcome.code == 2 and "choose another --port" in outcome.err
