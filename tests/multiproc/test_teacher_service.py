"""The teacher on dedicated ranks: HTTP returns what its ranks score, and every failure is named."""

import socket
import threading
import time

import httpx
import pytest
import torch
from harness import run_ranks
from tiny_models import make_model

pytestmark = pytest.mark.multiproc

VOCAB = 1003

TOKEN = "the run's secret"


def make_samples():
    from rlad_megatron.types import Sample

    generator = torch.Generator().manual_seed(3)
    return [
        Sample(torch.randint(0, VOCAB, (prompt + response,), generator=generator), prompt, torch.ones(response))
        for prompt, response in ((4, 7), (1, 1), (9, 30), (3, 12), (20, 5))
    ]


def ask_and_answer(found, client, samples, teacher, service, group):
    """All ranks answer one request of rank 0. Its result, or the error it raises, is appended to `found`."""
    from rlad_megatron.errors import TeacherError
    from rlad_megatron.teacher.service import answer_next

    def ask():
        try:
            found.append(client.request(samples))
        except TeacherError as error:
            found.append(error)

    asking = threading.Thread(target=ask)
    if service is not None:
        asking.start()
    try:
        answer_next(teacher, service, group)
    finally:
        if service is not None:
            asking.join()


def serve(rank, world_size, folder):
    from rlad_megatron import platform
    from rlad_megatron.config import LayoutConfig, RunConfig, TeacherConfig
    from rlad_megatron.errors import TeacherError
    from rlad_megatron.models.config_json import read_model_spec
    from rlad_megatron.parallel.groups import build_groups, seed_everything
    from rlad_megatron.teacher import service as module
    from rlad_megatron.teacher.client import ROUTE, RemoteTeacher, TeacherAddress
    from rlad_megatron.teacher.teacher import build_teacher

    platform.setup()
    world = torch.distributed.group.WORLD
    config = RunConfig(teacher=TeacherConfig(folder, LayoutConfig(2, 1), "fp32"))
    groups = build_groups(config.teacher.layout)
    seed_everything(0, groups)
    teacher = build_teacher(config, config.teacher, read_model_spec(folder), groups)
    samples = make_samples()
    service = client = None
    if rank == 0:
        service = module.TeacherService("127.0.0.1", TOKEN)
        client = RemoteTeacher(TeacherAddress(service.url, "teacher_0.log", TOKEN), timeout_s=60)

    direct, found = teacher.log_probs(samples), []
    ask_and_answer(found, client, samples, teacher, service, world)
    module.IDLE_S = 0.1
    module.answer_next(teacher, service, world)  # without a question nothing happens
    module.IDLE_S = 60.0
    next(teacher.chunks[0].parameters()).data.fill_(float("nan"))
    ask_and_answer(found, client, samples, teacher, service, world)
    if rank == 0:
        known = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.post(service.url + ROUTE, content=b"nonsense", headers=known).status_code == 400
        assert httpx.post(service.url + "/stop", headers=known).status_code == 404
        for stranger in ({}, {"Authorization": "Bearer"}, {"Authorization": f"Bearer {TOKEN}x"}, {"token": TOKEN}):
            assert httpx.post(service.url + ROUTE, content=b"nonsense", headers=stranger).status_code == 401
    teacher.chunks = None
    with pytest.raises(TypeError):  # on every rank: none waits for the others
        ask_and_answer(found, client, samples, teacher, service, world)
    if rank > 0:
        return direct, []

    for address, timeout_s in ((service.url, 0.2), ("http://127.0.0.1:9", 60)):
        with pytest.raises(TeacherError) as caught:
            RemoteTeacher(TeacherAddress(address, "teacher_0.log", TOKEN), timeout_s).request(samples)
        found.append(caught.value)
    service.close()
    for teacher in (None, InterruptedTeacher()):
        with pytest.raises(TeacherError) as caught:
            ask_until_the_service_closes(samples, teacher)
        found.append(caught.value)
    send_while_the_service_closes(samples)
    return direct, found


class InterruptedTeacher:
    def log_probs(self, samples):
        raise KeyboardInterrupt("while scoring")


def ask_until_the_service_closes(samples, teacher):
    """The service closes while the request waits for its turn, or because its teacher is interrupted."""
    from rlad_megatron.teacher.client import RemoteTeacher, TeacherAddress
    from rlad_megatron.teacher.service import TeacherService, answer_next

    service = TeacherService("127.0.0.1", TOKEN)

    def close():
        while teacher is None and service._requests.empty():
            time.sleep(0.01)
        if teacher is not None:
            with pytest.raises(KeyboardInterrupt):
                answer_next(teacher, service, None)
        service.close()

    closing = threading.Thread(target=close)
    closing.start()
    try:
        RemoteTeacher(TeacherAddress(service.url, "teacher_0.log", TOKEN), timeout_s=60).request(samples)
    finally:
        closing.join()


def send_while_the_service_closes(samples):
    """A request that is still being sent is refused; `close` hangs neither on it nor on an idle connection."""
    from rlad_megatron.teacher.client import ROUTE, encode_samples
    from rlad_megatron.teacher.service import TeacherService

    service, content = TeacherService("127.0.0.1", TOKEN), encode_samples(samples)
    address = ("127.0.0.1", httpx.URL(service.url).port)
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: teacher\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += f"Content-Length: {len(content)}\r\nExpect: 100-continue\r\n\r\n"
    with (
        httpx.Client() as idle,
        socket.create_connection(address, 60) as slow,
        socket.create_connection(address) as silent,
    ):
        assert idle.get(service.url).status_code == 401
        for connection in (slow, silent):
            connection.sendall(head.encode())
        assert b" 100 " in slow.recv(100)  # the application waits for the body
        closing = threading.Thread(target=service.close)
        closing.start()
        while can_connect(address):
            time.sleep(0.01)
        slow.sendall(content)
        assert b" 500 " in slow.recv(100)
        closing.join(60)
        assert not closing.is_alive()


def can_connect(address):
    try:
        socket.create_connection(address, 60).close()
    except OSError:
        return False
    return True


def test_a_teacher_that_is_asked_over_http(tmp_path):
    folder = make_model(tmp_path, "qwen3", num_hidden_layers=2)
    (direct, (remote, broken, *errors)), (other, _) = run_ranks(serve, 2, folder)
    assert [values.numel() for values in remote] == [7, 1, 30, 12, 5]
    assert all(map(torch.equal, remote, direct)) and all(map(torch.equal, other, direct))
    assert all(values.dtype == torch.float32 for values in remote)
    assert all(values.isnan().all() for values in broken)  # set_log_probs refuses them, with the token
    failed, late, gone, closed, interrupted = map(str, errors)
    assert "failed: TypeError: 'NoneType' object is not subscriptable" in failed
    assert "did not answer within rollout.request_timeout_s=0.2; see teacher_0.log" in late
    assert "the teacher at http://127.0.0.1:9 is gone (ConnectError" in gone
    assert "failed: its ranks have exited; see teacher_0.log" in closed
    assert "failed: KeyboardInterrupt: while scoring; see teacher_0.log" in interrupted
    assert all("\n" not in str(error) for error in errors)
