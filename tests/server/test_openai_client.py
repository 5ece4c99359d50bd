"""OpenAI's own client: what it gets, what it raises, and what it tries again."""

import base64
import time

import openai
import pytest
from fakes import CARD, FakeService, counted, serving, until

from dite.server.job import Partial, Progress
from dite.server.problems import Problem

KEY = "a key of sixteen and more"


@pytest.fixture(scope="module")
def served():
    with serving(FakeService(api_key=KEY)) as live:
        yield live


@pytest.fixture
def client(served):
    service = served.service
    service.script, service.refusal, service.card = [], None, CARD
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=10) as one:
        yield one


def test_pictures_arrive(client):
    answer = client.images.generate(prompt="cat", n=2, size="32x32", user="me", extra_body={"seed": 5, "num_inference_steps": 3})
    assert [base64.b64decode(one.b64_json) for one in answer.data] == [b"picture"] * 2 and answer.size == "32x32"
    assert answer.dite["seeds"] == [5, 6] and answer._request_id.startswith("req_")


def test_the_model_is_found(client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").owned_by == "dite"


def test_a_stream_arrives_event_by_event(client, served):
    served.service.script = [Progress(1, 2), Partial(0, b"draft"), 0.3]
    times, kinds = [], []
    with client.images.generate(prompt="cat", stream=True, partial_images=1) as stream:
        for event in stream:
            times.append(time.monotonic())
            kinds.append((event.type, base64.b64decode(event.b64_json), event.output_format))
    assert kinds == [("image_generation.partial_image", b"draft", "png"), ("image_generation.completed", b"picture", "png")]
    assert times[1] - times[0] > 0.2 and event.usage.total_tokens == 0 and event.dite["steps"] == 50


def test_progress_events_do_not_disturb_it(client, served):
    served.service.script = [Progress(1, 2), Progress(2, 2)]
    stream = client.images.generate(prompt="cat", stream=True, extra_body={"progress": True})
    *progress, last = [event.type for event in stream]
    assert last == "image_generation.completed" and len(progress) == 2
    old = tuple(map(int, openai.__version__.split(".")[:2])) < (2, 0)  # some of them give no name to events that they don't know
    assert set(progress) <= {"dite.progress", *[None] * old}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("problem", "error"),
    [
        (Problem(429, "queue_full", "come back", retry_after_s=2), openai.RateLimitError),
        (Problem(503, "shutting_down", "the server is shutting down"), openai.InternalServerError),
        (Problem(500, "poison", "not again", retry=False), openai.InternalServerError),
    ],
)
def test_refusals_are_raised_with_their_code(client, served, problem, error, stream):
    served.service.refusal = problem
    with pytest.raises(error) as caught:
        client.images.generate(prompt="cat", stream=stream)
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (problem.status, problem.code, problem.type)
    assert problem.message in str(caught.value)


@pytest.mark.parametrize(
    ("ask", "error", "code"),
    [
        (lambda client: client.images.generate(prompt="cat", n=99), openai.BadRequestError, "invalid_value"),
        (lambda client: client.images.generate(prompt="zebra"), openai.BadRequestError, "unknown_class"),
        (lambda client: client.images.generate(prompt="cat", model="dall-e-3"), openai.NotFoundError, "model_not_found"),
        (lambda client: client.models.retrieve("dall-e-3"), openai.NotFoundError, "model_not_found"),
        (lambda client: client.files.list(), openai.NotFoundError, "unknown_url"),
        (lambda client: client.with_options(api_key="wrong").models.list(), openai.AuthenticationError, "invalid_api_key"),
    ],
)
def test_wrong_values_other_models_and_wrong_keys_are_raised_as_such(client, ask, error, code):
    with pytest.raises(error) as caught:
        ask(client)
    assert caught.value.code == code and caught.value.body["message"] in str(caught.value)


def test_an_answer_too_large_to_ask_for_is_raised_and_the_connection_goes_on(client):
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(prompt="x" * 70_000)
    assert caught.value.status_code == 413
    assert client.images.generate(prompt="cat").data


def test_a_failure_half_way_through_a_stream_is_raised(client, served):
    served.service.script = [Partial(0, b"draft"), Problem(500, "out_of_memory", "too large")]
    seen = []
    with pytest.raises(openai.APIError, match="too large") as caught:
        for event in client.images.generate(prompt="cat", stream=True, partial_images=1):
            seen.append(event)
    assert len(seen) == 1 and caught.value.code == "out_of_memory"


def test_it_tries_again_when_told_to_and_as_late_as_told(client, served):
    served.service.refusal = Problem(429, "queue_full", "come back", retry_after_s=0.2)
    before, began = counted(served.service, 429), time.monotonic()
    with pytest.raises(openai.RateLimitError):
        client.with_options(max_retries=1).images.generate(prompt="cat")
    assert time.monotonic() - began >= 1
    until(lambda: counted(served.service, 429) == before + 2)


def test_it_does_not_try_again_when_that_is_no_use(client, served):
    served.service.refusal = Problem(500, "poison", "not again", retry=False)
    client.models.list()  # what was answered before is counted before this
    before = counted(served.service, 500)
    with pytest.raises(openai.InternalServerError):
        client.with_options(max_retries=5).images.generate(prompt="cat")
    until(lambda: counted(served.service, 500) == before + 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_gives_up_cancels_its_job(client, served, stream):
    served.service.script = None
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).images.generate(prompt="cat", stream=stream)
    until(lambda: not served.service.held, seconds=2)
